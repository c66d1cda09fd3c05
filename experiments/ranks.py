"""Ranks (table 15, figure 5): who loses less at a low rank.

    dora-lab run ranks                             # mini: 84 runs of a sweep, 80 at the rates that it chose
    dora-lab run ranks --tier paper --dry-run      # 21 runs, 10 to 20 hours each on one 80 GB GPU

mini: ranks 2 and 32 of LoRA and DoRA; 4, 8 and 16 are cells of `commonsense`, whose first twenty seeds stand beside
these. Each has a sweep as theirs. What is claimed: registered/ranks.md.

paper: LLaMA-7B. Ranks 16 and 32 of DoRA and 32 of LoRA are runs of `commonsense`; these are the others. alpha is twice
the rank, as in table 8 (the paper states none for the other ranks), learning rates are those of the authors' README by
rank: 3e-4 for LoRA, 2e-4 for DoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Spec
from experiments import commonsense

TIERS = ("mini", "paper")
ITEMS = commonsense.ITEMS
CELLS = tuple((method, rank) for method in ("lora", "dora") for rank in (2, 32))
# results/tables/rates: the vertex of the sweep's parabola, frozen before any run of `confirmation`
RATES: dict[tuple[str, int], float] = {
    ("lora", 2): 0.016,
    ("dora", 2): 0.016,
    ("lora", 32): 0.0041,
    ("dora", 32): 0.0044,
}

PUBLISHED = {"lora": ((4, 8, 16, 64), 3e-4), "dora": ((4, 8, 64), 2e-4)}  # method: ranks, learning rate


def specs(tier: str) -> list[Spec]:
    """All runs of a tier."""
    return [*sweep(), *confirmation()] if tier == "mini" else paper()


def sweep() -> list[Spec]:
    """Every cell at every rate of its grid, three seeds, on validation items; seed by seed."""
    return [
        replace(commonsense.swept(method, rank, commonsense.MIDDLE[method] * step, seed), experiment="ranks")
        for seed in commonsense.SWEEP_SEEDS
        for method, rank in CELLS
        for step in commonsense.STEPS
    ]


def confirmation(seeds: Sequence[int] = range(20)) -> list[Spec]:
    """Every cell at its rate with twenty seeds; nothing before the rates are chosen."""
    return [
        replace(commonsense.trained(method, rank, rate, seed), experiment="ranks", probe=None)
        for seed in seeds
        for (method, rank), rate in RATES.items()
    ]


def paper() -> list[Spec]:
    """Three seeds each; the paper has one of each."""
    return [
        _at_rank(spec, rank, PUBLISHED[spec.method.name][1])
        for spec in commonsense.paper()
        if spec.method.rank == 32 and spec.model.name == next(iter(commonsense.PAPER))
        for rank in PUBLISHED[spec.method.name][0]
    ]


def _at_rank(spec: Spec, rank: int, rate: float) -> Spec:
    assert spec.optim is not None
    method = replace(spec.method, rank=rank, alpha=2.0 * rank)
    return replace(spec, experiment="ranks", method=method, optim=replace(spec.optim, learning_rate=rate))
