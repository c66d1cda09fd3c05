"""Table 7: memory with the norm in the graph or not, the paper's beside ours, from results/bench/gpu.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import script
from analysis.tables import gpu
from dora_lab.paper import claims
from dora_lab.report import Block, number, save_table

WHOSE = {"authors": "as released, by autograd", "ours": "ours", "peft": "PEFT's"}
PRINTED = {"LLaMA-7B": "LLaMA-7B", "bart-base": "VL-BART"}  # our group: the paper's model
ISNT = "the paper's measurement again. Our card, random weights; the paper's column is quoted."
NOTES = (
    "Ours: the peak that PyTorch allocated in training steps, weights and AdamW's state included; the paper does not "
    "say how it measured. LLaMA-7B's shapes in float16 under autocast, micro-batch 4 x 256 tokens, targets q k v up "
    "down, rank 32, dropout 0.05, no checkpointing; bart-base's in float32 at batch 300, 56 tokens and 10 of the "
    "answer, rank 128 on q and v, no dropout, without what VL-BART trains beside the adapters and its 200 more "
    "tokens.",
    "As released: the equations of the authors' code with a dense W + s B A, by autograd. Ours writes the gradients of "
    "both forms out, so the norm in the graph costs no dense matrix that is kept.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/memory.{md,csv,tex}; returns their paths, none if no GPU was visited."""
    rows = [row for row in gpu.read(results) if row["stage"] == "table7" and row.get("peak_bytes")]
    if not rows:
        return []
    printed = claims()
    printed = printed[(printed["source"] == "Table 7") & (printed["metric"] == "gpu_memory_gb")]
    paper = {(row["model"], row["setting"]): float(row["value"]) for _, row in printed.iterrows()}
    lines = [_line(row, rows, paper) for row in rows]
    block = Block(
        title="Memory of a step", cells=pd.DataFrame(lines), text=("Model", "Method", "Norm", "Card"), notes=NOTES
    )
    title = "Table 7: the norm in the graph or not"
    return save_table(results / "tables", "memory", title, [block], gpu.data(rows), gpu.source(rows), ISNT)


def _line(row: dict[str, Any], rows: list[dict[str, Any]], paper: dict[tuple[str, str], float]) -> dict[str, Any]:
    whose, _, method = row["contender"].partition("/")
    dora, inside = method.startswith("dora"), method.endswith("-graph")
    setting = "norm in graph" if inside else "norm detached"
    twin = row["contender"] if inside else f"{row['contender']}-graph"
    saved = None if inside or not dora else gpu.over(row, rows, twin, "peak_bytes")
    return {
        "Model": row["group"],
        "Method": f"{'DoRA' if dora else 'LoRA'}, {WHOSE[whose]}",
        "Norm": setting if dora else None,
        "Card": row["card"],
        "Paper, GB": number(paper.get((PRINTED[row["group"]], setting))) if dora else None,
        "Measured, GB": number(row["peak_bytes"] / 1e9),
        "Less than in the graph, %": number(None if saved is None else 100 * (1 - saved)),
        "ms": number(row["seconds"] * 1e3),
    }


if __name__ == "__main__":
    script(build, __doc__)
