"""Claims, statistics, verdicts, and the comparison of local with committed runs."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import METHODS, make_spec, write_tree
from scipy import stats

from dora_lab import paper, report
from dora_lab.report import statistics
from dora_lab.spec import SpecError

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "paper" / "reference.csv"


def table_of_verdicts(results: Path) -> pd.DataFrame:
    evals, probes = (report.frame(results, "commonsense", stream) for stream in ("eval", "probe"))
    return paper.verdicts(evals, probes, paper.claims("commonsense"))


def test_claims_hold_the_whole_of_table_1_and_the_correlations() -> None:
    rows = paper.claims("commonsense")
    table = rows[(rows["kind"] == "number") & (rows["source"] == "Table 1")]
    assert len(table) == 19 * 9 and table["value"].between(0, 100).all()
    averages = table[table["subject"] == "average"].set_index(["model", "method"])["value"]
    assert averages["LLaMA-7B", "DoRA"] == 78.4 and averages["LLaMA-7B", "LoRA"] == 74.7
    means = table[table["subject"] != "average"].groupby(["model", "method"])["value"].mean()
    assert (means - averages).abs().max() < 0.1  # the printed averages are those of the printed cells
    printed = rows[(rows["metric"] == "correlation") & (rows["kind"] == "number")].set_index("method")["value"]
    assert dict(printed) == {"FT": -0.62, "LoRA": 0.83, "DoRA": -0.31}


# rows of claims.csv by kind, at least: an experiment that is added brings its own
NUMBERS = {"number": 360, "reprint": 41, "rerun": 89, "computed": 13, "data": 24, "direction": 9}
KEY = ["source", "model", "method", "setting", "other", "rank", "subject", "metric"]


def test_claims_hold_every_number_once_with_source_and_flag() -> None:
    rows = paper.claims()
    counts = rows["kind"].value_counts()
    assert not {kind: counts[kind] for kind, least in NUMBERS.items() if counts[kind] < least}
    assert not rows[rows["kind"] != "direction"].duplicated(KEY).any()
    assert (rows["source"] != "").all() and (rows["read_from"] != "").all()
    unverified = rows[rows["verified"] == "no"]
    assert set(unverified["read_from"]) == {"memory"} and set(unverified["kind"]) == {"data"}
    assert len(unverified) == 6


def test_cells_printed_twice_agree_but_for_the_known_ones() -> None:
    """Table 15 repeats rows of table 1; tables 6 and 7 still say 78.1 where table 1 says 78.4 (facts of version 6)."""
    rows = paper.claims()
    rows = rows[(rows["kind"] == "number") & (rows["metric"] == "accuracy_percent") & rows["rank"].notna()]
    rows = rows.assign(method=rows["method"].str.removesuffix("†"))
    cells = rows[~rows["setting"].isin(["norm in graph", "m: QKVOGUD, V: QKV"])].groupby(
        ["model", "method", "rank", "subject"]
    )["value"]
    differing = {key: sorted(set(values)) for key, values in cells if len({round(v, 1) for v in values}) > 1}
    assert differing == {
        ("LLaMA-7B", "DoRA", 32.0, "average"): [78.1, 78.4],
        ("LLaMA-7B", "DoRA", 8.0, "average"): [77.9, 77.96],
    }


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"{REFERENCE} is not here: the copied numbers are not compared")
def test_claims_lose_no_number_of_the_reference() -> None:
    with REFERENCE.open(encoding="utf-8", newline="") as file:
        reference = list(csv.DictReader(file))
    rows = paper.claims()
    rows = rows[rows["kind"] != "direction"]

    def bag(triples: Iterable[tuple[object, object, object]]) -> Counter[tuple[float, str, str]]:
        return Counter((float(str(value)), str(read_from), str(verified)) for value, read_from, verified in triples)

    assert bag(zip(rows["value"], rows["read_from"], rows["verified"], strict=True)) >= bag(
        (row["value"], row["source"], row["verified"]) for row in reference
    )


def test_a_malformed_claim_is_named(tmp_path: Path) -> None:
    file = tmp_path / "claims.csv"
    text = paper.CLAIMS.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([text[0], text[1].replace("73.1", "many")]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2, field value: 'many'"):
        paper.claims(path=file)
    for wrong, message in (
        (text[1].replace("number", "guess"), "line 2, field kind: 'guess' is not one of"),
        (text[1].replace("73.1", ""), "line 2, field value: empty"),
        (text[1].removesuffix("yes") + "perhaps", "line 2, field verified: 'perhaps'"),
        (text[1] + ",more", "line 2: expected 17 fields"),
        (text[1].removesuffix(",yes"), "line 2: expected 17 fields"),
    ):
        file.write_text("\n".join([text[0], wrong]), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            paper.claims(path=file)


def test_correlation_with_one_seed_is_scipys(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(2, 16))
    expected = stats.pearsonr(x, y)
    found = statistics.correlation({0: (x, y)})
    assert found is not None
    assert found.value == pytest.approx(expected.statistic)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_a_shift_between_seeds_is_not_a_correlation(rng: np.random.Generator) -> None:
    points = {seed: (rng.normal(size=50) + 10 * seed, rng.normal(size=50) + 10 * seed) for seed in range(3)}
    found = statistics.correlation(points)
    assert found is not None and found.low is not None and found.high is not None
    assert abs(found.value) < 0.3 and found.high - found.low < 0.4
    assert statistics.correlation({0: ([1, 1, 1], [1, 2, 3])}) is None
    with pytest.raises(ValueError, match="seed 4"):
        statistics.correlation({4: ([1, 2], [1, math.nan])})


def test_verdicts_of_the_synthetic_tree(synthetic_results: Path) -> None:
    rows = table_of_verdicts(synthetic_results)
    assert set(rows["verdict"]) <= {"holds", "does not hold", "undecided", "no runs"}
    by = rows.set_index(["claim", "protocol"])
    strong = by.loc[("dora_above_lora", "generate")]
    assert strong["verdict"] == "holds" and strong["low"] > 0 and strong["test"] == "paired t over seeds and facts"
    assert strong["n"] == "3 seeds × 960 items" and strong["seeds"] == "3/3"
    one = rows.set_index("claim")
    assert (
        one.loc["lora_query_correlation", "verdict"] == "holds" and one.loc["lora_query_correlation", "paper"] == 0.83
    )
    assert pd.isna(one.loc["dora_value_correlation", "paper"])
    ranks = one.loc["dora_degrades_less"]
    assert set(ranks["verdict"]) == {"no runs"} and ranks["effect"].isna().all()


def test_without_item_records_the_test_is_over_seeds_alone(tmp_path: Path, synthetic_results: Path) -> None:
    rows = table_of_verdicts(write_tree(tmp_path, correct=False)).set_index(["claim", "protocol"])
    row = rows.loc[("dora_above_lora", "generate")]
    whole = table_of_verdicts(synthetic_results).set_index(["claim", "protocol"]).loc[("dora_above_lora", "generate")]
    assert row["effect"] == pytest.approx(whole["effect"]) and row["n"] == "3 seeds × 8 items"


def test_a_claim_can_fail(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    for seed in range(3):
        run_writer(tmp_path, make_spec("lora", 8, seed), skill=0.8)
        run_writer(tmp_path, make_spec("dora", 8, seed), skill=0.2)
    rows = table_of_verdicts(tmp_path).set_index(["claim", "protocol"])
    assert rows.loc[("dora_above_lora", "generate"), "verdict"] == "does not hold"
    assert rows.loc[("half_rank_dora_above_lora", "generate"), "verdict"] == "no runs"


def test_low_rank_degradation_is_decided_where_there_are_ranks(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    for seed in range(3):
        for name, rank, skill in (("lora", 2, 0.1), ("lora", 8, 0.7), ("dora", 2, 0.6), ("dora", 8, 0.7)):
            run_writer(tmp_path, make_spec(name, rank, seed), skill=skill)
    row = table_of_verdicts(tmp_path).set_index(["claim", "protocol"]).loc[("dora_degrades_less", "generate")]
    assert row["verdict"] == "holds" and row["effect"] < -20


def test_of_several_ranks_the_middle_one_stands_for_the_method(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    skills = {
        ("lora", 4): 0.5,
        ("lora", 8): 0.6,
        ("lora", 16): 0.9,
        ("dora", 4): 0.3,
        ("dora", 8): 0.7,
        ("dora", 16): 0.1,
    }
    for seed in range(3):
        for (name, rank), skill in skills.items():
            run_writer(tmp_path, make_spec(name, rank, seed), skill=skill)
    rows = table_of_verdicts(tmp_path).set_index(["claim", "protocol"])
    equal, half = (rows.loc[(claim, "generate")] for claim in ("dora_above_lora", "half_rank_dora_above_lora"))
    assert equal["statement"].endswith("(DoRA r=8, LoRA r=8)") and equal["effect"] > 5
    assert half["statement"].endswith("(DoRA r=4, LoRA r=8)") and half["effect"] < -5
    query = rows.xs("dora_query_correlation").iloc[0]
    assert query["statement"].endswith("(DoRA r=8)") and query["verdict"] != "no runs" and query["paper"] == -0.31


def test_no_runs_at_all_is_said(tmp_path: Path) -> None:
    rows = table_of_verdicts(tmp_path)
    assert len(rows) == 9 and set(rows["verdict"]) == {"no runs"}


def test_items_that_differ_are_not_paired(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    run_writer(tmp_path, make_spec("lora", 8, 0))
    folder = run_writer(tmp_path, make_spec("dora", 8, 0))
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    rows[0]["prompt_sha256"] = "0" * 64
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="different items"):
        table_of_verdicts(tmp_path)


def test_compare_agrees_exactly_with_itself(synthetic_results: Path) -> None:
    found = paper.compare(synthetic_results, synthetic_results)
    assert found.agrees and "10 same bytes" in found.notes[-1]


def test_compare_tells_tolerance_difference_and_absence_apart(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    write_tree(theirs, seeds=(0,))
    for name, rank, skill, trainable in METHODS.values():
        if name == "ft":
            run_writer(mine, make_spec(name, rank, 0), skill=skill, trainable=trainable, flip=1)
        elif name == "lora":
            run_writer(mine, make_spec(name, rank, 0), skill=0.1, trainable=trainable)
        elif name == "base":
            run_writer(mine, make_spec(name, rank, 0), skill=skill, trainable=trainable)
    run_writer(mine, make_spec("lora", 2, 0))
    found = paper.compare(mine, theirs)
    assert not found.agrees
    levels = {row["method"]: row["agreement"] for row in found.rows if row["protocol"] == "generate"}
    assert (levels["base"], levels["ft"]) == ("same bytes", "within the interval")
    assert (levels["lora rank 8"], levels["dora rank 8"]) == ("differs", "missing")
    assert "1 of your runs have no committed record" in found.notes[0]
    with pytest.raises(SpecError, match="nothing is no results folder"):
        paper.compare(mine, tmp_path / "nothing")


def test_compare_leaves_out_committed_runs_that_nobody_asked_for(
    tmp_path: Path, run_writer: Callable[..., Path]
) -> None:
    for root in ("mine", "theirs"):
        run_writer(tmp_path / root, make_spec("lora", 8, 0))
    run_writer(tmp_path / "theirs", make_spec("lora", 8, 0, data__name="llm_adapters"))
    found = paper.compare(tmp_path / "mine", tmp_path / "theirs")
    assert found.agrees and {row["setting"].partition("data ")[2] for row in found.rows} == {"mini"}
    run_writer(tmp_path / "mine", make_spec("dora", 8, 0, data__name="llm_adapters"))
    found = paper.compare(tmp_path / "mine", tmp_path / "theirs")
    assert {row["agreement"] for row in found.rows if row["setting"].endswith("data llm_adapters")} == {"missing"}
    assert not found.agrees
    (tmp_path / "other").mkdir()
    run_writer(tmp_path / "other", make_spec("lora", 8, 0, model__name="elsewhere"))
    found = paper.compare(tmp_path / "other", tmp_path / "theirs")
    assert not found.agrees and "is about commonsense, tier mini, model elsewhere, data mini" in found.notes[0]


def test_experiments_and_splits_do_not_mix(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    write_tree(tmp_path)
    alone = table_of_verdicts(tmp_path)
    run_writer(tmp_path, make_spec("lora", 8, 0, experiment="commonsense_sweep"), skill=0.9)
    run_writer(tmp_path, make_spec("lora", 8, 0, evaluation__split="validation"), skill=0.9)
    everything = paper.verdicts(*(report.frame(tmp_path, None, s) for s in ("eval", "probe")), paper.claims())
    pd.testing.assert_frame_equal(alone, everything)
