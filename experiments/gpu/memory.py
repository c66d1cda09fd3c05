"""Table 7 of the paper, the norm in the graph or not, and LLaVA-1.5-7B's shapes: memory and time of a step.

The paper's cells: LLaMA-7B in float16 under autocast, micro-batch 4, the commonsense targets, rank 32, dropout 0.05;
bart-base in float32 at batch 300 (36 visual and 20 text tokens, 10 of the answer), rank 128 on q and v, no dropout.
Not here: what the vision models train beside the adapters (visual embedding, biases, projector) and LLaVA's tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from experiments.gpu.fast import trained_step
from experiments.gpu.models import SEVEN, adamw, kept_llama, put_on
from experiments.gpu.visit import Visit

COMMONSENSE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
LLAMA = (
    "authors/dora", "authors/dora-graph", "ours/dora-published", "ours/dora-published-graph", "ours/lora-dropped",
    "peft/dora-dropped",
)  # fmt: skip
BART = ("authors/dora", "authors/dora-graph", "ours/dora", "ours/dora-graph", "ours/lora", "peft/dora")
LLAVA = ("ours/lora-dropped", "ours/dora-branch", "ours/dora-published")


def run(visit: Visit) -> None:
    """Table 7: LLaMA-7B, then bart-base."""
    for name in LLAMA:
        visit.cell("table7", f"LLaMA-7B: {name}", 6, lambda name=name: _llama(visit, name))
    visit.free(base=True)
    for name in BART:
        visit.cell("table7", f"bart-base: {name}", 3, lambda name=name: _bart(visit, name))


def run_llava(visit: Visit) -> None:
    """LLaVA-1.5-7B's language model: 576 image tokens and some text, rank 128, checkpointed."""
    for name in LLAVA:
        visit.cell("llava", f"LLaVA-1.5-7B: {name}", 16, lambda name=name: _llava(visit, name))


def _llama(visit: Visit, name: str) -> dict[str, Any]:
    base = kept_llama(visit, torch.float16)
    base.gradient_checkpointing_disable()
    batch, length = (2, 16) if visit.cpu else (4, 256)
    with put_on(base, name, COMMONSENSE, visit.size.rank, 2.0 * visit.size.rank) as model:
        found = trained_step(visit, model, batch, length, autocast=torch.float16)
    about = {"group": "LLaMA-7B", "contender": name, "dtype": "float16, autocast", "rank": visit.size.rank}
    return about | {"targets": COMMONSENSE, "dropout": 0.05} | found


def _llava(visit: Visit, name: str) -> dict[str, Any]:
    base = kept_llama(visit, torch.bfloat16)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rank = visit.size.rank * 4
    batch, length = (2, 16) if visit.cpu else (16, 576 + 64)
    with put_on(base, name, SEVEN, rank, 2.0 * rank) as model:
        found = trained_step(visit, model, batch, length, warm=1, rounds=3)
    return {"group": "LLaVA-1.5-7B", "contender": name, "dtype": "bfloat16", "rank": rank, "dropout": 0.05} | found


def _bart(visit: Visit, name: str) -> dict[str, Any]:
    from transformers import BartConfig, BartForConditionalGeneration

    shape = {"vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6}
    shape |= {f"{side}_attention_heads": 12 for side in ("encoder", "decoder")}
    shape |= {f"{side}_ffn_dim": 3072 for side in ("encoder", "decoder")}
    batch, rank = 300, 128
    if visit.cpu:
        shape |= {"vocab_size": 128, "d_model": 48, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        batch, rank = 3, 4
    with torch.device(visit.device):
        base = BartForConditionalGeneration(BartConfig(**shape)).requires_grad_(False).train()
    with put_on(base, name, ("q_proj", "v_proj"), rank, float(rank), dropout=0.0) as model:
        found = visit.took(_bart_step(visit, model, batch, shape["vocab_size"]))
    about = {"group": "bart-base", "contender": name, "dtype": "float32", "rank": rank, "batch": batch}
    return about | {"targets": ("q_proj", "v_proj"), "dropout": 0.0, "length": 56, "answer_length": 10} | found


def _bart_step(visit: Visit, model: Any, batch: int, vocabulary: int) -> Callable[[], None]:
    source = torch.randint(4, vocabulary, (batch, 56), device=visit.device)
    answer = torch.randint(4, vocabulary, (batch, 10), device=visit.device)
    optimizer = adamw(model)

    def step() -> None:
        model(input_ids=source, labels=answer).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
