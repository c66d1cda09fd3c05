"""What ΔM and ΔD of saved models cost: time and memory beside their floors, from results/bench/probe_speed.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import script
from dora_lab.report import Block, Provenance, number, save_table

# (cell, contender, what it is divided by, at most)
TARGETS = (
    ("pair", "ours/full", "floor/pair", 1.4),
    ("adapter", "ours/lora", "floor/product", 1.5),
    ("adapter", "ours/dora", "floor/product", 1.5),
    ("adapter", "ours/lora", "floor/base", 1.5),
    ("adapter", "ours/dora", "floor/base", 1.5),
    ("many", "ours/lora-x4", "ours/lora", 2.5),
    ("many", "ours/dora-x4", "ours/dora", 2.5),
    ("many", "ours/full-x4", "ours/full", 2.5),
)
ISNT = "the time of a whole model. One block on one core, files in memory; the model is extrapolated."
MEMORY, SHARE = 4.0, 0.02  # of the largest tensor in float32; of the time of a training
NOTES = (
    "A ratio is the median over rounds of the ratio of two calls made side by side, with its quartiles in brackets; "
    "one core, bfloat16 files in the page cache, rank 16. full: a whole tuned model; x4: four of them in one pass; in: "
    "magnitudes per input feature.",
    "floor/pair reads base and tuned, widens both and makes one sum of products; floor/base reads the base, widens it "
    "and makes one sum of squares; floor/product makes the product with LoRA's A (rank 16) as well, 32 operations a "
    "weight, without which the change of its magnitudes cannot be had.",
    "Seconds are of one decoder block of LLaMA-7B's shapes; those of the model are 32 times as many, extrapolated, not "
    "measured.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/probe_speed.{md,csv,tex}; returns their paths, none if nothing was measured."""
    file = results / "bench" / "probe_speed.jsonl"
    if not file.exists():
        return []
    rows = {row["cell"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    if not rows:
        return []
    blocks = [_targets(rows), _times(rows)]
    commits = tuple(sorted({row["code"]["commit"] or "" for row in rows.values()} - {""}))
    modified = any(row["code"]["diff"] for row in rows.values())
    source = Provenance(("probe_speed",), (), (), commits, modified, {})
    data = [
        {"cell": cell, "contender": name, "round": turn, "value": value}
        for cell, row in rows.items()
        for name, values in row["taken"].items()
        for turn, value in enumerate(values)
    ]
    title = "What the probe of saved models costs"
    return save_table(results / "tables", "probe_speed", title, blocks, pd.DataFrame(data), source, ISNT)


def _targets(rows: dict[str, Any]) -> Block:
    lines = []
    for cell, name, under, limit in TARGETS:
        line = {"What": f"{name} / {under}", "Measured": "not run", "Target": f"≤ {limit:.1f}"}
        if cell in rows:
            taken = rows[cell]["taken"]
            low, seen, high = np.quantile(np.array(taken[name]) / np.array(taken[under]), (0.25, 0.5, 0.75))
            line |= {"Measured": f"{seen:.2f} [{low:.2f}, {high:.2f}]", "Met": _met(float(seen), limit)}
        lines.append(line)
    for name, values in rows["memory"]["taken"].items() if "memory" in rows else ():
        seen = values[0] / (4 * max(math.prod(shape) for shape in rows["memory"]["shapes"].values()))
        line = {"What": f"{name}: peak memory / largest tensor in float32", "Measured": f"{seen:.2f}"}
        lines.append(
            line | ({} if name.startswith("naive") else {"Target": f"≤ {MEMORY:.1f}", "Met": _met(seen, MEMORY)})
        )
    for name, (spent, whole) in rows["callback"]["taken"].items() if "callback" in rows else ():
        line = {
            "What": f"callback, {name}: share of a mini training's time",
            "Measured": f"{100 * spent / whole:.2f} %",
        }
        lines.append(line | {"Target": f"< {100 * SHARE:.0f} %", "Met": "yes" if spent / whole < SHARE else "no"})
    cells = pd.DataFrame(lines).reindex(columns=["What", "Measured", "Target", "Met"])
    any_row = next(iter(rows.values()))
    where = f"Measured on: {any_row['machine']['processor']}, one thread; torch {any_row['packages']['torch']}."
    return Block(title="Targets", cells=cells, text=("What", "Measured", "Target", "Met"), notes=(*NOTES, where))


def _met(seen: float, limit: float) -> str:
    over = round(seen, 2) - limit
    return "yes" if over <= 0 else f"no, by {over:.2f}"


def _times(rows: dict[str, Any]) -> Block:
    lines = []
    for cell in ("pair", "adapter", "many"):
        for name, values in rows[cell]["taken"].items() if cell in rows else ():
            seen = float(np.median(values))
            whole = number(seen * rows[cell]["blocks"])
            lines.append(
                {"Cell": cell, "Contender": name, "Seconds, a block": number(seen, digits=3), "The model": whole}
            )
    columns = ["Cell", "Contender", "Seconds, a block", "The model"]
    return Block(title="Times", cells=pd.DataFrame(lines).reindex(columns=columns), text=("Cell", "Contender"))


if __name__ == "__main__":
    script(build, __doc__)
