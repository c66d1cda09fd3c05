"""Adapters on many architectures and odd layers beside PEFT: right, refused, wrong; from results/bench/matrix.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import script
from dora_lab.report import Block, Provenance, save_table

TITLE = "Adapters on many architectures and odd layers"
ISNT = "a test of trained models: tiny random ones, on a processor."
NOTES = (
    "A cell is one check (the start, output, gradients, files both ways, merging and taking apart, the callback; "
    "of transformers' models the probe of adapter and model, and export) of LoRA or DoRA on one kind of layer, in "
    "float64 beside PEFT to 1e-9 (what was written and read, 1e-6; measures, 1e-5). Refused: by a line that says why. "
    "Cells in which PEFT itself has no answer are not counted.",
)
HEADS = {"right": "Right", "refused": "Refused", "wrong": "Wrong", "traceback": "Traceback"}


def build(results: Path) -> list[Path]:
    """Write results/tables/matrix.{md,csv,tex}; returns their paths, none if `make matrix` was never run."""
    file = results / "bench" / "matrix.jsonl"
    if not file.exists():
        return []
    about, *rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    whole = [row for row in rows if not _why(row)]
    cells = [_cells(row["base"], [row], _why(row)) for row in rows if _why(row)]
    names = ", ".join(row["base"] for row in whole)
    if whole:
        cells.append(_cells(f"{len(whole)} others", whole, None))
    beside = f"Beside {', '.join(f'{name} {version}' for name, version in about['packages'].items())}."
    notes = (*NOTES, beside, f"The others: {names}." if whole else "None was wholly right.")
    block = Block(title="Cells", cells=pd.DataFrame(cells), text=("Base", "Because"), notes=notes)
    code = about["code"]
    source = Provenance(("tests/matrix.py",), (), (), (code["commit"] or "",), bool(code["diff"]), {})
    data = pd.DataFrame([{"base": row["base"]} | {how: row.get(how, 0) for how in HEADS} for row in rows])
    return save_table(results / "tables", "matrix", TITLE, [block], data, source, ISNT)


def _why(row: dict[str, Any]) -> str:
    return "; ".join(why for how in HEADS for why in row.get(f"{how} because", ()))


def _cells(name: str, rows: list[dict[str, Any]], why: str | None) -> dict[str, Any]:
    counts = {head: str(sum(row.get(how, 0) for row in rows)) for how, head in HEADS.items()}
    return {"Base": name, **counts, "Because": why}


if __name__ == "__main__":
    script(build, __doc__)
