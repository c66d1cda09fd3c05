"""The pilot's table, against sums done by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
import pytest
from conftest import make_spec

from analysis.tables import pilot, rates

TASKS = ["boolq", "piqa"]
# data, method: seed -> (choice NLL of boolq, of piqa); FT lacks seed 202 on the second source
NLL = {
    ("mini", "ft"): {200: (0.5, 0.2), 201: (0.7, 0.3), 202: (0.6, 0.1)},
    ("mini", "lora"): {200: (0.4, 0.3), 201: (0.9, 0.2), 202: (0.6, 0.2)},
    ("mini2", "ft"): {200: (1.0, 0.9), 201: (1.1, 0.5)},
    ("mini2", "lora"): {200: (0.8, 0.8), 201: (1.3, 0.6), 202: (0.7, 0.7)},
}


def _write(results: Path, run_writer: Callable[..., Path], with_nll: bool) -> dict[tuple[str, str, int], list[float]]:
    """Runs of the pilot; returns the accuracies of their tasks."""
    accuracy = {}
    for (data, method), seeds in NLL.items():
        for seed, values in seeds.items():
            rank = 8 if method == "lora" else None
            changes = {"data__name": data, "data__tasks": TASKS, "evaluation__split": "validation", "probe": None}
            spec = make_spec(method, rank, seed, experiment="pilot", evaluation__protocols=["loglikelihood"], **changes)
            file = run_writer(results, spec, skill=0.4 + 0.1 * (seed - 200)) / "eval.jsonl"
            rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
            accuracy[data, method, seed] = [row["value"] for row in rows]
            if with_nll:
                rows = [row | {"choice_nll": value} for row, value in zip(rows, values, strict=True)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return accuracy


def test_levels_and_paired_differences_are_those_of_a_sum_by_hand(
    tmp_path: Path, run_writer: Callable[..., Path]
) -> None:
    accuracy = _write(tmp_path, run_writer, with_nll=True)
    csv = next(path for path in pilot.build(tmp_path) if path.suffix == ".csv")
    found = pd.read_csv(csv).set_index(["data", "label", "metric", "task"])

    for (data, method), seeds in NLL.items():
        label = {"ft": "FT", "lora": "LoRA"}[method]
        for place, task in enumerate(TASKS):
            for metric, values in (
                ("choice_nll", [seeds[seed][place] for seed in seeds]),
                ("accuracy", [100 * accuracy[data, method, seed][place] for seed in seeds]),
            ):
                row = found.loc[(data, label, metric, task)]
                assert row["mean"] == pytest.approx(mean(values), rel=1e-5)
                assert row["sd"] == pytest.approx(stdev(values), rel=1e-5) and row["seeds"] == len(values)
    for data, both in (("mini", (200, 201, 202)), ("mini2", (200, 201))):
        ft, lora = NLL[data, "ft"], NLL[data, "lora"]
        pair = "FT \N{MINUS SIGN} LoRA"
        ratios = [100 * log(mean(ft[seed]) / mean(lora[seed])) for seed in both]
        points = [100 * (mean(accuracy[data, "ft", s]) - mean(accuracy[data, "lora", s])) for s in both]
        for metric, values, margin in (("choice_nll", ratios, 5), ("accuracy", points, 1)):
            row = found.loc[(data, pair, metric, "average")]
            assert row["mean"] == pytest.approx(mean(values), rel=1e-4, abs=1e-4) and row["seeds"] == len(both)
            assert row["sd"] == pytest.approx(stdev(values), rel=1e-4, abs=1e-4)
            assert row["sd / margin"] == pytest.approx(stdev(values) / margin, rel=1e-4, abs=1e-4)


def test_what_was_not_measured_has_no_number(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    """Rows of an earlier version have no likelihoods; a run without a task has no average."""
    _write(tmp_path, run_writer, with_nll=False)
    for file in (tmp_path / "runs" / "pilot").glob("*/eval.jsonl"):
        if json.loads((file.parent / "record.json").read_text())["spec"]["seed"] == 201:
            file.write_text("".join(line for line in file.read_text().splitlines(True) if '"piqa"' not in line))
    assert pilot.build(tmp_path)
    data = pd.read_csv(tmp_path / "tables" / "pilot.csv")
    assert data.loc[data["metric"] == "choice_nll", ["mean", "sd", "sd / margin"]].isna().all(axis=None)
    averages = data[(data["task"] == "average") & (data["metric"] == "accuracy") & (data["data"] == "mini")]
    assert set(averages["seeds"]) == {2}
    text = (tmp_path / "tables" / "pilot.md").read_text(encoding="utf-8")
    assert "| FT, choice NLL, nats | – | – | 0.001 | – |" in text and "Least spread" not in text


def test_no_pilot_no_table(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    run_writer(tmp_path, make_spec("lora", 8, 200))
    assert pilot.build(tmp_path) == [] and not (tmp_path / "tables").exists()


def test_the_pilot_is_no_sweep(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    """The caption of the learning rates names the runs that they were chosen from, and no others."""
    _write(tmp_path, run_writer, with_nll=True)
    assert rates.build(tmp_path) == []
    changes = {"data__tasks": TASKS, "evaluation__split": "validation", "evaluation__protocols": ["loglikelihood"]}
    for rate in (1e-3, 2e-3):
        file = run_writer(tmp_path, make_spec("ft", None, 100, optim__learning_rate=rate, **changes)) / "eval.jsonl"
        rows = [json.loads(line) | {"choice_nll": 0.5} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = next(path for path in rates.build(tmp_path) if path.suffix == ".md").read_text(encoding="utf-8")
    assert "Experiment commonsense, tier mini, 2 complete runs" in text
