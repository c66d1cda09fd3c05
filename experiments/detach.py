"""The norm in the graph or held constant (section 4.3, table 7): what equation 11 costs in accuracy.

    dora-lab run detach                             # mini: 20 runs beside those of `commonsense`
    dora-lab run detach --tier paper --dry-run      # 3 runs, 10 to 20 hours each on one 80 GB GPU

DoRA with the gradient through its norm (equation 6), at the rate of DoRA with the norm held constant: mini at rank 8,
paper at rank 32 on LLaMA-7B. What it costs in memory and time: tables `memory` and `speed`. What is claimed:
registered/detach.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Spec
from experiments import commonsense

TIERS = ("mini", "paper")
ITEMS = commonsense.ITEMS


def specs(tier: str) -> list[Spec]:
    """All runs of a tier."""
    return confirmation() if tier == "mini" else paper()


def confirmation(seeds: Sequence[int] = range(20)) -> list[Spec]:
    """DoRA at rank 8 with the gradient through its norm."""
    trained = [commonsense.trained("dora", 8, commonsense.RATES["dora", 8], seed) for seed in seeds]
    return [replace(_attached(spec), probe=None) for spec in trained]


def paper() -> list[Spec]:
    """Three seeds on LLaMA-7B (the paper has one)."""
    small = next(iter(commonsense.PAPER))
    return [
        _attached(spec)
        for spec in commonsense.paper()
        if (spec.model.name, spec.method.name, spec.method.rank) == (small, "dora", 32)
    ]


def _attached(spec: Spec) -> Spec:
    return replace(spec, experiment="detach", method=replace(spec.method, detach_norm=False))
