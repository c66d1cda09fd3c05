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
from dora_lab.report import correlations, statistics

KINDS = ("q_proj", "v_proj")
VIEWS = ("pooled", "between layers")


def build(results: Path) -> list[Path]:
    """Write results/figures/why{suffix}.{pdf,png,data.csv} per group of runs; returns the paths."""
    return probe_figures(results, "decomposition", "why", draw)


def draw(probes: pd.DataFrame) -> Any:
    """The figure of one grid and its numbers, None if it is none: a row per view and kind, a column per factor."""
    order = list(correlations.FACTORS).index
    settings = sorted(correlations.around_the_middle(probes), key=lambda setting: order(setting[1]))
    found = [
        (f"{report.KINDS[kind]}, {view}\nr of ΔD and ΔM", factor, label, level / middle, r.value, r.low, r.high)
        for view in VIEWS
        for kind in KINDS
        for label, factor, level, middle, rows in settings
        if (estimate := correlations.correlate(rows, kind, "out", view)) and (r := statistics.cautious(estimate))
    ]
    if not found:
        return None
    data = pd.DataFrame(found, columns=pd.Index(["row", "column", "label", "x", "y", "low", "high"]))
    ticks = {factor: _levels([s for s in settings if s[1] == factor]) for factor in data["column"].unique()}
    note = f"bars: 95 %, {correlations.how(probes)}"
    return report.lines(data, "", note, ticks=ticks, limits=(-1.08, 1.08), dodge=0.12, doublings=True)


def _levels(settings: list[Any]) -> dict[float, str]:
    """Ticks in the factor's own unit where the methods share a middle, else as multiples of each method's own."""
    shared = len({middle for _, _, _, middle, _ in settings}) == 1
    return {level / middle: f"{level:g}" if shared else f"× {level / middle:g}" for _, _, level, middle, _ in settings}


if __name__ == "__main__":
    script(build, __doc__)
