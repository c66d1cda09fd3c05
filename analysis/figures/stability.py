"""Training above the best rate: likelihoods and failures of LoRA and DoRA over multiples of it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, script
from analysis.tables import stability
from dora_lab import report
from dora_lab.report import statistics

LOSS, FAILED = "choice NLL, nats", "runs that failed, %"
NOTE = "left: mean over seeds, 95 % interval (t over seeds); right: share of seeds worse than the untrained base"


def build(results: Path) -> list[Path]:
    """Write results/figures/stability.{pdf,png,data.csv}; returns the paths, none before runs above the best rate."""
    evals = frame(results)
    runs = stability.measured(evals)
    if not len(runs) or not (runs["times"] > 1).any():
        return []
    rows = over_times(runs)
    ticks = {name: {times: f"{times:g}" for times in sorted(runs["times"].unique())} for name in (LOSS, FAILED)}
    low, high = rows.loc[rows["column"] == LOSS, ["low", "high"]].agg({"low": "min", "high": "max"})
    limits = {LOSS: (low - 0.05, high + 0.05), FAILED: (-5.0, 105.0)}
    figure, numbers = report.lines(
        rows, "multiple of the method's best rate", NOTE, ticks=ticks, limits=limits, doublings=True, dodge=0.1
    )
    source = report.provenance(evals[evals["spec_id"].isin(runs["spec_id"])], evals.attrs["statuses"])
    return report.save_figure(figure, results / "figures", "stability", source, numbers)


def over_times(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `report.lines` of the runs that `analysis.tables.stability.measured` gives."""
    rows = []
    for method in ("lora", "dora"):
        for times, part in runs[runs["method"] == method].groupby("times"):
            label = report.METHODS[method].label
            rows.append((LOSS, label, times, *statistics.mean_interval(part["loss"].tolist())))
            rows.append((FAILED, label, times, 100 * part["failed"].mean(), None, None))
    return report.line_rows(sorted(rows, key=lambda row: row[0] == FAILED))


if __name__ == "__main__":
    script(build, __doc__)
