"""ΔM and ΔD over training, for each kind of matrix: do they stop growing, and does one method move further?

One line per method: the mean over layers and seeds; the band reaches from the lowest to the highest seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import probe_figures, script
from dora_lab import report

KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
MEASURES = {"delta_m": "ΔM: mean |m − m₀|", "delta_d": "ΔD: mean (1 − cos)"}


def build(results: Path) -> list[Path]:
    """Write results/figures/trajectories{suffix}.{pdf,png}, one pair per group of runs; returns the paths."""
    return probe_figures(results, "commonsense", "trajectories", draw)


def draw(probes: pd.DataFrame) -> Any:
    """The figure for the probe rows of one group of runs; every line begins at zero, where training does."""
    shown = probes[probes["kind"].isin(KINDS)]
    kinds = [kind for kind in KINDS if (shown["kind"] == kind).any()] or list(KINDS)
    figure, axes = report.new_figure(len(MEASURES), len(kinds), width=2.4 * len(kinds) + 1.6, height=5.0)
    for i, (measure, name) in enumerate(MEASURES.items()):
        for j, kind in enumerate(kinds):
            axis = axes[i, j]
            for label, look in report.styles(report.ordered_labels(shown)).items():
                _line(axis, shown[(shown["kind"] == kind) & (shown["label"] == label)], measure, look)
            axis.set_title(report.KINDS[kind] if i == 0 else "")
            axis.set_ylim(bottom=0)
            axis.set_xlim(0, 1.03)
            axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        axes[i, 0].set_ylabel(name)
    for axis in axes[-1]:
        axis.set_xlabel("fraction of training")
    found = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
    seeds = shown["seed"].nunique()
    title = f"mean of {seeds} seeds\nand all layers;\nband: all seeds" if seeds > 1 else "one seed,\nmean of all layers"
    figure.legend(
        handles=list(found.values()), loc="outside right center", frameon=False, alignment="left", title=title
    )
    return figure


def _line(axis: Any, rows: pd.DataFrame, measure: str, look: report.Style) -> None:
    if not len(rows):
        return
    by_seed = rows.groupby(["fraction", "seed"])[measure].mean().groupby("fraction").agg(["mean", "min", "max"])
    by_seed = pd.concat([pd.DataFrame(0.0, index=[0.0], columns=by_seed.columns), by_seed])
    axis.plot(
        by_seed.index, by_seed["mean"], label=look.label, color=look.colour, marker=look.marker, ls=look.line, ms=5
    )
    axis.fill_between(by_seed.index, by_seed["min"], by_seed["max"], color=look.colour, alpha=0.2, lw=0)


if __name__ == "__main__":
    script(build, __doc__)
