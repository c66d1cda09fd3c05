"""Experiments `sign` and `sign_norms`: cells, what was measured before, what the law predicts, and how it is judged."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dora_lab.models.base import model_and_tokenizer
from dora_lab.models.rescale import factor
from dora_lab.paper.predicted import Prediction, judge, together
from dora_lab.report import KINDS, law
from dora_lab.spec import spec_id
from experiments import _sign_norms as base
from experiments import sign, sign_norms

MINI = base.BASES["mini"]


def test_every_run_of_the_mini_tier_is_one_of_a_cell() -> None:
    cells = sign.cells()
    assert cells.keys() == {spec_id(spec) for spec in sign.confirmation()}
    assert set(Counter(cells.values()).values()) == {8} and len(set(cells.values())) == 31
    for spec in sign.confirmation():
        cell, optim = cells[spec_id(spec)], spec.optim
        assert optim is not None
        steps = optim.steps(2048)
        if not cell.control:
            decay = law.decayed(optim.learning_rate, optim.weight_decay, steps)
            assert decay == pytest.approx(cell.decay, rel=0.01)
        if cell.control == sign.SAME:  # of the full fine-tuning beside it
            assert optim.weight_decay == pytest.approx(-math.log(1 - cell.decay) / (0.0014 * steps / 2), rel=0.01)


def test_norms_are_set_with_the_step_and_against_it_and_their_mean_is_kept() -> None:
    for method in ("ft", "lora", "dora"):
        for kind in sign_norms.SCALED:
            found, e_L = np.array(MINI.norms[kind]), np.array(MINI.lengths[method][kind])
            n_L = {norms: base.target(MINI, method, kind, norms) for norms in sign_norms.NORMS}
            assert [n.mean() for n in n_L.values()] == pytest.approx([found.mean()] * 4)
            for constant in (n_L["with"] ** 2 / e_L, n_L["against"] * e_L, n_L["flat"]):
                assert np.ptp(constant) < 1e-12 * constant.mean()
    cells = sign_norms.cells()
    assert len(cells) == 288 and set(Counter(cells.values()).values()) == {8}


def test_a_rescaled_base_has_the_norms_that_the_prediction_is_of() -> None:
    spec = next(s for s in sign_norms.specs("mini") if sign_norms.cells()[spec_id(s)][1:] == ("dora", "against", 0.0))
    model, _ = model_and_tokenizer(spec)
    for name, parameter in model.named_parameters():
        for kind in MINI.norms:
            if f".{kind}." in name:
                layer = int(name.split(".")[2])
                target = base.target(MINI, "dora", kind, "against")[layer]
                assert parameter.norm(dim=1).mean().item() == pytest.approx(target, rel=2e-3)
    assert abs(factor(spec.model.rescale, "model.layers.0.self_attn.q_proj.weight") - 1) > 0.1


def test_another_base_is_an_entry_with_the_fingerprint_of_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(MINI, revision="0123456789ab", norms={kind: n[::-1] for kind, n in MINI.norms.items()})
    monkeypatch.setattr(sign_norms, "BASES", base.BASES | {"mini-seed1": other})
    specs = sign_norms.specs("mini")
    mine = [spec for spec in specs if spec.model.name == "mini-seed1"]
    assert len(mine) == 54 and {spec.model.revision for spec in mine} == {"0123456789ab"}
    assert len(specs) == 288 + 54 and {spec.seed for spec in mine} == {0, 1, 2} and all(s.model.rescale for s in mine)
    assert not {spec.model.rescale for spec in mine if spec.model.rescale} & {s.model.rescale for s in specs[:288]}


def test_the_length_of_a_turn_and_back() -> None:
    rng = np.random.default_rng(0)
    w, e = rng.normal(size=16), rng.normal(size=16)
    e -= e @ w / (w @ w) * w
    d = 1 - (w + e) @ w / np.linalg.norm(w + e) / np.linalg.norm(w)
    n = np.linalg.norm(w)
    assert law.turned(n, np.linalg.norm(e)) == pytest.approx(d) and law.length(n, d) == pytest.approx(np.linalg.norm(e))


def test_a_magnitude_that_decays_and_learns() -> None:
    m = 1.7 * (1 - 0.05) + np.random.default_rng(0).normal(0.02, 0.06, 200_000)
    assert law.learned(1.7, 0.05, 0.02, 0.06) == pytest.approx(np.abs(m - 1.7).mean(), rel=0.01)


def test_what_is_registered_is_what_the_code_predicts() -> None:
    """Every row of the table in registered/sign_norms.md."""
    kinds = {text: kind for kind, text in KINDS.items()}
    text = (Path(sign_norms.__file__).parent / "registered" / "sign_norms.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines() if "[" in line]
    rows = [row for row in rows if row[0] in ("ft", "lora", "dora")]
    assert len(rows) == 4 * (6 + 5 + 5)
    for method, kind, norms, *cells in rows:
        for ratio, cell in zip(sign_norms.RATIOS, cells, strict=True):
            found = base.predicted(MINI, method, kinds[kind], norms, sign_norms.decay(MINI, method, ratio))
            assert cell == "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)


def test_predictions_are_judged_by_the_interval_over_seeds() -> None:
    def outcome(values: list[float], seeds: int = 4, **options: float | bool) -> str:
        per_seed = dict(enumerate(values))
        made = Prediction(part="1", statement="", per_seed=per_seed, **options)  # type: ignore[arg-type]
        return judge([made], seeds)[0]["outcome"]

    below = [-0.5, -0.6, -0.4, -0.5]
    assert outcome(below, high=0) == "holds" and outcome(below, low=0) == "does not hold"
    assert outcome(below, low=0, refutes=True) == "refuted"
    assert outcome([-0.5, 0.6, -0.4, 0.5], high=0) == "undecided" and outcome(below, low=-0.52, high=0) == "undecided"
    assert outcome(below[:3], high=0) == "3 of 4 seeds" and outcome([], high=0) == "not run"
    assert outcome([0.1] * 4, low=0) == "holds"
    row = judge([Prediction(part="1", statement="", per_seed=dict(enumerate(below)), high=0, unit="r")], 4)[0]
    assert (
        row["value"] == pytest.approx(math.tanh(-0.5)) and row["agree"] == "4/4" and -1 < row["low"] < row["high"] < 0
    )
    assert together(["holds", "refuted", "3 of 4 seeds"]) == "refuted" and together(["holds", "holds"]) == "holds"
    assert together(["holds", "not run"]) == "not all run" and together(["not run"] * 2) == "not run"
    assert (
        together(["holds", "undecided"]) == "undecided" and together(["undecided", "does not hold"]) == "does not hold"
    )
