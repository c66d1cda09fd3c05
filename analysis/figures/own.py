"""Own models: ΔD against ΔM of every adapted kind of matrix, a figure for each plan (see analysis.tables.own)."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from analysis import script
from analysis.tables.own import load, plans
from dora_lab import report
from dora_lab.paper.axes import PANELS


def build(results: Path) -> list[Path]:
    """Write results/figures/own_<model>_<revision>_<items>{.pdf,.png,.data.csv}; returns the paths."""
    rows, paths = load(results, "probe"), []
    for _, part in plans(rows):
        shown = part[part["kind"].isin(adapted(part))]
        figure, data = report.scatter(shown if len(shown) else part, PANELS)
        first = part.iloc[0]
        name = f"own_{first['model']}_{first['model.revision']}_{first['data.train_items']:.0f}"
        source = report.provenance(part, rows.attrs["statuses"])
        paths += report.save_figure(figure, results / "figures", re.sub(r"[^\w.-]+", "-", name), source, data)
    return paths


def adapted(rows: pd.DataFrame) -> set[str]:
    """The kinds that every method of the rows has: of full fine-tuning more is probed."""
    return set.intersection(*(set(part["kind"]) for _, part in rows.groupby("method")))


if __name__ == "__main__":
    script(build, __doc__)
