"""Tables and figures of `sign` and `sign_norms` on synthetic records: outcomes by the registered thresholds alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pandas as pd
import pytest

from analysis.figures import sign as figure
from analysis.figures import sign_small as small_figure
from analysis.tables import sign as table
from analysis.tables import sign_norms as norms_table
from analysis.tables import sign_small as small_table
from dora_lab.report import statistics
from dora_lab.spec import Spec, from_dict, spec_id, to_dict
from experiments import sign, sign_norms
from experiments._sign_norms import BASES, predicted

KINDS = ("q_proj", "k_proj", "v_proj", "up_proj")
TURNS = {0.0: 0.0, 0.005: 0.3, 0.01: 0.8, 0.025: 0.9, 0.05: 1.0}  # how much of ΔM falls where ΔD rises, by δ
Tilt = Callable[[Any, str], float]


def write(
    results: Path, specs: Iterable[Spec], cells: Mapping[str, Any], tilt: Tilt, patch: pytest.MonkeyPatch
) -> None:
    """Complete runs whose ΔM rises with ΔD over four layers (tilt 0), or falls (tilt 1), and grows with time."""

    def rows(spec: dict[str, Any], _: np.random.Generator) -> list[dict[str, Any]]:
        found, cell = [], cells[spec_id(from_dict(spec))]
        for kind in KINDS:
            w = tilt(cell, kind)
            noise_L = 0.05 * np.random.default_rng([spec["seed"], *kind.encode()]).normal(size=4)
            for fraction in spec["probe"]["fractions"]:
                time = fraction if fraction < 0.7 else 1 + 0.01 * fraction
                for layer in range(4):
                    x = 1 + 0.2 * layer
                    y = (1 - w) * x + w * (2.6 - x) + noise_L[layer]
                    module = f"model.layers.{layer}.self_attn.{kind}"
                    found.append(
                        {"step": round(64 * fraction), "fraction": fraction, "layer": layer, "kind": kind,
                         "module": module, "delta_m": 0.01 * time * y, "delta_d": 0.003 * time * x,
                         "relative_change": 0.1, "radial": -0.01, "rotation": 0.003}
                    )  # fmt: skip
        return found

    patch.setattr(conftest, "_probe_rows", rows)
    patch.setattr(conftest, "_eval_rows", lambda *_: [])
    for spec in specs:
        conftest.write_run(results, to_dict(spec))


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals by resampling layers decide nothing here."""
    monkeypatch.setattr(statistics, "REPLICATES", 50)


def as_predicted(cell: sign.Cell, kind: str) -> float:
    if cell.method == "lora" or cell.control == sign.FACTORS_ALONE:
        return 0.0
    return TURNS[cell.decay] * (0.7 if cell.control == sign.CONSTANT else 1)


def outcomes(results: Path, module: Any = table) -> pd.DataFrame:
    module.build(results)
    rows = pd.read_csv(results / "tables" / f"{module.__name__.rpartition('.')[2]}.csv", dtype={"part": str})
    return rows[rows["what"] == "prediction"]


