"""Few and noisy training items (the question of figures 4 and 9): how FT, LoRA and DoRA differ as data shrinks.

    dora-lab run samples             # mini: 90 runs of a sweep, 168 at the rates that it chose

Every run takes the 64 steps of `commonsense`, whose 2,048 items are the largest size; fewer items are seen more often.
The items of a size are the first of the next one's. With noise a fifth of the labels are drawn anew from their options,
and the rate is the clean cell's. What is claimed: registered/samples.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Spec
from experiments import commonsense

TIERS = ("mini",)
SIZES = (64, 128, 256, 512, 1024)
NOISY = (256, 1024)
NOISE = 0.2
METHODS = (("ft", None), ("lora", 8), ("dora", 8))
CELLS = tuple((method, rank, size) for method, rank in METHODS for size in SIZES)
SWEEP_SEEDS = (100, 101)
STEPS = (1 / 9, 1 / 3, 1)  # of the rate that 2,048 items chose; the same number of tries for every cell
# results/tables/rates: as the sweep chose, frozen before any run of `confirmation`
RATES: dict[tuple[str, int | None, int], float] = {
    ("ft", None, 64): 0.00016,
    ("ft", None, 128): 0.00016,
    ("ft", None, 256): 0.00069,
    ("ft", None, 512): 0.0014,
    ("ft", None, 1024): 0.0014,
    ("lora", 8, 64): 0.0018,
    ("lora", 8, 128): 0.0023,
    ("lora", 8, 256): 0.0083,
    ("lora", 8, 512): 0.0083,
    ("lora", 8, 1024): 0.0083,
    ("dora", 8, 64): 0.0018,
    ("dora", 8, 128): 0.0023,
    ("dora", 8, 256): 0.0086,
    ("dora", 8, 512): 0.0086,
    ("dora", 8, 1024): 0.0086,
}


def specs(tier: str) -> list[Spec]:
    """All runs."""
    return [*sweep(), *confirmation()]


def sweep() -> list[Spec]:
    """Every clean cell at every rate of its grid, two seeds, on validation items; seed by seed."""
    return [
        _of(commonsense.swept(method, rank, commonsense.RATES[method, rank] * step, seed), size)
        for seed in SWEEP_SEEDS
        for method, rank, size in CELLS
        for step in STEPS
    ]


def confirmation(seeds: Sequence[int] = range(8)) -> list[Spec]:
    """Every cell at its rate with eight seeds, two sizes with noise too."""
    return [
        _of(commonsense.trained(method, rank, rate, seed), size, noise)
        for seed in seeds
        for (method, rank, size), rate in RATES.items()
        for noise in ((0.0, NOISE) if size in NOISY else (0.0,))
    ]


def _of(spec: Spec, size: int, noise: float = 0.0) -> Spec:
    """The run on that many items, in the steps that all have."""
    assert spec.optim is not None
    return replace(
        spec,
        experiment="samples",
        probe=None,
        data=replace(spec.data, train_items=size, label_noise=noise),
        optim=replace(spec.optim, epochs=commonsense.MINI["train_items"] / size),
    )
