"""The correlation of ΔD with ΔM for each kind of matrix, and on both axes, with intervals over seeds.

`correlations` reads `commonsense`: pooled over layers and checkpoints as the paper does, between layers within each
checkpoint, and of the changes from one checkpoint to the next. `axes` reads the middle of `decomposition`, which
records one magnitude per output feature (the paper's) and one per input feature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import probe_figures, script
from dora_lab import report
from dora_lab.paper.axes import PANELS
from dora_lab.report import correlations, statistics

METHODS = ("FT", "LoRA", "DoRA")
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
AXES = {"out": "one magnitude per output feature (the paper's)", "in": "one magnitude per input feature"}


def build(results: Path) -> list[Path]:
    """Write results/figures/{correlations,axes}{suffix}.{pdf,png,data.csv} per group of runs; returns the paths."""
    by_view = [("r of ΔD and ΔM", view, "out", view) for view in ("pooled", "between layers", "changes")]
    by_axis = [
        (f"r of ΔD and ΔM\n{view}", AXES[axis], axis, view) for view in ("pooled", "between layers") for axis in AXES
    ]
    return [
        *probe_figures(results, "commonsense", "correlations", lambda rows: draw(rows, by_view)),
        *probe_figures(results, "decomposition", "axes", lambda rows: draw(rows, by_axis), select=correlations.middle),
    ]


def draw(probes: pd.DataFrame, panels: list[tuple[str, str, str, str]]) -> Any:
    """The figure and its numbers, a panel for each (row, column, axis, view) of `panels`; None where nothing varies."""
    printed = {(report.METHODS[panel.method].label, panel.kind): panel.r for panel in PANELS}
    there = report.standing(probes)  # of several ranks the one that stands for the method
    found = [
        (row, column, label, at, r.value, r.low, r.high, printed.get((method, kind)) if column == "pooled" else None)
        for row, column, axis, view in panels
        for method in METHODS
        for label in (there.get(method, method),)
        for at, kind in enumerate(KINDS)
        if (estimate := correlations.correlate(probes[probes["label"] == label], kind, axis, view))
        and (r := statistics.cautious(estimate))
    ]
    data = pd.DataFrame(found, columns=pd.Index(["row", "column", "label", "x", "y", "low", "high", "paper"]))
    names = {float(at): report.KINDS[kind] for at, kind in enumerate(KINDS)}
    note = f"bars: 95 %, {correlations.how(probes)}"
    ticks = {column: names for _, column, _, _ in panels}
    return report.lines(data, "", note, ticks=ticks, limits=(-1.05, 1.05), dodge=0.22, joined=False) if found else None


if __name__ == "__main__":
    script(build, __doc__)
