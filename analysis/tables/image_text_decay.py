"""Figures 2 and 7 on the paper's architecture in numbers: r, slope, radial and rotation parts by method and decay.

Query and value of VL-BART's self-attention, encoder and decoder; runs of `image_text` and `image_text_decay`.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import cells, isnt, script
from dora_lab import report
from dora_lab.paper.axes import PANELS
from dora_lab.report import Block, number
from experiments import image_text_decay
from experiments.image_text_decay import COPIED, NONE, RELEASED, ROWS

DECAYS = {NONE: "none", RELEASED: "as released in all", COPIED: "λ = 0.01"}
CROSS = "encoder_attn"  # in the names of modules that look from the decoder at the encoder
TITLE = "ΔD and ΔM of VL-BART's self-attention, by decay"
NOTES = (
    cells.READ,
    "Points: query or value of six encoder and six decoder layers at each checkpoint. Paper: the r that it prints, its "
    "one run of each method. Decay as released in all: Σηλ of the released script, 0.044 in FT and 0.73 in LoRA and "
    "DoRA; λ = 0.01 is its number in a shorter run.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/image_text_decay.{md,csv,tex}; returns their paths, none without runs."""
    probes = self_attention(results)
    if not len(probes):
        return []
    printed = {(panel.kind, report.METHODS[panel.method].label): panel.r for panel in PANELS}
    rows = sorted(map(_named, cells.measured(probes)), key=_place)
    shown = cells.shown(rows, {"row": "Method", "decay": "Decay"})
    paper = [printed.get((row["kind"], row["row"].partition(",")[0])) for row in rows if row["window"] == "late"]
    shown.insert(3, "Paper", [number(r, digits=2) for r in paper])
    block = Block(title="tier mini, model mini_vl, data mini_vl", cells=shown, text=("Method", "Decay", "Matrix"),
                  notes=NOTES, isnt=isnt(["mini"]))  # fmt: skip
    source = report.provenance(probes, probes.attrs["statuses"])
    data = pd.DataFrame(rows).drop(columns="cell")
    return report.save_table(results / "tables", "image_text_decay", TITLE, [block], data, source)


def self_attention(results: Path) -> pd.DataFrame:
    """The probe rows of the runs of both experiments, with their `cell`, without cross-attention."""
    known = image_text_decay.cells()
    both = [cells.of_cells(results, name, known) for name in ("image_text", "image_text_decay")]
    found = pd.concat([part for part in both if len(part)]) if any(map(len, both)) else both[0]
    found = found[~found["module"].astype(str).str.contains(CROSS)]
    found.attrs = {"statuses": {name: n for part in both for name, n in part.attrs["statuses"].items()}}
    return found


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"row": row["cell"].row, "decay": DECAYS[row["cell"].decay]}


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kind"], ROWS.index(row["cell"].row), [*DECAYS].index(row["cell"].decay)


if __name__ == "__main__":
    script(build, __doc__)
