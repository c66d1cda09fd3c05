"""A training step of the whole model: contenders one after the other on one base, with checkpointing and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.gpu.models import SEVEN, kept_llama, operations, put_on, step_of
from experiments.gpu.visit import Visit

CHECKPOINTED, WHOLE = "checkpointed", "not checkpointed"
FIRST = ("ours/lora", "ours/dora", "ours/dora-branch", "ours/dora-published", "peft/lora", "peft/dora")
SECOND = ("ours/lora", "ours/dora", "peft/lora", "peft/dora", "ours/dora-branch", "ours/dora-published")
MORE = ("ours/dora-graph", "ours/lora-dropped", "peft/dora-dropped", "ours/lora-again", "ours/ft")
SECONDS = {"ours/lora": 5, "peft/dora": 13, "peft/dora-dropped": 15, "ours/ft": 12}  # others: 9


def run(visit: Visit) -> None:
    """The contenders that the targets are about, with gradient checkpointing."""
    _group(visit, "fast", CHECKPOINTED, FIRST)


def run_whole(visit: Visit) -> None:
    """The same without checkpointing; the memory is the question."""
    _group(visit, "whole", WHOLE, SECOND)


def run_more(visit: Visit) -> None:
    """What is less urgent, with checkpointing; full fine-tuning last, since it moves the base."""
    _group(visit, "more", CHECKPOINTED, MORE)


def _group(visit: Visit, stage: str, group: str, contenders: tuple[str, ...]) -> None:
    for name in contenders:
        estimate = SECONDS.get(name, 9)
        visit.cell(stage, f"{group}: {name}", estimate, lambda name=name: _contender(visit, name, group))


def _contender(visit: Visit, name: str, group: str) -> dict[str, Any]:
    size = visit.size
    batch, length = (2, 16) if visit.cpu else (16, 256)
    base = kept_llama(visit, torch.bfloat16)
    if group == CHECKPOINTED:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    with put_on(base, name, SEVEN, size.rank, 2.0 * size.rank) as model:
        found = trained_step(visit, model, batch, length, whole=name == "ours/ft")
    if name == "ours/ft":
        visit.free(base=True)
    return {"group": group, "contender": name, "dtype": "bfloat16", "rank": size.rank, "targets": SEVEN} | found


def trained_step(
    visit: Visit, model: Any, batch: int, length: int, *, whole: bool = False, autocast: torch.dtype | None = None,
    warm: int = 2, rounds: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Time, speed and memory of a step of a language model that is adapted already."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = tokens(visit, batch, length)
    before = None if visit.cpu else torch.cuda.memory_allocated()
    found = visit.took(step_of(model, ids, autocast), warm, rounds)
    done = operations(visit.size, batch * length, length, whole)
    return found | {
        "batch": batch,
        "length": length,
        "trainable": trainable,
        "layers": visit.size.layers,
        "before_bytes": before,
        "tokens_per_second": batch * length / found["seconds"],
        "operations": done,
        "share": visit.share("product", done, found["seconds"]),
    }


def tokens(visit: Visit, batch: int, length: int) -> Tensor:
    """Random token ids."""
    return torch.randint(0, visit.size.vocabulary, (batch, length), device=visit.device)
