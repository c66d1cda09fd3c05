"""What steps, the probe and merging cost on a GPU, and whether numbers are right there: results/bench/gpu.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import script
from dora_lab.report import Block, Provenance, number, save_table
from experiments.gpu.table import LOST, TARGETS, ratio

MISSING = "not run"
ISNT = "a training. Some steps of random weights, on one visit to a card."
NOTES = (
    "A time is the median of the steps of one contender by device events, forward, backward and AdamW; contenders come "
    "one after the other in one process; those of the linear layers and of the decoder layer take turns, and what is "
    "divided is what one round gave. `again` is LoRA once more, `eager` without the Triton kernels. Ratios are within "
    "one visit. LLaMA-7B's shapes with random weights, rank 32 on all seven kinds of linear layer, bfloat16, 16 x 256 "
    "tokens; dropout 0.05 where a form has it (`dropped`: LoRA, or PEFT's, with dropout).",
    "Share: operations of the dense products of forward and backward (attention as causal; no adapters, nor what "
    "checkpointing makes again) a second, over those of a large bfloat16 product measured in the same visit.",
    "The published dropout is two dense products each way where LoRA has one: its ratio is the cost of that form.",
)


SETTINGS = ("threads", "tf32", "bf16_reduced_sums", "estimate_s", "took_s", "seed")  # measured nothing: bench/gpu.jsonl


def build(results: Path) -> list[Path]:
    """Write results/tables/gpu.{md,csv,tex}; returns their paths, none if no GPU was visited."""
    rows = read(results)
    if not rows:
        return []
    timed = [row for row in rows if row.get("contender")]
    blocks = [_targets(timed), _contenders(timed), _right(rows), _rest(rows)]
    blocks = [block for block in blocks if len(block.cells)]
    return save_table(results / "tables", "gpu", "DoRA on a GPU", blocks, data(rows), source(rows), ISNT)


def read(results: Path) -> list[dict[str, Any]]:
    """The newest row of every cell that was measured on a card; dry runs and what was lost are left out."""
    file = results / "bench" / "gpu.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in map(json.loads, lines):
        if row["card"] is not None and not any(name in row for name in LOST):
            found[row["card"], row["stage"], row["cell"]] = row
    return list(found.values())


def source(rows: list[dict[str, Any]]) -> Provenance:
    """Where the rows come from."""
    commits = tuple(sorted({row["commit"] or "" for row in rows} - {""}))
    return Provenance(("gpu_visit",), (), (), commits, any(row["diff"] for row in rows), {})


def data(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per number."""
    kept = ("card", "visit", "stage", "cell")  # driver and torch: bench/gpu.jsonl
    return pd.DataFrame(
        [
            {name: row[name] for name in kept} | {"what": what, "value": value}
            for row in rows
            for what, value in row.items()
            if isinstance(value, int | float) and what not in (*kept, *SETTINGS)
        ]
    )


def over(row: dict[str, Any], rows: list[dict[str, Any]], under: str, what: str = "seconds") -> float | None:
    """Its number over another contender's of the same group, card and visit."""
    return ratio(row, [other for other in rows if other["visit"] == row["visit"]], under, what)


def _targets(timed: list[dict[str, Any]]) -> Block:
    lines = []
    for group, name, under, what, limit in TARGETS:
        about = {"Group": group, "Ratio": f"{name} / {under}" + (", memory" if what == "peak_bytes" else "")}
        about["Target"] = f"≤ {limit:.2f}" if limit else "none: its cost"
        found = [row for row in timed if (row["group"], row["contender"]) == (group, name)]
        for row in found or [None]:
            seen = over(row, timed, under, what) if row else None
            met = None if seen is None or limit is None else "yes" if seen <= limit else f"no, by {seen - limit:.3f}"
            measured = MISSING if seen is None else number(seen, digits=3)
            lines.append(about | {"Card": row["card"] if row else None, "Measured": measured, "Met": met})
    cells = pd.DataFrame(lines)[["Group", "Ratio", "Card", "Measured", "Target", "Met"]]
    return Block(title="Ratios with a target", cells=cells, text=("Group", "Ratio", "Card", "Met"), notes=NOTES)


def _contenders(timed: list[dict[str, Any]]) -> Block:
    lines = [
        {
            "Group": row["group"],
            "Contender": row["contender"],
            "Card": row["card"],
            "ms": number(row["seconds"] * 1e3),
            "Tokens/s": number(row.get("tokens_per_second"), digits=0),
            "Share": number(row.get("share"), digits=3),
            "Peak, GB": number(row["peak_bytes"] / 1e9 if row.get("peak_bytes") else None),
            "/ own LoRA": number(over(row, timed, "ours/lora"), digits=3),
            "/ PEFT's LoRA": number(over(row, timed, "peft/lora"), digits=3),
            "/ PEFT's DoRA": number(over(row, timed, "peft/dora"), digits=3),
            "Memory / own LoRA": number(over(row, timed, "ours/lora", "peak_bytes"), digits=3),
        }
        for row in timed
    ]
    return Block(title="Steps", cells=pd.DataFrame(lines), text=("Group", "Contender", "Card"))


def _right(rows: list[dict[str, Any]]) -> Block:
    lines = [
        {
            "Check": row["cell"],
            "Card": row["card"],
            "Error": None if row.get("worst") is None else f"{row['worst']:.1e}",
            "At most": None if row.get("tolerance") is None else f"{row['tolerance']:g}",
            "Right": "yes" if row["ok"] else "no",
        }
        for row in rows
        if "ok" in row and row["stage"] == "right"
    ]
    note = "Against float64 on the processor, ‖a - b‖ / ‖b‖, the worst over output, gradients and the merged layer."
    return Block(title="Right", cells=pd.DataFrame(lines), text=("Check", "Card", "Right"), notes=(note,))


def _rest(rows: list[dict[str, Any]]) -> Block:
    lines: list[dict[str, Any]] = []
    for row in rows:
        about = {"What": row["cell"], "Card": row["card"]}
        if row["stage"] == "ceilings":
            rate = f"{row['gbps']:.0f} GB/s" if "gbps" in row else f"{row['tflops']:.0f} TFLOP/s"
            lines.append(about | {"Measured": rate})
        elif row["stage"] == "probe" and "gbps" in row:
            rate = f"{row['seconds']:.2f} s, {row['gbps']:.1f} GB/s, {row['share'] or 0:.3f} of the copy"
            lines.append(about | {"What": f"probe, {row['cell']}, {row['layers']} layers", "Measured": rate})
        elif "decode_merged_over_base" in row:
            for what in ("prefill", "decode"):
                both = f"{row[f'{what}_merged_over_base']:.3f} (not merged: {row[f'{what}_adapted_over_base']:.3f})"
                lines.append(about | {"What": f"merged inference over the base's, {what}", "Measured": both})
        elif "largest_share" in row:
            shown = f"{row['largest_share']:.1e} of their deviation"
            lines.append(about | {"What": f"merging moves {row['cell']} at most by", "Measured": shown})
    return Block(title="Ceilings, probe, merging", cells=pd.DataFrame(lines), text=("What", "Card", "Measured"))


if __name__ == "__main__":
    script(build, __doc__)
