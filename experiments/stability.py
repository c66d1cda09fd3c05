"""Training stability (the paper's claim that DoRA trains more stably): rates above the best.

    dora-lab run stability           # mini: 100 runs beside those of `commonsense`

LoRA and DoRA at rank 8, at 2, 4, ... 32 times the rate that each one's sweep chose; once times is `commonsense`. A run
fails where its choice NLL is above the untrained base's. What is claimed: registered/stability.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Spec
from experiments import commonsense

TIERS = ("mini",)
METHODS = ("lora", "dora")
TIMES = (2, 4, 8, 16, 32)


def specs(tier: str) -> list[Spec]:
    """All runs, seed by seed."""
    return confirmation()


def confirmation(seeds: Sequence[int] = range(10)) -> list[Spec]:
    """Every method at every multiple of its rate with ten seeds."""
    return [
        replace(commonsense.trained(method, 8, _rate(method, times), seed), experiment="stability", probe=None)
        for seed in seeds
        for method in METHODS
        for times in TIMES
    ]


def _rate(method: str, times: int) -> float:
    return commonsense.RATES[method, 8] * times
