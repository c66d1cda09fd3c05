"""ΔM and ΔD over training, for each kind of matrix: do they stop growing, and does one method move further?

One line per method: the mean over layers and seeds; the band reaches from the lowest to the highest seed.
"""

from __future__ import annotations

from pathlib import Path

from analysis import probe_figures, script
from dora_lab import report

KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def build(results: Path) -> list[Path]:
    """Write results/figures/trajectories{suffix}.{pdf,png,data.csv} per group of runs; returns the paths."""
    return probe_figures(
        results, "commonsense", "trajectories", report.over_training, select=lambda rows: rows[rows["kind"].isin(KINDS)]
    )


if __name__ == "__main__":
    script(build, __doc__)
