"""Does a method's correlation of ΔD with ΔM depend on learning rate, rank, scale or training length?

The grid of `decomposition`: one factor at a time around the settings of `commonsense`. Upper panels pool layers and
checkpoints as the paper does, lower ones compare layers within a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import probe_figures, script
from dora_lab import report
from dora_lab.report import correlations

KINDS = ("q_proj", "v_proj")
VIEWS = ("pooled", "between layers")


def build(results: Path) -> list[Path]:
    """Write results/figures/why{suffix}.{pdf,png}, one pair per group of runs; returns the paths."""
    return probe_figures(results, "decomposition", "why", draw)


def draw(probes: pd.DataFrame) -> Any:
    """The figure of one grid, None if it is none: a row per view and kind, a column per factor, a line per method."""
    settings = list(correlations.around_the_middle(probes))
    if not settings:
        return None
    factors = [name for name in correlations.FACTORS if any(name == setting[1] for setting in settings)]
    labels = list(dict.fromkeys(setting[0] for setting in settings))
    rows = [(view, kind) for view in VIEWS for kind in KINDS]
    figure, axes = report.new_figure(len(rows), len(factors), width=10.5, height=9.0)
    for i, (view, kind) in enumerate(rows):
        for j, factor in enumerate(factors):
            panel = axes[i, j]
            for k, label in enumerate(labels):
                mine = [s for s in settings if s[:2] == (label, factor)]
                _line(panel, mine, kind, view, label, 2 ** (0.12 * (k - (len(labels) - 1) / 2)))
            _levels(panel, [s for s in settings if s[1] == factor])
            panel.axhline(0, color="#555555", lw=0.8)
            panel.set_ylim(-1.08, 1.08)
            if i == 0:
                panel.set_title(factor)
            if i < len(rows) - 1:
                panel.set_xticklabels([])
        axes[i, 0].set_ylabel(f"{report.KINDS[kind]}, {view}\nr of ΔD and ΔM")
    found = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
    seeds = sorted({setting[4]["seed"].nunique() for setting in settings})
    figure.legend(
        handles=list(found.values()),
        loc="outside lower center",
        ncols=len(found),
        frameon=False,
        title=f"mean of {'/'.join(map(str, seeds))} seeds; small dots: each seed; bars: 95 % interval (Fisher)",
    )
    return figure


def _line(panel: Any, settings: list[Any], kind: str, view: str, label: str, shift: float) -> None:
    look = report.style(label)
    points = []
    for _, _, level, middle, rows in settings:
        found = correlations.correlate(rows, kind, "out", view)
        if found is not None:
            x = level / middle * shift
            points.append((x, found.value))
            panel.plot([x] * len(found.per_seed), found.per_seed, ls="", marker=".", ms=3, color=look.colour, alpha=0.5)
            if found.low is not None and found.high is not None:
                panel.plot([x, x], [found.low, found.high], color=look.colour, lw=2.4, alpha=0.45)
    if points:
        x, r = zip(*points, strict=True)
        panel.plot(x, r, label=label, color=look.colour, marker=look.marker, ls=look.line, ms=5, lw=1)


def _levels(panel: Any, settings: list[Any]) -> None:
    """Ticks in the factor's own unit where the methods share a middle, else as multiples of each method's own."""
    shared = len({middle for _, _, _, middle, _ in settings}) == 1
    ratios = {
        level / middle: f"{level:g}" if shared else f"× {level / middle:g}" for _, _, level, middle, _ in settings
    }
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(ratios), list(ratios.values()))
    panel.minorticks_off()


if __name__ == "__main__":
    script(build, __doc__)
