"""Figure 2 and 7: ΔD against ΔM for query and value under FT, LoRA and DoRA, with r, slope, and the paper's axes and r.

r and slope are computed within a seed and averaged over seeds (r by Fisher's z); the points of all seeds are drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import probe_figures, script
from dora_lab import report
from dora_lab.paper.axes import PANELS

METHODS = ("FT", "LoRA", "DoRA")
KINDS = ("q_proj", "v_proj")


def build(results: Path) -> list[Path]:
    """Write results/figures/decomposition{suffix}.{pdf,png,data.csv} per group of runs; returns the paths."""
    return probe_figures(results, "commonsense", "decomposition", draw)


def draw(probes: pd.DataFrame) -> Any:
    """The figure and its numbers for the probe rows of one group of runs; None without any of these methods."""
    labels = {*METHODS, *(label for name, label in report.standing(probes).items() if name in METHODS)}
    shown = probes[probes["label"].isin(labels) & probes["kind"].isin(KINDS)]
    return report.scatter(shown, PANELS) if len(shown) else None


if __name__ == "__main__":
    script(build, __doc__)
