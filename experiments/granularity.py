"""Tuning granularity (table 6): low-rank updates of the query, key and value alone, of the other linears the magnitude.

    dora-lab run granularity                             # mini: 20 runs beside those of `commonsense`
    dora-lab run granularity --tier paper --dry-run      # 6 runs, 10 to 20 hours each on one 80 GB GPU

At the rate of DoRA with all its targets (mini: rank 8; paper: rank 32, LLaMA-7B and 13B), without a sweep of its own:
one cell beside LoRA and DoRA of `commonsense`. What is claimed: registered/granularity.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Spec
from experiments import commonsense

TIERS = ("mini", "paper")
ITEMS = commonsense.ITEMS
LOW_RANK = ("q_proj", "k_proj", "v_proj")
MAGNITUDE = ("o_proj", "gate_proj", "up_proj", "down_proj")


def specs(tier: str) -> list[Spec]:
    """All runs of a tier."""
    return confirmation() if tier == "mini" else paper()


def confirmation(seeds: Sequence[int] = range(20)) -> list[Spec]:
    """DoRA at rank 8 with these modules."""
    trained = [commonsense.trained("dora", 8, commonsense.RATES["dora", 8], seed) for seed in seeds]
    return [replace(_granular(spec), probe=None) for spec in trained]


def paper() -> list[Spec]:
    """Two models, three seeds each (the paper has one of each)."""
    models = list(commonsense.PAPER)[:2]
    return [
        _granular(spec)
        for spec in commonsense.paper()
        if (spec.method.name, spec.method.rank) == ("dora", 32) and spec.model.name in models
    ]


def _granular(spec: Spec) -> Spec:
    method = replace(spec.method, target_modules=LOW_RANK, magnitude_modules=MAGNITUDE)
    return replace(spec, experiment="granularity", method=method)
