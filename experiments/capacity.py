"""Learning capacity (the paper's section 3 speaks of it): how many bits of random labels a method stores.

    dora-lab run capacity            # mini: 39 runs of a sweep, 65 at the rates that it chose

The labels of all training items are drawn anew from their options, so that nothing but the weights can hold them; each
item is seen sixteen times, and the *training* items are asked. FT, and LoRA and DoRA at ranks 1 to 32. A sweep of equal
size for each cell is read on its training items, too: what is measured is what was kept of them. What is claimed:
registered/capacity.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Spec
from experiments import commonsense, ranks

TIERS = ("mini",)
RANKS = (1, 2, 4, 8, 16, 32)
CELLS = (("ft", None), *((method, rank) for method in ("lora", "dora") for rank in RANKS))
FACTS, EPOCHS = 256, 16.0
SWEEP_SEED = 100
STEPS = (1 / 2, 1, 2)  # of the rate that one pass over true labels chose; rank 1 begins at rank 2's
# results/tables/capacity: as the sweep chose, frozen before any run of `confirmation`
RATES: dict[tuple[str, int | None], float] = {
    ("ft", None): 0.0018,
    ("lora", 1): 0.032,
    ("lora", 2): 0.017,
    ("lora", 4): 0.012,
    ("lora", 8): 0.0082,
    ("lora", 16): 0.012,
    ("lora", 32): 0.0051,
    ("dora", 1): 0.019,
    ("dora", 2): 0.018,
    ("dora", 4): 0.014,
    ("dora", 8): 0.012,
    ("dora", 16): 0.012,
    ("dora", 32): 0.005,
}


def specs(tier: str) -> list[Spec]:
    """All runs."""
    return [*sweep(), *confirmation()]


def sweep() -> list[Spec]:
    """Every cell at every rate of its grid, one seed."""
    known = commonsense.RATES | ranks.RATES
    return [
        stored(method, rank, float(f"{known[method, rank and max(rank, 2)] * step:.3g}"), SWEEP_SEED)
        for method, rank in CELLS
        for step in STEPS
    ]


def confirmation(seeds: Sequence[int] = range(5)) -> list[Spec]:
    """Every cell at its rate with five seeds; nothing before the rates are chosen."""
    return [stored(method, rank, rate, seed) for seed in seeds for (method, rank), rate in RATES.items()]


def stored(method: str, rank: int | None, learning_rate: float, seed: int) -> Spec:
    """One run on random labels, asked for them."""
    spec = commonsense.trained(method, rank, learning_rate, seed)
    assert spec.optim is not None
    return replace(
        spec,
        experiment="capacity",
        probe=None,
        data=replace(spec.data, train_items=FACTS, label_noise=1.0),
        optim=replace(spec.optim, epochs=EPOCHS),
        evaluation=replace(spec.evaluation, protocols=("loglikelihood",), split="train", text="none"),
    )
