"""Figures 2 and 7 on the paper's architecture: ΔD against ΔM of query and value in VL-BART's self-attention.

Six layers of the encoder and six of the decoder at four checkpoints, 48 points of a seed, with and without decay, the
paper's ranges and r beside. `image_text_late`: checkpoints from 0.7 on; `image_text_early`: the paper's quarters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import script
from analysis.tables.image_text_decay import self_attention
from dora_lab import report
from dora_lab.paper.axes import PANELS
from experiments.image_text_decay import NONE, RELEASED, ROWS, Cell

CHECKPOINTS = {"late": (0.7, 0.8, 0.9, 1.0), "early": (0.25, 0.5, 0.75, 1.0)}
DECAYS = {NONE: "no decay", RELEASED: "decay as released"}


def build(results: Path) -> list[Path]:
    """Write results/figures/image_text_{late,early}.{pdf,png,data.csv}; returns the paths, none without runs."""
    probes = self_attention(results)
    paths: list[Path] = []
    for name, fractions in CHECKPOINTS.items():
        mine = probes[probes["fraction"].isin(fractions)] if len(probes) else probes
        if len(mine):
            figure, data = draw(mine)
            source = report.provenance(mine, probes.attrs["statuses"])
            paths += report.save_figure(figure, results / "figures", f"image_text_{name}", source, data)
    return paths


def draw(probes: pd.DataFrame) -> Any:
    """The figure and its numbers: a panel for each method, decay and kind of matrix."""
    parts = [
        probes[probes["cell"] == Cell(row, decay)].assign(label=f"{row.partition(',')[0]}, {said}")
        for decay, said in DECAYS.items()
        for row in ROWS
    ]
    # without method and rank, by which a figure orders its labels
    shown = pd.concat([part for part in parts if len(part)]).drop(columns=["method", "rank"])
    first = int(shown["layer"].max()) + 1  # both halves count their layers from 0
    shown["layer"] += first * shown["module"].str.contains(".decoder.", regex=False)
    last = int(shown["layer"].max()) + 1
    return report.scatter(shown, PANELS, columns=len(ROWS), layers=f"{first + 1} to {last}: the decoder's")


if __name__ == "__main__":
    script(build, __doc__)
