"""Tables and figures of ranks, samples, stability and merging, on runs whose right answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.figures import ranks as ranks_figure
from analysis.figures import samples as samples_figure
from analysis.tables import merge as merge_table
from analysis.tables import stability as table
from experiments import commonsense


def evals(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of `report.frame`, stream eval, two tasks each."""
    common = {"tier": "mini", "data": "mini2", "split": "test", "data.label_noise": 0.0}
    made = [
        common | row | {"task": task, "spec_id": f"{i}"} for i, row in enumerate(rows) for task in ("boolq", "piqa")
    ]
    return pd.DataFrame(made).astype({"rank": "Int64"})


def runs_above(fails: dict[str, int], seeds: int = 10) -> pd.DataFrame:
    """LoRA and DoRA at 1 to 32 times their rates; from 2 ** fails[method] times on, all are above the base's 1.1."""
    rows = [{"experiment": "commonsense", "method": "base", "rank": None, "seed": 0, "optim.learning_rate": None,
             "choice_nll": 1.1}]  # fmt: skip
    for method, first in fails.items():
        for power in range(6):
            rate = commonsense.RATES[method, 8] * 2**power
            rows += [
                {"experiment": "stability" if power else "commonsense", "method": method, "rank": 8, "seed": seed,
                 "optim.learning_rate": rate, "choice_nll": 1.2 if power >= first else 0.6}
                for seed in range(seeds)
            ]  # fmt: skip
    return evals(rows)


def test_half_of_the_runs_fail_between_the_last_that_do_not_and_the_first_that_do() -> None:
    runs = table.measured(runs_above({"lora": 2, "dora": 4}))
    counts = {(row["method"], row["times"]): row["failed"] for row in table.by_times(runs)}
    assert counts["lora", 2.0] == 0 and counts["lora", 4.0] == 10 and counts["dora", 8.0] == 0
    found = {row["what"]: row for row in table.lr50(runs)}
    assert 2 < found["lora"]["value"] < 4 and 8 < found["dora"]["value"] < 16
    assert found["dora / lora, multiples"]["verdict"] == "holds"
    shift = commonsense.RATES["dora", 8] / commonsense.RATES["lora", 8]
    assert found["dora / lora, rates"]["value"] == pytest.approx(found["dora / lora, multiples"]["value"] * shift)


def test_equal_failures_are_undecided_and_few_seeds_are_counted() -> None:
    found = {row["what"]: row for row in table.lr50(table.measured(runs_above({"lora": 3, "dora": 3})))}
    assert found["dora / lora, multiples"]["verdict"] == "undecided"
    few = {row["what"]: row for row in table.lr50(table.measured(runs_above({"lora": 2, "dora": 4}, seeds=3)))}
    assert few["dora / lora, multiples"]["verdict"] == "3 of 10"


def test_the_logistic_curve_is_the_one_that_the_shares_come_from() -> None:
    times = 2.0 ** np.arange(6)
    share = 1 / (1 + np.exp(-2.0 * (np.log2(times) - 2.3)))
    assert table._half_point(times, share) == pytest.approx(2.3, abs=1e-3)


def test_a_rank_is_the_mean_of_its_seeds() -> None:
    rows = [{"experiment": "ranks", "method": method, "rank": rank, "seed": seed, "value": 0.5 + 0.1 * seed,
             "choice_nll": 1.0 + seed, "optim.learning_rate": 0.01}
            for method in ("dora", "lora") for rank in (2, 32) for seed in range(3)]  # fmt: skip
    found = ranks_figure.ours(evals(rows)).set_index(["column", "label", "x"])
    assert found.loc[(ranks_figure.LOSS, "DoRA", 2), "y"] == pytest.approx(2.0)
    assert found.loc[(ranks_figure.ACCURACY, "LoRA", 32), "y"] == pytest.approx(60.0)
    printed = ranks_figure.theirs().set_index(["label", "x"])["y"]
    assert printed["LoRA", 4] == 39.5 and printed["DoRA", 64] == pytest.approx(72.1)


def test_noise_has_a_panel_of_its_own() -> None:
    rows = [{"experiment": "samples", "method": method, "rank": rank, "seed": seed, "value": 0.5,
             "choice_nll": 1.0 + noise, "data.train_items": size, "data.label_noise": noise}
            for method, rank in (("dora", 8), ("ft", None)) for size in (64, 256) for noise in (0.0, 0.2)
            for seed in range(2)]  # fmt: skip
    found = samples_figure.curves(evals(rows))
    assert list(found["column"].unique()) == ["clean labels", "20% of labels drawn anew"]
    assert list(found["label"].unique()) == ["FT", "DoRA"]
    assert set(found[(found["column"] != "clean labels") & found["row"].str.startswith("choice")]["y"]) == {1.2}


def row(ratios: list[float]) -> dict[str, Any]:
    about = {"what": "latency", "method": "dora", "rank": 8, "run": "abc", "form": "merged", "prompts": 1, "tokens": 64}
    return about | {"ratios": ratios}


def test_a_latency_is_judged_by_the_margin() -> None:
    rng = np.random.default_rng(0)
    near, far, loose = (1 + shift + rng.normal(0, sd, 200) for shift, sd in ((0.001, 0.01), (0.3, 0.01), (0.0, 0.5)))
    assert merge_table.latency(row(list(near)))["verdict"] == "equivalent"
    slower = merge_table.latency(row(list(far)))
    assert slower["verdict"] == "slower" and slower["percent"] == pytest.approx(100 * np.log(1.3), abs=1)
    assert merge_table.latency(row(list(np.abs(loose) + 0.01)))["verdict"] == "undecided"


def test_the_table_of_merging_is_written_from_its_rows(tmp_path: Path) -> None:
    assert merge_table.build(tmp_path) == []
    about = {"torch": "2", "code": {"commit": "0" * 40, "diff": None}}
    answers = {"what": "answers", "method": "dora", "rank": 8, "run": "abc", "type": "int8", "form": "merged",
               "items": 400, "spread": 2.0, "largest": 1e-3, "flips": 3}  # fmt: skip
    (tmp_path / "bench").mkdir()
    text = "".join(json.dumps(one | about) + "\n" for one in (row([1.0, 1.01] * 100), answers))
    (tmp_path / "bench" / "merge.jsonl").write_text(text)
    page = merge_table.build(tmp_path)[0].read_text()
    assert "| DoRA r=8, merged | int8 | 5.0e-04 | 3 of 400 |" in page and "experiments/merge.py" in page
