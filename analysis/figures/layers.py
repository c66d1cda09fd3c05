"""Figures 3 and 8: how far magnitude and direction have moved in each layer at the end of training: q, k and v.

One line per method: the mean over seeds, with bars from the lowest to the highest seed.
"""

from __future__ import annotations

from pathlib import Path

from analysis import probe_figures, script
from dora_lab import report

KINDS = ("q_proj", "k_proj", "v_proj")


def build(results: Path) -> list[Path]:
    """Write results/figures/layers{suffix}.{pdf,png,data.csv} per group of runs; returns the paths."""
    return probe_figures(
        results, "commonsense", "layers", report.over_layers, select=lambda rows: rows[rows["kind"].isin(KINDS)]
    )


if __name__ == "__main__":
    script(build, __doc__)
