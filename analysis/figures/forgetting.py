"""Learning and forgetting: each run's choice NLL on the tasks beside what it cost on held-out pretraining text."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, script
from analysis.tables.forgetting import measured
from dora_lab import report

NOTE = "A point: a run, at the rate its sweep chose; full fine-tuning in every panel. Lower and further left is better."
X = "choice NLL, test items"
Y = "forgetting\n(nats per token of text)"


def build(results: Path) -> list[Path]:
    """Write results/figures/forgetting_<tier>_<data>.{pdf,png,data.csv} per data; returns the paths."""
    runs = measured(results)
    paths: list[Path] = []
    if not len(runs):
        return paths
    statuses = frame(results).attrs["statuses"]
    trained = runs[runs["experiment"].isin(("commonsense", "ranks")) & (runs["method"] != "base")]
    for (tier, data), part in trained.groupby(["tier", "data"]):
        rows = points(part)
        limits = (0.0, 1.05 * rows["y"].max())
        figure, numbers = report.lines(rows, X, NOTE, limits=limits, joined=False)
        source = report.provenance(part, statuses)
        paths += report.save_figure(figure, results / "figures", f"forgetting_{tier}_{data}", source, numbers)
    return paths


def points(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `report.lines`: a panel for each rank, a label for each method, a point for each run."""
    order = list(report.METHODS).index
    runs = runs.assign(place=runs["method"].map(order)).sort_values(["place", "seed"])
    panels = [
        runs[runs["rank"].isna() | (runs["rank"] == rank)].assign(column=f"rank {rank}")
        for rank in sorted(runs["rank"].dropna().unique())
    ] or [runs.assign(column="")]
    found = pd.concat(panels)
    return pd.DataFrame(
        {
            "row": Y, "column": found["column"], "label": [report.METHODS[name].label for name in found["method"]],
            "x": found["task"], "y": found["forgetting"], "low": None, "high": None, "seed": found["seed"],
        }
    ).astype({"low": float, "high": float})  # fmt: skip


if __name__ == "__main__":
    script(build, __doc__)
