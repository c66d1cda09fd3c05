"""How the encoder of pictures is made, a CLIP tower of 4 layers x 96: it learns what every patch of a picture shows.

CLIP learns from captions; of a few thousand steps that leaves shapes and words unseen. Its pictures are crowds: of each
of the nine places on its own something is drawn, so that a picture teaches what two or three views would.
"""

from __future__ import annotations

import json
import time
from random import Random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dora_lab.mini.llava.draw import CELL, SIDE, Fault, pixels
from dora_lab.mini.llava.views import WORDS, Sign
from dora_lab.mini.vl.pretrain import optimizers
from dora_lab.mini.vl.scenes import COLOURS, SHAPES, SIZES, Thing

PATCHES = SIDE // CELL
BATCH = 32  # pictures of a step
CONFIG: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": CELL,
    "projection_dim": 96,
}
FIELDS = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "word": tuple(WORDS)}  # what a patch may show; 0: nothing
MEAN, SD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of a pixel's colours
Seen = list[Thing | Sign]


def crowd(key: str) -> tuple[Seen, Fault]:
    """Something or nothing at each place, and what went wrong with the picture."""
    rng = Random(f"crowd/{key}")
    found: Seen = []
    for place in range(9):
        row, column = divmod(place, 3)
        drawn = rng.random()
        if drawn < 0.4:
            found.append(Sign(rng.choice(WORDS), row, column))
        elif drawn < 0.85:
            size = rng.choice(SIZES)
            found.append(Thing(rng.choice(COLOURS), rng.choice(SHAPES), size, row, column, rng.randrange(4)))
    thumb = divmod(rng.randrange(9), 3) if rng.random() < 0.2 else None
    return found, Fault(thumb=thumb, dark=rng.random() < 0.03, blurred=rng.random() < 0.15)


def shown(seen: Seen, fault: Fault) -> dict[str, np.ndarray]:
    """By field, (49,): of each patch which value it shows, counted from 1; 0 where none can be seen."""
    grids = {name: np.zeros((PATCHES, PATCHES), np.int64) for name in FIELDS}
    for one in seen:
        if fault.dark or (one.row, one.column) == fault.thumb:
            continue
        if isinstance(one, Sign):
            grids["word"][2 * one.row : 2 * one.row + 2, 2 * one.column : 2 * one.column + 2] = (
                WORDS.index(one.word) + 1
            )
            continue
        for cell in one.cells():
            for name in ("colour", "shape", "size"):
                grids[name][cell] = FIELDS[name].index(getattr(one, name)) + 1
    return {name: grid.ravel() for name, grid in grids.items()}


def as_input(pictures: list[np.ndarray]) -> Tensor:
    """(N, 3, 56, 56): pictures as CLIP's processor gives them."""
    values_NHWC = torch.from_numpy(np.stack(pictures)).float() / 255
    return ((values_NHWC - torch.tensor(MEAN)) / torch.tensor(SD)).permute(0, 3, 1, 2).contiguous()


def batch(keys: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures of crowds, and by field (N, 49) what their patches show."""
    made = [crowd(key) for key in keys]
    labels = [shown(seen, fault) for seen, fault in made]
    pictures = [pixels(seen, f"crowd/{key}", fault) for key, (seen, fault) in zip(keys, made, strict=True)]
    return as_input(pictures), {name: torch.from_numpy(np.stack([one[name] for one in labels])) for name in FIELDS}


def features(model: CLIPVisionModel, images: Tensor) -> Tensor:
    """(N, 49, width): what LLaVA reads, the last layer without the class token."""
    return cast(Tensor, model(pixel_values=images, output_hidden_states=True).hidden_states[-1])[:, 1:]


def pretrain(
    steps: int, learning_rate: float = 0.003, seed: int = 0
) -> tuple[CLIPVisionModel, nn.ModuleDict, dict[str, Any]]:
    """The encoder after `steps` batches, the linear readers that it was trained by, and a record."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**CONFIG)).train()
    width = CONFIG["hidden_size"]
    readers = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in FIELDS.items()})
    both = optimizers(cast(Any, nn.ModuleList([model, readers])), learning_rate)
    began, log = time.time(), list[dict[str, Any]]()
    for step in range(steps):
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 50, 0.02 + 0.98 * (steps - step) / (0.5 * steps))
        images, labels = batch([f"{step}/{k}" for k in range(BATCH)])
        with torch.autocast("cpu", torch.bfloat16):
            seen = features(model, images)
            told = {name: readers[name](seen).float() for name in FIELDS}
        losses = [nn.functional.cross_entropy(told[name].flatten(0, 1), labels[name].flatten()) for name in FIELDS]
        loss = torch.stack(losses).sum()
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *readers.parameters()], 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - began, 1)}
            log.append(row | {name: round(hits(told[name], labels[name]), 3) for name in FIELDS})
            print(json.dumps(log[-1]), flush=True)
    record = {
        "steps": steps, "batch": BATCH, "peak_learning_rate": learning_rate, "seed": seed,
        "seconds": round(time.time() - began, 1), "parameters": sum(p.numel() for p in model.parameters()),
        "log": log[::4] + log[-1:],
    }  # fmt: skip
    return model.eval(), readers.eval(), record


def hits(told_NPV: Tensor, labels_NP: Tensor) -> float:
    """Share of the patches that show something of which it is the likeliest."""
    there = labels_NP > 0
    return float(told_NPV.argmax(2)[there].eq(labels_NP[there]).float().mean())


@torch.no_grad()
def gate(model: CLIPVisionModel, readers: nn.ModuleDict, count: int = 256) -> dict[str, float]:
    """By field, share of the patches of unread crowds whose value the reader says."""
    images, labels = batch([f"gate/{k}" for k in range(count)])
    seen = features(model, images)
    return {name: hits(readers[name](seen), labels[name]) for name in FIELDS}
