"""What training costs on pretraining text: cells, pairs at equal learning, and the committed records read by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.figures.forgetting import points
from analysis.figures.learning_rates import curves
from analysis.tables import forgetting as table
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import survey

RESULTS = Path(__file__).resolve().parents[1] / "results"


def made(effect: float = 0.5, slope: float = 2.0) -> pd.DataFrame:
    """LoRA and DoRA: forgetting is slope x log task NLL, DoRA's `effect` more; DoRA learns more; a seed of FT."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(6):
        shared = rng.normal(0, 0.05)
        for method, lead in (("lora", 0.0), ("dora", -0.1)):
            log_task = -0.4 + shared + lead + rng.normal(0, 0.02)
            forgot = 3 + slope * log_task + effect * (method == "dora")
            about = {
                "experiment": "commonsense",
                "setting": "",
                "method": method,
                "rank": 8,
                "optim.learning_rate": 0.008,
            }
            scored = {"task": np.exp(log_task), "text_nll.after": 0.7 + forgot, "forgetting": forgot}
            rows.append(about | scored | {"seed": seed})
    rows.append(rows[0] | {"method": "ft", "rank": None, "forgetting": 9.0})
    return pd.DataFrame(rows).astype({"rank": "Int64"})


def test_methods_are_compared_where_they_learnt_as_much() -> None:
    runs = made()
    found = {
        row["at"]: row for row in table.compared(runs) if (row["first"], row["second"]) == ("DoRA r=8", "LoRA r=8")
    }
    assert found["equal task NLL"]["difference"] == pytest.approx(0.5, abs=1e-9)
    dora, lora = (runs[runs["method"] == name].set_index("seed")["forgetting"] for name in ("dora", "lora"))
    oracle = stats.ttest_rel(dora, lora)
    assert found["as it is"]["p"] == pytest.approx(oracle.pvalue)
    assert found["as it is"]["low"] == pytest.approx(oracle.confidence_interval().low)
    assert {(row["first"], row["second"]) for row in table.compared(runs)} == {("DoRA r=8", "LoRA r=8")}, "FT: one seed"


def test_multiples_of_a_rate_are_no_runs_of_a_cell() -> None:
    runs = made()
    high = runs.assign(experiment="stability", forgetting=99.0)
    assert table.compared(pd.concat([runs, high])) == table.compared(runs)


def test_cells_stand_in_the_order_of_methods() -> None:
    cells = table.of_cells(made())
    assert [row["method"] for row in cells] == ["ft", "lora", "dora"] and [row["seeds"] for row in cells] == [1, 6, 6]
    assert cells[0]["forgetting"] == 9.0 and cells[0]["forgetting_sd"] is None and cells[0]["rank"] is None


def test_committed_records_read_by_hand() -> None:
    runs = table.measured(RESULTS).set_index("spec_id")
    path, record = next(
        (path, record) for path, record in survey(RESULTS, "commonsense").runs
        if record["spec"]["method"]["name"] == "dora" and record.get("text_nll") and record["spec"]["seed"] == 1
    )  # fmt: skip
    rows = [row for row in read_rows(path, "eval") if row["metric"] == "accuracy"]
    mine = runs.loc[record["spec_id"]]
    assert len(rows) == 8 and mine["task"] == pytest.approx(sum(row["choice_nll"] for row in rows) / 8)
    assert mine["forgetting"] == pytest.approx(record["text_nll"]["after"] - record["text_nll"]["before"])


def test_a_panel_for_each_rank_with_full_fine_tuning_in_it() -> None:
    rows = points(pd.concat([made(), made().query("method != 'ft'").assign(rank=4)]).astype({"rank": "Int64"}))
    assert rows.groupby("column")["label"].unique().map(set).to_dict() == {
        "rank 4": {"FT", "LoRA", "DoRA"}, "rank 8": {"FT", "LoRA", "DoRA"}
    }  # fmt: skip


def test_a_rate_at_which_a_seed_failed_has_dots_and_no_mean() -> None:
    rows = [{"method": "lora", "rank": 8, "optim.learning_rate": rate, "seed": seed, "loss": rate * 10 + seed,
             "method.alpha": None, "nll": "choice"}
            for rate, seeds in ((0.01, 3), (0.02, 2)) for seed in range(seeds)]  # fmt: skip
    found = curves(pd.DataFrame(rows)).set_index("x")
    assert set(found["row"]) == {"choice NLL, nats, mean over tasks"}
    assert found.loc[0.01, "y"] == pytest.approx(1.1) and found.loc[0.01, "dots"] == pytest.approx([0.1, 1.1, 2.1])
    assert np.isnan(found.loc[0.02, "y"]) and len(found.loc[0.02, "dots"]) == 2


def test_two_scales_of_a_rank_are_two_lines() -> None:
    rows = [{"method": "lora", "rank": 16, "optim.learning_rate": rate, "seed": 0, "loss": alpha, "method.alpha": alpha,
             "nll": "answer"} for rate in (0.01, 0.02) for alpha in (4.0, 16.0)]  # fmt: skip
    found = curves(pd.DataFrame(rows))
    assert {label: set(part["y"]) for label, part in found.groupby("label")} == {
        "LoRA r=16, α 4": {4.0}, "LoRA r=16, α 16": {16.0}
    }  # fmt: skip
    assert set(found["row"]) == {"answer NLL, nats, mean over tasks"}


def test_runs_of_other_items_or_another_experiment_are_rows_of_their_own() -> None:
    assert table._setting("samples", 1024, 0.2) == "1,024 items, 20% of labels drawn anew"
    assert table._setting("samples", 64, 0.0) == "64 items" and table._setting("detach", 2048, 0.0) == "detach"
    assert {table._setting(name, 2048, 0.0) for name in table.PLAIN} == {""}
    found = table.of_cells(pd.concat([made(), made().assign(setting="detach", forgetting=50.0)]))
    assert len({(row["method"], row["setting"]) for row in found}) == len(found) == 2 * len(table.of_cells(made()))
