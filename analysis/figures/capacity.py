"""Learning capacity: bits of random labels that LoRA and DoRA store over ranks, and full fine-tuning beside."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, script
from analysis.tables import capacity as table
from dora_lab import report
from dora_lab.report import statistics
from experiments import capacity

STORED, EACH = "bits stored", "bits per 1,000 trainable parameters"
METHODS = ("ft", "lora", "dora")
NOTE = "mean over seeds, 95 % interval (t over seeds); dotted: all that the labels hold; FT has no rank"


def build(results: Path) -> list[Path]:
    """Write results/figures/capacity.{pdf,png,data.csv}; returns the paths, none before runs at the chosen rates."""
    evals = frame(results, "capacity")
    runs = table.measured(results, evals)
    runs = runs[runs["seed"] != capacity.SWEEP_SEED] if len(runs) else runs
    if not len(runs):
        return []
    rows = over_ranks(runs)
    ticks = {name: {rank: f"{rank}" for rank in capacity.RANKS} for name in (STORED, EACH)}
    figure, numbers = report.lines(
        rows, "rank", NOTE, ticks=ticks, limits={name: _from_zero(rows, name) for name in (STORED, EACH)},
        doublings=True, dodge=0.1, bare=("all",),
    )  # fmt: skip
    source = report.provenance(evals[evals["spec_id"].isin(runs["spec_id"])], evals.attrs["statuses"])
    return report.save_figure(figure, results / "figures", "capacity", source, numbers)


def over_ranks(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `report.lines`: what has no rank lies flat over all of them."""
    rows = []
    for column in (STORED, EACH):
        for method in METHODS:
            for rank, part in runs[runs["method"] == method].groupby("rank", dropna=False):
                per = 1 if column == STORED else 1000 / part["params.trainable"].iloc[0]
                found = statistics.mean_interval((per * part["bits"]).tolist())
                for x in capacity.RANKS if pd.isna(rank) else (rank,):
                    rows.append((column, report.METHODS[method].label, x, *found))
        if column == STORED:
            rows += [(column, "all", x, runs["of"].mean(), None, None) for x in capacity.RANKS]
    return report.line_rows(rows)


def _from_zero(rows: pd.DataFrame, column: str) -> tuple[float, float]:
    return 0.0, 1.05 * rows.loc[rows["column"] == column, ["y", "high"]].max().max()


if __name__ == "__main__":
    script(build, __doc__)
