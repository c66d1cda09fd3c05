"""The law of figure 2's sign against rows of numbers: brute force on matrices that nobody trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from dora_lab import mini
from dora_lab.commands import models  # noqa: F401  (adds `probe`)
from dora_lab.commands.app import app
from dora_lab.probing.norms import norms
from dora_lab.report import law


def _measure(W0: np.ndarray, W: np.ndarray) -> tuple[float, float]:
    """(ΔD, ΔM) of one matrix by the definitions, float64."""
    n0, n = np.linalg.norm(W0, axis=1), np.linalg.norm(W, axis=1)
    return float(np.mean(1 - (W0 * W).sum(1) / (n0 * n))), float(np.mean(np.abs(n - n0)))


def _layer(rng: np.random.Generator, norm: float, size: float, decay: float, inputs: int) -> tuple[float, float]:
    W0 = rng.normal(size=(2000, inputs))
    W0 *= norm / np.linalg.norm(W0, axis=1, keepdims=True)
    E = rng.normal(size=W0.shape) * size / np.sqrt(inputs)
    return _measure(W0, (1 - decay) * W0 + E)


@pytest.mark.parametrize("decay", [0.0, 0.002, 0.005, 0.05])
def test_full_fine_tuning_with_decay(decay: float):
    for norm, size in ((1.0, 0.1), (2.0, 0.1), (1.5, 0.2)):
        d, m = _layer(np.random.default_rng(0), norm, size, decay, 64)
        assert law.full(norm, d, decay, 64) == pytest.approx(m, rel=0.03)


def test_lora_is_a_rotation_with_the_length_that_pythagoras_gives_it():
    rng = np.random.default_rng(1)
    W0 = rng.normal(size=(500, 32))
    W0 *= 1.7 / np.linalg.norm(W0, axis=1, keepdims=True)
    E = rng.normal(size=W0.shape)
    E -= (E * W0).sum(1, keepdims=True) / 1.7**2 * W0
    E *= 0.9 / np.linalg.norm(E, axis=1, keepdims=True)  # of every row the same, so that the mean is the law
    d, m = _measure(W0, W0 + E)
    assert law.lora(1.7, d) == pytest.approx(m, rel=1e-12)


@pytest.mark.parametrize(("spread", "ratio"), [(0.07, 0.0), (0.07, 2.4), (0.07, 20.0), (0.3, 2.4)])
def test_the_curve_is_what_simulated_layers_have(spread: float, ratio: float):
    norms, d = np.array([1.0, 1.1, 1.3, 1.6, 1.9, 2.2]), 0.003
    predicted = law.curve(norms, d, spread, [ratio], 64).iloc[0]
    rng, found = np.random.default_rng(2), []
    for _ in range(24):
        e = np.exp(rng.normal(0, spread, 6))
        e *= np.sqrt(d / np.mean(e**2 / (2 * norms**2)))
        points = [_layer(rng, n, size, ratio * d, 64) for n, size in zip(norms, e, strict=True)]
        found.append(np.corrcoef(np.array(points).T)[0, 1])
    inside = np.mean([(predicted["low"] - 0.05 <= r) and (r <= predicted["high"] + 0.05) for r in found])
    assert inside >= 0.75
    assert np.median(found) == pytest.approx(predicted["r"], abs=0.15)


def test_the_limits_that_need_no_simulation():
    norms = np.array([1.0, 1.2, 1.5, 1.9])
    s_n, s_e = np.std(np.log(norms)), 0.01
    far = law.curve(norms, 0.003, s_e, [1e6]).iloc[0]  # decay alone: n against 1 / n²
    assert far["r"] == pytest.approx(np.corrcoef(norms, norms**-2.0)[0, 1], abs=0.02) and s_n > s_e
    none = law.curve(norms, 0.003, s_e, [0.0]).iloc[0]  # n d, and d = 1 / n²: it grows with d
    assert none["r"] > 0.95


def test_the_released_schedule_decays_as_the_product_of_its_steps():
    steps, peak = 1000, 1e-2
    rates = peak * np.concatenate([np.linspace(0, 1, 100, endpoint=False), np.linspace(1, 0, 900)])
    assert law.decayed(peak, 0.01, steps) == pytest.approx(1 - np.prod(1 - rates * 0.01), rel=2e-3)


def test_norms_of_a_base_are_those_of_its_weights_and_the_command_prints_a_kind_a_line():
    rows = {row["module"]: row for row in norms(mini.folder())}
    model = LlamaForCausalLM.from_pretrained(mini.folder(), dtype=torch.float64)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert rows.keys() == linear.keys()
    for name, module in linear.items():
        assert rows[name]["norm"] == pytest.approx(module.weight.norm(dim=1).mean().item(), rel=1e-6)
        assert rows[name]["inputs"] == module.in_features
    told = CliRunner().invoke(app, ["probe", str(mini.folder()), "--predict"])
    assert sum(line.startswith("| ") for line in told.output.splitlines()) == 1 + 7
    assert "give the tuned models" in str(CliRunner().invoke(app, ["probe", str(mini.folder())]).exception)


def test_a_curve_of_two_layers_is_refused():
    with pytest.raises(ValueError, match="at least three layers"):
        law.curve([1.0, 2.0], 0.003, 0.1, [1.0])


def test_the_papers_axes_give_one_norm_and_the_scripts_decay(tmp_path: Path) -> None:
    from analysis.tables import law as table

    table.build(tmp_path)
    rows = pd.read_csv(tmp_path / "tables" / "law.csv")
    query = rows[rows["kind"] == "q_proj"].set_index(["method", "end"])
    assert query.loc["lora", "norm"].tolist() == pytest.approx([0.25 * 0.9 / 0.1, 0.45 * 0.84 / 0.16])
    n = (2.25 + 2.3625) / 2
    assert query.loc["ft", "needed_decay"].tolist() == pytest.approx([0.014 + 0.09 / n, 0.022 + 0.05 / n])
    products = [np.prod([1 - 1e-4 * t / 1000 * 0.01 for t in range(1000, 0, -1)] * 1) ** (20 * 4380 / 1000)]
    assert query.loc["ft", "script_decay"].tolist() == pytest.approx([1 - products[0]] * 2, rel=2e-3)
    assert query.loc["dora", "script_decay"].tolist() == pytest.approx([1 - np.exp(-0.73)] * 2)
    assert rows[rows["kind"] == "v_proj"]["needed_decay"].isna().all(), "no slope is printed for value"
