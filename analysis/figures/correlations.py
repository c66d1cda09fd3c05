"""The correlation of ΔD with ΔM for each kind of matrix, and on both axes, with intervals of two kinds.

`correlations` reads `commonsense`: pooled over layers and checkpoints as the paper does, between layers within each
checkpoint, and of the changes from one checkpoint to the next. `axes` reads the middle of `decomposition`, which
records one magnitude per output feature (the paper's) and one per input feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from analysis import probe_figures, script
from dora_lab import report
from dora_lab.paper import claims
from dora_lab.report import correlations

METHODS = ("FT", "LoRA", "DoRA")
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
AXES = {"out": "one magnitude per output feature (the paper's)", "in": "one magnitude per input feature"}


def build(results: Path) -> list[Path]:
    """Write results/figures/correlations{suffix} and axes{suffix} (.pdf, .png), a pair per group; returns the paths."""
    paper = claims("commonsense")
    by_view = [[("out", "pooled"), ("out", "between layers"), ("out", "changes")]]
    by_axis = [[(axis, view) for axis in AXES] for view in ("pooled", "between layers")]
    return [
        *probe_figures(results, "commonsense", "correlations", lambda rows: draw(rows, by_view, paper)),
        *probe_figures(
            results, "decomposition", "axes", lambda rows: draw(rows, by_axis, paper), select=correlations.middle
        ),
    ]


def draw(probes: pd.DataFrame, panels: Sequence[Sequence[tuple[str, str]]], paper: pd.DataFrame) -> Any:
    """A figure with a panel for each (axis, view) of the rows of `panels`."""
    figure, axes = report.new_figure(len(panels), len(panels[0]), width=10.5, height=2.9 * len(panels) + 0.4)
    both = len({axis for row in panels for axis, _ in row}) > 1
    for i, row in enumerate(panels):
        for j, (side, view) in enumerate(row):
            panel = axes[i, j]
            _panel(panel, probes, side, view, paper)
            panel.set_title(f"{view}: {AXES[side]}" if both else view, fontsize=9)
        axes[i, 0].set_ylabel("Pearson's r of ΔD and ΔM")
    seeds = probes["seed"].nunique()
    looks = {label: report.style(label) for label in METHODS}
    handles = [Line2D([], [], color=s.colour, marker=s.marker, ls="", label=label) for label, s in looks.items()]
    handles += [
        Line2D([], [], color="#555555", lw=3, label="95 %, points independent (Fisher)"),
        Line2D([], [], color="#555555", lw=1, label="95 %, layers and seeds resampled"),
        Line2D([], [], color="#555555", marker="*", mfc="none", ms=9, ls="", label="the paper (VL-BART, query)"),
    ]
    title = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, title=title, fontsize=8)
    return figure


def _panel(panel: Any, probes: pd.DataFrame, side: str, view: str, paper: pd.DataFrame) -> None:
    printed = paper[(paper["metric"] == "correlation") & (paper["kind"] == "number")]
    for k, label in enumerate(METHODS):
        look, rows = report.style(label), probes[probes["label"] == label]
        for at, kind in enumerate(KINDS):
            x = at + 0.22 * (k - 1)
            found = correlations.correlate(rows, kind, side, view)
            if found is not None:
                if found.resampled is not None:
                    panel.plot([x, x], found.resampled, color=look.colour, lw=1, solid_capstyle="butt")
                if found.low is not None and found.high is not None:
                    panel.plot([x, x], [found.low, found.high], color=look.colour, lw=3.2, alpha=0.55)
                panel.plot(x, found.value, color=look.colour, marker=look.marker, ms=5, mec="white", mew=0.5)
            theirs = printed[(printed["method"] == label) & (printed["subject"] == report.KINDS[kind])]["value"]
            if len(theirs) and (side, view) == ("out", "pooled"):
                panel.plot(x, theirs.iloc[0], color=look.colour, marker="*", mfc="none", ms=9, ls="")
    panel.axhline(0, color="#555555", lw=0.8)
    panel.set_ylim(-1.05, 1.05)
    panel.set_xticks(range(len(KINDS)), [report.KINDS[kind] for kind in KINDS])
    panel.grid(axis="x", visible=False)


if __name__ == "__main__":
    script(build, __doc__)