def parts(results: Path, name: str = "sign") -> list[str]:
    text = (results / "tables" / f"{name}.md").read_text(encoding="utf-8").partition("one by one")[0]
    lines = [line.split(" | ") for line in text.splitlines() if line[:3] in {f"| {i}" for i in range(1, 6)}]
    return [line[-1].strip(" |") for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("sign")
    with pytest.MonkeyPatch.context() as patch:
        write(results, sign.confirmation(), sign.cells(), as_predicted, patch)
    return results


def test_runs_as_predicted_hold_and_what_is_no_part_of_the_design_is_left_out(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = outcomes(runs)
    still = rows[rows["statement"].str.contains("constant rate") & rows["statement"].str.contains("0.0%")]
    assert len(still) == 2 and len(rows) > 50  # as made here, no decay is the same under both schedules
    assert set(rows.drop(index=still.index)["outcome"]) == {"holds"}
    assert parts(runs)[:4] == ["holds"] * 4
    first = rows.iloc[0]
    cell = pd.read_csv(runs / "tables" / "sign.csv").query("what == 'cell' and window == 'late' and kind == 'q_proj'")
    mine = cell[(cell["method"] == "lora") & (cell["decay"] == 0) & cell["control"].isna()].iloc[0]
    assert first["value"] == pytest.approx(mine["r"], abs=1e-4) and first["low"] == pytest.approx(mine["low"], abs=1e-4)
    same = cell[(cell["method"] == "lora") & (cell["control"] == sign.SAME) & (cell["decay"] == 0.05)].iloc[0]
    assert same["delta"] == pytest.approx(1 - 0.95 ** (0.0083 / 0.0014), rel=0.01)
    assert same["ratio"] == pytest.approx(same["delta"] / same["delta_d"], rel=1e-4)
    strange = replace(sign.confirmation()[0], seed=100)
    write(runs, [strange], {spec_id(strange): sign.Cell("ft", "", 0.05)}, as_predicted, monkeypatch)
    assert outcomes(runs)["value"].tolist() == rows["value"].tolist()


def test_lora_that_turns_negative_and_full_fine_tuning_that_does_not_are_refuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tilt(cell: sign.Cell, kind: str) -> float:
        return TURNS[cell.decay] if cell.method == "lora" else 0.0

    specs = [s for s in sign.confirmation() if s.method.name in ("ft", "lora")]
    write(tmp_path, specs, sign.cells(), tilt, monkeypatch)
    rows = outcomes(tmp_path).set_index("statement")["outcome"]
    assert rows["LoRA, δ 5.0%: r of q is positive"] == "refuted"
    assert rows["LoRA, δ 0.0%: r of q is positive"] == "holds"
    assert rows["z of q falls less under LoRA than under FT, a doubling"] == "refuted"
    assert rows["FT, δ 5.0%: r of v is negative"] == "refuted"  # as the file says; at 1 % it only does not hold
    assert rows["FT, δ 1.0%: r of v is negative"] == "does not hold"
    assert parts(tmp_path)[:3] == ["refuted", "refuted", "not run"]
    assert figure.figure2(figure.of_cells(tmp_path, "sign", sign.cells())) is None, "no setting has the pattern"


def test_seeds_that_are_missing_are_told_and_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = sign.cells()
    specs = [s for s in sign.confirmation() if s.seed != 3 and cells[spec_id(s)].decay in (0.0, 0.025)]
    specs = [s for s in specs if s.seed < 2 or cells[spec_id(s)].method != "dora"]
    write(tmp_path, specs, cells, as_predicted, monkeypatch)
    rows = outcomes(tmp_path).set_index("statement")
    assert rows.loc["FT, δ 2.5%: r of q is negative", ["outcome", "agree"]].tolist() == ["7 of 8 seeds", "7/7"]
    assert rows.loc["DoRA, λ of δ 2.5%: r of q is negative", "outcome"] == "2 of 8 seeds"
    assert rows.loc["FT: z of q falls, a doubling of δ", "outcome"] == "not run"
    assert set(parts(tmp_path)[:4]) == {"not all run"} and parts(tmp_path)[4] == "7 of 8 seeds"
    assert {path.name for path in figure.build(tmp_path)} == {
        f"{name}.{ending}" for name in ("sign", "sign_figure2") for ending in ("pdf", "png", "data.csv")
    }


def test_the_figures_show_what_the_table_says(runs: Path) -> None:
    table.build(runs)
    figure.build(runs)
    drawn = pd.read_csv(runs / "figures" / "sign.data.csv")
    cells = pd.read_csv(runs / "tables" / "sign.csv").query("what == 'cell' and control != control")
    late = cells[(cells["method"] == "ft") & (cells["kind"] == "v_proj") & (cells["window"] == "late")]
    mine = drawn[(drawn["label"] == "FT") & (drawn["column"] == "value") & drawn["row"].str.contains("0.7")]
    assert sorted(mine["y"]) == pytest.approx(sorted(late["r"]), abs=1e-4)
    by_law = drawn[drawn["label"] == "FT by the law"]
    assert by_law["y"].abs().max() <= 1 and set(by_law["column"]) == {"query", "value", "key", "up"}
    again = pd.read_csv(runs / "figures" / "sign_figure2.data.csv")
    assert again["label"].iloc[0] == "FT, λ of δ 1.0%"  # the least with the pattern
    assert set(again["label"].str.partition(",")[2]) == {" λ of δ 1.0%", " no decay"}


def test_without_runs_nothing_is_written(tmp_path: Path) -> None:
    assert table.build(tmp_path) == figure.build(tmp_path) == norms_table.build(tmp_path) == []
    assert not list(tmp_path.iterdir())


def _by_law(cell: sign_norms.Cell, kind: str) -> float:
    base = BASES[cell.base]
    r = predicted(base, cell.method, kind, cell.norms, sign_norms.decay(base, cell.method, cell.ratio))[0]
    return 0.1 + 0.8 * (1 - r) / 2


def test_norms_set_by_hand_are_judged_by_what_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, cells = sign_norms.specs("mini"), sign_norms.cells()
    write(tmp_path / "law", specs, cells, _by_law, monkeypatch)
    rows = outcomes(tmp_path / "law", norms_table)
    assert set(rows["outcome"]) == {"holds"} and parts(tmp_path / "law", "sign_norms") == ["holds"] * 5
    write(tmp_path / "against", specs, cells, lambda cell, kind: 1 - _by_law(cell, kind), monkeypatch)
    rows = outcomes(tmp_path / "against", norms_table)
    assert parts(tmp_path / "against", "sign_norms") == ["refuted"] * 5
    assert rows[rows["part"] == "5"]["value"].item() == 0
    few = [spec for spec in specs if spec.seed < 5]
    write(tmp_path / "few", few, cells, _by_law, monkeypatch)
    norms_table.build(tmp_path / "few")
    assert parts(tmp_path / "few", "sign_norms") == ["5 of 8 seeds"] * 5
    text = (tmp_path / "few" / "tables" / "sign_norms.md").read_text(encoding="utf-8")
    assert "−0.83 [−0.94, −0.68]" in text  # the law's, beside r


def test_another_base_is_judged_by_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = BASES | {"mini-seed1": replace(BASES["mini"], revision="0123456789ab")}
    for module in (sign_norms, norms_table):
        monkeypatch.setattr(module, "BASES", known)
    sign_norms.cells.cache_clear()
    specs = [spec for spec in sign_norms.specs("mini") if spec.model.name == "mini-seed1"]
    write(
        tmp_path, specs, sign_norms.cells(), lambda cell, kind: _by_law(cell._replace(base="mini"), kind), monkeypatch
    )
    rows = outcomes(tmp_path, norms_table)
    sign_norms.cells.cache_clear()
    assert set(rows["base"]) == {"mini-seed1"} and set(rows["outcome"]) == {"holds"} and len(rows) == 12 + 24 + 2 + 1
    assert parts(tmp_path, "sign_norms") == ["holds"] * 5
    assert "base mini-seed1" in (tmp_path / "tables" / "sign_norms.md").read_text(encoding="utf-8")


def _as_registered(cell: sign.SmallCell, kind: str) -> float:
    """Half a tilt is r near 0; beyond it r falls with ΔD."""
    if cell.method == "lora" or cell.norms == "with":
        return 0.0
    return 1.0 if cell.norms == "against" or cell.ratio >= 2.5 else 0.0


def test_the_small_tier_is_judged_by_its_registered_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = small_table.predicted()
    assert len(ranges) == 35 and ranges["v_proj", 2.5] == (-0.14, -0.31, 0.02, -0.14)  # as the file prints them
    assert ranges["q_proj", 0.0] == (0.80, 0.66, 0.89, 0.93)
    write(tmp_path, sign.specs("small"), sign.small_cells(), _as_registered, monkeypatch)
    rows = outcomes(tmp_path, small_table).set_index("statement")
    assert (rows.loc[rows["part"] == "1", "outcome"] == "holds").all()
    by_hand = rows[rows["part"] == "3"]  # two seeds: an interval may be wide
    assert len(by_hand) == 9 and (by_hand["agree"] == "2/2").all()
    assert set(by_hand["outcome"]) <= {"holds", "undecided"}
    sure = rows.loc["FT: the predicted sign, share of cells"]  # rows are of four kinds: three of seven are not there
    assert sure["outcome"] == "not run"
    assert rows.loc["LoRA's z falls less than FT's by 0.2 or more", "outcome"] == "not run"
    assert len(small_figure.build(tmp_path)) == 6


def test_norms_that_do_nothing_refute_the_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tilts = {"against": 0.0, "with": 1.0, "found": 0.5}
    write(tmp_path, sign.specs("small"), sign.small_cells(), lambda cell, _: tilts[cell.norms], monkeypatch)
    rows = outcomes(tmp_path, small_table)
    assert (rows[rows["statement"].str.contains("with less against")]["outcome"] == "refuted").all()
