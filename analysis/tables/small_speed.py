"""What an update of tier small costs, beside a plain loop and Trainer with PEFT (results/bench/small_speed.jsonl)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import script
from dora_lab.report import Block, Provenance, number, save_table

# (what, over what, at least or at most, bound)
TARGETS = (
    ("lab-16/lora", "lab-4/lora", ">=", 1.35),
    ("trainer/lora", "lab-4/lora", ">=", 1.3),
    ("trainer/dora", "lab-4/dora", ">=", None),
    ("lab-4/dora", "lab-4/lora", "<=", 1.05),
    ("lab-4/dora-dropout", "lab-4/lora", "<=", 1.3),
    ("trainer/dora", "trainer/lora", "<=", None),
    ("lm-eval/options", "shared/options", ">=", 2.5),
)
SHARE, MEMORY = 0.65, 4.0  # of the rate of products, at least; GB, at most
ISNT = "the time of a training. Updates of a model with random weights on one machine, evaluation and probe apart."
NOTES = (
    "lab-4, lab-16: this lab's update, items sorted by length, logits of answers alone, micro-batches of 4 or all 16. "
    "plain: its layers in a plain loop, all 16 padded to the longest, all logits. trainer: transformers' Trainer with "
    "PEFT, the same. Processor seconds; the same items in a round, contenders in turns.",
    "Product rate: float32 operations of the adapted model's products (forward and the gradient of inputs, 4 a weight "
    "and token; embeddings, attention and adapters uncounted) over the rate of square products of 1,024 on the same "
    "threads. Memory: peak above model, optimiser and data at rest.",
)
RATIOS = (
    "The median over rounds of the ratio of two updates on the same items, with the least and the largest. options: "
    "the four of 16 questions, 1 to 8 tokens each, scored by the base; shared: each prompt is read once; lm-eval: with "
    "every option.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/small_speed.{md,csv,tex}; returns their paths, none if nothing was measured."""
    file = results / "bench" / "small_speed.jsonl"
    if not file.exists():
        return []
    rows = {row["contender"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    cells = [measured(row) for name, row in rows.items() if not name.endswith("/options")]
    ratios = [ratio(rows, *target) for target in TARGETS if target[0] in rows and target[1] in rows]
    one = next(iter(rows.values()))
    title = f"Updates of 16 items, {one['threads']} thread" + "s" * (one["threads"] > 1)
    blocks = [
        Block(title=title, cells=pd.DataFrame(map(_shown, cells)), notes=NOTES, isnt=ISNT),
        Block(title="Ratios", cells=pd.DataFrame(map(_ratio, ratios)), notes=RATIOS, isnt=ISNT),
    ]
    data = pd.DataFrame([*cells, *ratios])
    commits = tuple(sorted({row["code"]["commit"] or "" for row in rows.values()} - {""}))
    source = Provenance(("small_speed",), (), (), commits, any(row["code"]["diff"] for row in rows.values()), {})
    return save_table(results / "tables", "small_speed", "Speed of tier small", blocks, data, source)


def linear_weights(shape: dict[str, int]) -> int:
    """Weights of the linear layers of all blocks."""
    width, keys = (
        shape["hidden_size"],
        shape["hidden_size"] * shape["num_key_value_heads"] // shape["num_attention_heads"],
    )
    return shape["num_hidden_layers"] * (2 * width * (width + keys) + 3 * width * shape["intermediate_size"])


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, share of the rate of products, and bytes of a contender."""
    rates = [tokens / seconds for tokens, seconds in zip(row["tokens"], row["seconds"], strict=True)]
    median = float(np.median(rates))
    flops = 4 * linear_weights(row["shape"]) * median
    return {
        "contender": row["contender"], "tokens_per_second": median, "low": min(rates), "high": max(rates),
        "share": flops / row["product_flops"], "bytes": row["bytes"],
    }  # fmt: skip


def ratio(rows: dict[str, Any], what: str, over: str, way: str, bound: float | None) -> dict[str, Any]:
    """The seconds of one contender over another's, and whether the median is within its bound."""
    ratios = np.array(rows[what]["seconds"]) / np.array(rows[over]["seconds"])
    value = float(np.median(ratios))
    met = None if bound is None else value >= bound if way == ">=" else value <= bound
    return {
        "what": f"{what} over {over}", "ratio": value, "low": float(ratios.min()), "high": float(ratios.max()),
        "target": None if bound is None else f"{'≥' if way == '>=' else '≤'} {bound:g}", "met": met,
    }  # fmt: skip


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    lab = row["contender"].startswith("lab-4/lora")
    return {
        "Contender": row["contender"],
        "Tokens a second": f"{row['tokens_per_second']:.0f} [{row['low']:.0f}, {row['high']:.0f}]",
        "Of the product rate, %": number(100 * row["share"], digits=0)
        + (f" (target ≥ {100 * SHARE:.0f})" if lab else ""),  # type: ignore[operator]
        "Memory, GB": number(row["bytes"] / 1e9, digits=1) + (f" (target ≤ {MEMORY:g})" if lab else ""),  # type: ignore[operator]
    }


def _ratio(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Seconds of": row["what"],
        "Ratio": f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
        "Target": row["target"],
        "Met": None if row["met"] is None else "yes" if row["met"] else "no",
    }


if __name__ == "__main__":
    script(build, __doc__)
