"""What can go wrong and what a user then sees: fault, times injected, survived; from results/bench/faults.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import script
from dora_lab.report import Block, Provenance, save_table

TITLE = "Faults injected, and what the user sees"
ISNT = "a proof. Harm that was thought of, done on one machine."
NOTES = (
    "Every fault is a function of tests/faults that does the harm in an empty folder, with another random choice each "
    "time, and asserts that nothing is lost or wrong in silence: a clear message, or a named recovery. Numbers are "
    "those of the list of faults in the tests; the text is the one seen most often.",
)
FUZZ = (
    "A case is an input damaged in its bytes or its fields, or made up. It is either read as it was written or refused "
    "by one of our errors; another error, a hang or another value counts as not survived.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/faults.{md,csv,tex}; returns their paths, none if there was no campaign."""
    file = results / "bench" / "faults.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    if not rows:
        return []
    faults, fuzz = ([row for row in rows if row["kind"] == kind] for kind in ("fault", "fuzz"))
    blocks = []
    if faults:
        lost = sum(row["times"] - row["survived"] for row in faults)
        times = sum(row["times"] for row in faults)
        total = f"{lost} of {times} injections {'was' if lost == 1 else 'were'} not survived."
        blocks.append(
            _block("Injected faults", "Fault", faults, ("number", "name"), (*NOTES, total, *_skipped(faults)))
        )
    if fuzz:
        lost, times = sum(row["times"] - row["survived"] for row in fuzz), sum(row["times"] for row in fuzz)
        total = f"{times} cases in all, {lost} not survived."
        blocks.append(_block("Fuzzing", "What is read", fuzz, ("name",), (*FUZZ, total)))
    commits = tuple(sorted({row["code"]["commit"] or "" for row in rows} - {""}))
    source = Provenance(("tests/faults",), (), (), commits, any(row["code"]["diff"] for row in rows), {})
    keys = ["kind", "number", "name", "times", "survived", "sees", "messages", "error", "skipped", "seconds"]
    return save_table(results / "tables", "faults", TITLE, blocks, pd.DataFrame(rows)[keys], source, ISNT)


def _block(title: str, head: str, rows: list[dict[str, Any]], keys: tuple[str, ...], notes: tuple[str, ...]) -> Block:
    heads = {"number": "No.", "name": head}
    cells = [
        {heads[key]: row[key] for key in keys}
        | {"Times": str(row["times"]), "Survived": str(row["survived"]), "The user sees": _sees(row)}
        for row in rows
    ]
    return Block(title=title, cells=pd.DataFrame(cells), text=("No.", head, "The user sees"), notes=notes)


def _sees(row: dict[str, Any]) -> str | None:
    if row["skipped"]:
        return f"not injected here: {row['skipped']}"
    if row["survived"] < row["times"]:
        return f"not survived: {row['error']}"
    return row["sees"]


def _skipped(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    count = sum(bool(row["skipped"]) for row in rows)
    return (f"{count} could not be injected on the machine of this campaign.",) if count else ()


if __name__ == "__main__":
    script(build, __doc__)
