"""What a step costs: our LoRA and DoRA beside PEFT's and full fine-tuning, from results/bench/speed.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import script
from dora_lab.report import Block, Provenance, number, save_table

ISNT = "what a GPU takes (tables/gpu). One core, small layers with random weights."
NOTES = (
    "A ratio is the median over rounds of the ratio of two steps made side by side, with its quartiles in brackets; of "
    "memory, one measurement each. Tokens are those of one forward; one core; a step is forward, backward and AdamW.",
    "Floor: what DoRA has to compute over LoRA with the same base products, 1 + rank / (2 tokens accumulation): the "
    "norm needs W0 A^T once per optimiser step. It counts multiplications alone; the table, all that takes time. Of "
    "memory (float32): the gradient of m is taken from the output, and those of q, k, o and down are kept for it alone "
    "(the others are kept by the operation that follows); without them the base's product would be made twice.",
)
MISSING = "not run"


@dataclass(frozen=True)
class Target:
    """A ratio that we want to keep below a limit, in every cell that it is about."""

    over: str
    under: str
    limit: float
    where: dict[str, Any]


PLAIN = {
    "measure": "seconds", "mode": "train", "rank": 16, "dropout": 0.0, "accumulation": 1, "dtype": "float32",
}  # fmt: skip
LONG, SHORT = PLAIN | {"tokens": 512}, PLAIN | {"tokens": 128}
DROPPED = PLAIN | {"tokens": 512, "dropout": 0.05}
TARGETS = (
    Target("ours/dora", "ours/lora", 1.05, LONG),
    Target("ours/dora", "ours/lora", 1.05, PLAIN | {"tokens": 2048}),
    Target("ours/dora", "ours/lora", 1.12, SHORT),
    Target("ours/dora", "ours/lora", 1.02, SHORT | {"accumulation": 8}),
    Target("ours/dora", "peft/dora", 0.80, LONG),
    Target("ours/dora", "peft/dora", 0.60, SHORT),
    Target("ours/dora", "peft/dora", 0.75, DROPPED),
    Target("ours/dora-branch", "peft/dora", 0.55, DROPPED),
    Target("ours/dora", "ours/lora", 1.05, PLAIN | {"tokens": 1, "mode": "evaluate"}),
    Target("ours/dora", "ours/lora", 1.15, LONG | {"measure": "bytes"}),
    Target("ours/dora", "ours/lora", 1.15, LONG | {"measure": "bytes", "dtype": "bfloat16"}),
    Target("ours/lora", "peft/lora", 1.00, LONG),
    Target("ours/lora", "peft/lora", 1.00, SHORT),
)


def build(results: Path) -> list[Path]:
    """Write results/tables/speed.{md,csv,tex}; returns their paths, none if nothing was measured."""
    rows = _read(results / "bench" / "speed.jsonl")
    if not rows:
        return []
    blocks = [_targets(rows)]
    for measure, title in (
        ("seconds", "Time of a step"),
        ("bytes", "Memory of a step above what lies there before it"),
    ):
        blocks += (
            [Block(title=title, cells=cells, text=("Cell", "Device"))] if len(cells := _all(rows, measure)) else []
        )
    commits = tuple(sorted({row["code"]["commit"] or "" for row in rows} - {""}))
    source = Provenance(("speed",), (), (), commits, any(row["code"]["diff"] for row in rows), {})
    return save_table(results / "tables", "speed", "What a step of DoRA costs", blocks, _data(rows), source, ISNT)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _device(row: dict[str, Any]) -> str:
    return row["machine"]["processor"]


def _ratio(row: dict[str, Any], over: str, under: str) -> tuple[float, float, float] | None:
    """(median, lower quartile, upper quartile), None if one of the two was not measured."""
    taken = row["taken"]
    if over not in taken or under not in taken:
        return None
    low, middle, high = np.quantile(np.array(taken[over]) / np.array(taken[under]), (0.25, 0.5, 0.75))
    return float(middle), float(low), float(high)


def _words(cell: dict[str, Any]) -> str:
    if cell["mode"] == "evaluate":
        return f"hidden {cell['hidden']}, evaluation, {cell['tokens']} token"
    more = f", rank {cell['rank']}" + (f", dropout {cell['dropout']:g}" if cell["dropout"] else "")
    more += f", accumulation {cell['accumulation']}" if cell["accumulation"] > 1 else ""
    more += f", {cell['dtype']}" if cell["dtype"] != "float32" else ""
    return f"hidden {cell['hidden']}, {cell['tokens']} tokens{more}"


def _floor(cell: dict[str, Any], over: str, under: str) -> float | None:
    if not (over.startswith("ours/dora") and under.endswith("/lora") and cell["mode"] == "train"):
        return None
    if cell["measure"] == "seconds":
        return 1 + cell["rank"] / (2 * cell["tokens"] * cell["accumulation"])
    if cell["measure"] != "bytes" or cell["dtype"] != "float32" or under not in cell.get("taken", {}):
        return None
    keys = cell["hidden"] * cell["key_value_heads"] // cell["heads"]
    kept = 4 * cell["layers"] * cell["tokens"] * (3 * cell["hidden"] + keys)  # bytes of q, o, down and k
    return 1 + kept / cell["taken"][under][0]


def _targets(rows: list[dict[str, Any]]) -> Block:
    lines = []
    for target in TARGETS:
        found = [row for row in rows if all(row[key] == value for key, value in target.where.items())]
        if not found:
            what = f"{target.over} / {target.under}" + (", memory" if target.where["measure"] != "seconds" else "")
            line = {"Ratio": what, "Cell": _words({"hidden": "any"} | target.where)}
            lines.append(line | {"Measured": MISSING, "Target": f"≤ {target.limit:.2f}"})
        for row in found:
            seen = _ratio(row, target.over, target.under)
            what = f"{target.over} / {target.under}" + (", memory" if row["measure"] != "seconds" else "")
            floor = _floor(row, target.over, target.under)
            line = {"Ratio": what, "Cell": _words(row), "Measured": MISSING, "Target": f"≤ {target.limit:.2f}"}
            if seen is not None:
                spread = f" [{seen[1]:.3f}, {seen[2]:.3f}]" if row["measure"] == "seconds" else ""
                over = round(seen[0], 3) - target.limit
                line |= {"Measured": f"{seen[0]:.3f}{spread}", "Met": "yes" if over <= 0 else f"no, by {over:.3f}"}
            lines.append(line | {"Floor": number(floor, digits=3)})
    order = ["Ratio", "Cell", "Measured", "Target", "Met", "Floor"]
    device = "; ".join(sorted({_device(row) for row in rows}))
    versions = rows[0]["packages"]
    notes = (*NOTES, f"Measured on: {device}; torch {versions['torch']}, PEFT {versions['peft']}.")
    cells = pd.DataFrame(lines).reindex(columns=order)
    return Block(title="Ratios with a target", cells=cells, text=("Ratio", "Cell", "Met"), notes=notes)


def _all(rows: list[dict[str, Any]], measure: str) -> pd.DataFrame:
    """Every cell: what our LoRA took, and the others as ratios to it."""
    lines = []
    for row in (row for row in rows if row["measure"] == measure):
        base = row["taken"].get("ours/lora")
        unit = {"ours/lora, ms" if measure == "seconds" else "ours/lora, MB": None}
        if base:
            unit = {key: number(float(np.median(base)) * (1e3 if measure == "seconds" else 1e-6)) for key in unit}
        ratios = {name: _ratio(row, name, "ours/lora") for name in row["taken"] if name != "ours/lora"}
        lines.append(
            {"Cell": _words(row), "Device": _device(row), **unit}
            | {f"{name} / it": number(seen[0], digits=3) for name, seen in ratios.items() if seen}
        )
    return pd.DataFrame(lines)


def _data(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per cell, contender and round."""
    keys = ("cell", "measure", "mode", "hidden", "tokens", "rank", "dropout", "accumulation", "dtype")
    return pd.DataFrame(
        [
            {key: row[key] for key in keys} | {"contender": name, "round": turn, "value": value}
            for row in rows
            for name, values in row["taken"].items()
            for turn, value in enumerate(values)
        ]
    )


if __name__ == "__main__":
    script(build, __doc__)
