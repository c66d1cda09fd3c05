"""Trainable parameters of every method on the paper's models, beside the printed percentages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import script
from dora_lab.report import Block, Provenance, number, save_table

ISNT = "a measurement of quality. Parameters alone are counted; the percentages beside them are printed ones."
NOTES = (
    "Percent of base and adapter together. equal: the printed percentage is ours, rounded; cut off: ours without its "
    "further digits; of the base: ours over the base's parameters alone, rounded; differs: none of these. Nothing is "
    "trained and no weights are loaded.",
)
COUNTED_BY = {
    "inject, meta device": "modules",  # real modules of transformers with this lab's adapters in them
    "layer shapes": "shapes",  # methods that this lab has no adapter for
}


def build(results: Path) -> list[Path]:
    """Write results/tables/parameters.{md,csv,tex}; returns their paths, none if nothing was counted."""
    file = results / "bench" / "parameters.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    blocks = [
        Block(
            title=source,
            cells=pd.DataFrame([_cells(row) for row in rows if row["source"] == source]),
            text=("Model", "Method", "Printed is", "Counted on"),
            notes=NOTES,
        )
        for source in dict.fromkeys(row["source"] for row in rows)
    ]
    commits = tuple(sorted({row["code"]["commit"] or "" for row in rows} - {""}))
    source = Provenance(("parameters",), (), (), commits, any(row["code"]["diff"] for row in rows), {})
    data = pd.DataFrame(rows).drop(columns=["code", "packages"]).astype({"rank": "Int64"})
    data["percent"] = [_percent(row) for row in rows]
    return save_table(results / "tables", "parameters", "Trainable parameters", blocks, data, source, ISNT)


def _percent(row: dict[str, Any]) -> float:
    return 100 * row["trainable"] / row["total"]


def comparison(trainable: int, total: int, printed: float) -> str:
    """How a printed percentage (two decimals) comes from ours: see the notes of the table."""
    ours = 100 * trainable / total
    if round(ours, 2) == printed:
        return "equal"
    if int(100 * ours) / 100 == printed:
        return "cut off"
    of_base = round(100 * trainable / (total - trainable), 2) == printed
    return "of the base" if of_base else f"differs: {number(ours, digits=3)}"


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Model": row["model"],
        "Method": row["method"] + (f" ({row['setting']})" if row["setting"] else ""),
        "Rank": None if row["rank"] is None else str(row["rank"]),
        "Trainable": f"{row['trainable']:,}",
        "Ours %": number(_percent(row), digits=3),
        "Printed %": number(row["printed_percent"], digits=2),
        "Printed is": comparison(row["trainable"], row["total"], row["printed_percent"]),
        "Counted on": COUNTED_BY[row["counted_by"]],
    }


if __name__ == "__main__":
    script(build, __doc__)
