"""Figures 2 and 7 on the paper's architecture: ΔD against ΔM of self-attention in VL-BART, with and without decay.

    dora-lab run image_text_decay               # mini: 30 runs; those without decay are image_text's

The paper measured its decomposition on VL-BART after the four image-text tasks. Rows of `image_text` (FT, LoRA as
matched, DoRA; five seeds) with the decay that its runs had, on all but biases, in two readings:

    released    as much as the released script takes off in all: Σηλ = 0.044 in FT (learning rate 1e-4, batch 500),
                so δ = 1 - exp(-Σηλ) = 4.3 %, and 0.73 (1e-3, batch 300) in LoRA and DoRA, whose m so loses 52 %
    copied      λ = 0.01, the script's number, in runs of other length and rate

Scored on few items: only the weights are asked for. What is expected: registered/image_text.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from dora_lab.spec import Spec, spec_id
from experiments import image_text

TIERS = ("mini",)
SEEDS = range(5)
ROWS = ("FT", "LoRA, matched", "DoRA")
NONE, RELEASED, COPIED = "none", "released", "copied"
AMOUNT = {"FT": 0.0438, "LoRA, matched": 0.73, "DoRA": 0.73}  # Σηλ of the released runs
LAMBDA = 0.01  # their λ
SEEN = "visual_embedding"


class Cell(NamedTuple):
    """What a run is one of, but for its seed."""

    row: str
    decay: str


def specs(tier: str) -> list[Spec]:
    """All runs, seed by seed; none before the rates of `image_text` are chosen."""
    return [spec for cell, spec in _runs(SEEDS) if cell.decay != NONE]


@cache
def cells() -> dict[str, Cell]:
    """The cell of every run by its id, those of `image_text` without decay among them."""
    return {spec_id(spec): cell for cell, spec in _runs(SEEDS)}


def _runs(seeds: Sequence[int]) -> Iterator[tuple[Cell, Spec]]:
    for seed in seeds:
        for row in ROWS:
            if row not in image_text.RATES:
                continue
            plain = image_text.mini(image_text.CELLS[row], image_text.RATES[row], seed)
            yield Cell(row, NONE), plain
            # the rate rises to its peak and falls to zero in straight lines
            released = AMOUNT[row] / (image_text.RATES[row] * image_text.MINI_STEPS / 2)
            for decay, amount in ((RELEASED, released), (COPIED, LAMBDA)):
                yield Cell(row, decay), _decayed(plain, float(f"{amount:.3g}"))


def _decayed(spec: Spec, amount: float) -> Spec:
    """Decay on all but biases, layer norms among it, as released; of the visual embedding at its own rate."""
    assert spec.optim is not None
    factor = image_text.SEEN_RATE / spec.optim.learning_rate
    groups = (
        rf"{SEEN}.*bias$={factor:.4g}:0",
        f"{SEEN}={factor:.4g}:{amount / factor:.4g}",
        rf"(?<!bias)$=1:{amount:g}",
    )
    return replace(
        spec,
        experiment="image_text_decay",
        data=replace(spec.data, tasks=image_text.TASKS, test_items=32),
        optim=replace(spec.optim, groups=groups),
        evaluation=replace(spec.evaluation, task_beams=("coco_caption=5",)),
    )
