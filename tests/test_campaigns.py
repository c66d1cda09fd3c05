"""Tables and figures of ranks, samples, stability, capacity and merging, on runs whose right answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.figures import capacity as capacity_figure
from analysis.figures import ranks as ranks_figure
from analysis.figures import samples as samples_figure
from analysis.figures import stability as stability_figure
from analysis.tables import capacity as capacity_table
from analysis.tables import merge as merge_table
from analysis.tables import stability as table
from dora_lab.formats.live import save_trained
from dora_lab.methods.inject import inject
from dora_lab.models.base import model_and_tokenizer
from experiments import capacity, commonsense
from experiments import merge as merging


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


def test_failures_are_drawn_in_percent_beside_the_likelihood() -> None:
    found = stability_figure.over_times(table.measured(runs_above({"lora": 3, "dora": 4})))
    drawn = found.set_index(["column", "label", "x"])["y"]
    for label, first in (("LoRA", 3), ("DoRA", 4)):
        shares = [drawn[stability_figure.FAILED, label, 2.0**k] for k in range(6)]
        assert shares == [100.0 * (k >= first) for k in range(6)]
    assert list(found["column"].unique()) == [stability_figure.LOSS, stability_figure.FAILED]


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


def test_a_merged_adapter_is_measured_against_itself(tmp_path: Path) -> None:
    """A real adapter of random weights: float32 changes no answer, int8 has no form beside the base."""
    whole = commonsense.at_its_rate("dora", 8, 0)
    spec = replace(whole, data=replace(whole.data, tasks=("boolq", "piqa")))
    model, _ = model_and_tokenizer(spec)
    inject(model, spec.method, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    save_trained(model, tmp_path / "adapter", spec.model.name)
    rows = {(row["type"], row["form"]): row for row in merging.differences(spec, tmp_path, items=2)}
    assert {form for dtype, form in rows if dtype == "int8"} == {"merged"} and len(rows) == 7
    for form in ("adapted", "merged"):
        exact = rows["float32", form]
        assert exact["items"] == 4 and exact["flips"] == 0 and exact["largest"] < 1e-4 * exact["spread"]
        assert rows["bfloat16", form]["largest"] > 10 * exact["largest"]
    latencies = list(merging.latencies(spec, tmp_path, rounds=2))
    forms = {(row["form"], row["prompts"]) for row in latencies}
    assert forms == {("adapted", 1), ("adapted", 32), ("merged", 1), ("merged", 32)}
    assert all(len(row["ratios"]) == 2 and min(row["ratios"]) > 0 for row in latencies)


def test_merging_without_its_runs_says_how_to_make_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        merging.main(["--results", str(tmp_path)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "lora rank 8, dora rank 8" in said and "dora-lab reproduce commonsense" in said


def row(ratios: list[float]) -> dict[str, Any]:
    about = {"what": "latency", "method": "dora", "rank": 8, "run": "abc", "form": "merged", "prompts": 1, "tokens": 64}
    return about | {"ratios": ratios}


def test_a_latency_is_judged_by_the_margin() -> None:
    rng = np.random.default_rng(0)
    near, far, loose = (1 + shift + rng.normal(0, sd, 200) for shift, sd in ((0.001, 0.01), (0.3, 0.01), (0.0, 0.5)))
    assert merge_table.latency(row(list(near)))["verdict"] == "equivalent"
    slower = merge_table.latency(row(list(far)))
    assert slower["verdict"] == "slower" and slower["percent"] == pytest.approx(30, abs=0.3)
    assert slower["low"] < slower["percent"] < slower["high"] < 31
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


def stored(method: str, rank: int | None, seed: int, nll: float, rate: float = 0.01) -> list[dict[str, Any]]:
    """Rows of a run that was asked its own 40 + 20 random labels, of 2 and 4 options."""
    common = {"method": method, "rank": rank, "seed": seed, "optim.learning_rate": rate, "split": "train",
              "spec_id": f"{method}{rank}{seed}{rate}", "choice_nll": nll}  # fmt: skip
    return [common | {"n": 40, "chance": 0.5, "value": 0.8}, common | {"n": 20, "chance": 0.25, "value": 0.5}]


def test_bits_are_what_an_item_could_say_less_what_is_left_unknown() -> None:
    runs = capacity_table.bits(pd.DataFrame(stored("ft", None, 0, 0.0) + stored("lora", 8, 0, np.log(2))))
    found = runs.set_index("method")
    assert found["of"].tolist() == [80, 80] and found.loc["ft", "bits"] == pytest.approx(80)
    assert found.loc["lora", "bits"] == pytest.approx(20) and found.loc["lora", "correct"] == pytest.approx(42)


def test_what_is_stored_is_drawn_over_ranks_and_per_parameter() -> None:
    sizes = {("ft", None): 1000, ("lora", 1): 100, ("lora", 2): 200}
    rows = [{"method": method, "rank": rank, "bits": 50.0 + seed, "of": 80.0, "params.trainable": size}
            for (method, rank), size in sizes.items() for seed in range(3)]  # fmt: skip
    drawn = capacity_figure.over_ranks(pd.DataFrame(rows)).set_index(["column", "label", "x"])["y"]
    assert drawn[capacity_figure.STORED, "LoRA", 2] == pytest.approx(51)
    assert drawn[capacity_figure.EACH, "LoRA", 2] == pytest.approx(255)
    for x in capacity.RANKS:
        assert drawn[capacity_figure.EACH, "FT", x] == pytest.approx(51)
        assert drawn[capacity_figure.STORED, "all", x] == 80


@pytest.mark.parametrize(
    ("dora", "verdict"), [(1.3, "holds"), (0.7, "does not hold"), (0.98, "equivalent"), (1.12, "undecided")]
)
def test_what_dora_stores_beside_lora_is_judged_over_seeds(dora: float, verdict: str) -> None:
    noise = np.array([0.2, -0.1, 0.1, -0.2, 0.0]) if verdict == "undecided" else 0.01 * np.arange(5)
    rows = [
        {"method": method, "rank": rank, "seed": seed, "bits": 10 * rank * (1 if method == "lora" else dora + extra)}
        for rank in capacity.RANKS for method in ("lora", "dora") for seed, extra in enumerate(noise)
    ]  # fmt: skip
    found = capacity_table.pair(pd.DataFrame(rows))
    assert found is not None and found["verdict"] == verdict
    assert found["value"] == pytest.approx(100 * (dora - 1 + noise.mean()))
    few = capacity_table.pair(pd.DataFrame([row for row in rows if row["seed"] < 2]))
    assert few is not None and few["verdict"] == "2 of 5"


def test_capacity_asks_training_items_whose_labels_are_all_random() -> None:
    specs = capacity.sweep()
    assert len(specs) == 39 and {spec.seed for spec in specs} == {100}
    assert all(spec.evaluation.split == "train" and spec.data.label_noise == 1 for spec in specs)
    rates = {(spec.method.name, spec.method.rank): [] for spec in specs}
    for spec in specs:
        assert spec.optim is not None
        rates[spec.method.name, spec.method.rank].append(spec.optim.learning_rate)
    assert rates["ft", None] == [0.0007, 0.0014, 0.0028] and rates["lora", 1] == rates["lora", 2]
