"""Products in bfloat16 under weights in float32 (autocast): whether they change what a real language model learns.

    dora-lab run autocast --data-dir DIR            # tier small: 15 runs beside those of `small`
    dora-lab run autocast --data-dir DIR --device cuda    # on a GPU, where bfloat16 is fast: minutes

FT, LoRA and DoRA of `small` at the same rates, seeds and items, with `optim.products` alone another: weights, their
steps and AdamW's moments stay float32, as with DeepSpeed's bf16. What it saves in time: table `gpu`; on processors
without units for it bfloat16 is several times slower than float32. What is claimed: registered/autocast.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Spec
from experiments import small

TIERS = ("small",)
CELLS = (("ft", None), ("lora", 16), ("dora", 16))


def specs(tier: str) -> list[Spec]:
    """All runs, seed by seed."""
    return confirmation()


def confirmation(seeds: Sequence[int] = range(5)) -> list[Spec]:
    """Every cell with products in bfloat16, at the rate of its runs in float32."""
    return [_narrow(small.trained(*cell, small.RATES[cell], seed)) for seed in seeds for cell in CELLS]


def _narrow(spec: Spec) -> Spec:
    assert spec.optim is not None
    return replace(spec, experiment="autocast", optim=replace(spec.optim, products="bfloat16"), probe=None)
