"""Rank robustness beside figure 5: scores and likelihoods of LoRA and DoRA over ranks, and the paper's accuracies."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, script
from dora_lab import paper, report
from dora_lab.report import statistics

METHODS = ("lora", "dora")
LOSS, ACCURACY, PRINTED = "choice NLL, mini2", "accuracy, %, mini2", "accuracy, %, LLaMA-7B (the paper)"
NOTE = (
    "mini2: mean over seeds, 95 % interval (t over seeds), each cell at its own rate; the paper: single runs (table 15)"
)


def build(results: Path) -> list[Path]:
    """Write results/figures/ranks.{pdf,png,data.csv}; returns the paths, none before two ranks of a method have run."""
    evals = frame(results)
    mine = evals[evals["experiment"].isin(("commonsense", "ranks")) & (evals["split"] == "test")]
    mine = mine[(mine["data"] == "mini2") & mine["method"].isin(METHODS) & mine["choice_nll"].notna()]
    if mine["rank"].nunique() < 2:
        return []
    rows = pd.concat([ours(mine), theirs()])
    ticks = {name: {rank: f"{rank:g}" for rank in sorted(part["x"].unique())} for name, part in rows.groupby("column")}
    limits = {name: _around(part) for name, part in rows.groupby("column")}
    figure, numbers = report.lines(rows, "rank", NOTE, ticks=ticks, limits=limits, doublings=True, dodge=0.1)
    source = report.provenance(mine, evals.attrs["statuses"])
    return report.save_figure(figure, results / "figures", "ranks", source, numbers)


def ours(mine: pd.DataFrame) -> pd.DataFrame:
    """The rows of `report.lines` of runs: averages over tasks, mean over seeds and its interval."""
    rows = []
    for (method, rank), cell in mine.groupby(["method", "rank"]):
        for column, name, scale in ((LOSS, "choice_nll", 1), (ACCURACY, "value", 100)):
            values = (scale * cell.groupby("seed")[name].mean()).tolist()
            rows.append((column, report.METHODS[method].label, int(rank), *statistics.mean_interval(values)))
    return report.line_rows(sorted(rows, key=lambda row: (row[0] == ACCURACY, str(row[1]) == "DoRA")))


def theirs() -> pd.DataFrame:
    """The rows of the paper's averages over ranks, on LLaMA-7B."""
    printed = paper.claims("commonsense")
    known = printed[(printed["source"] == "Table 15") & (printed["subject"] == "average")]
    return report.line_rows([(PRINTED, row.method, int(row.rank), row.value, None, None) for row in known.itertuples()])


def _around(part: pd.DataFrame) -> tuple[float, float]:
    """Ends of an axis a little beyond values and intervals."""
    low, high = part[["y", "low"]].min().min(), part[["y", "high"]].max().max()
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


if __name__ == "__main__":
    script(build, __doc__)
