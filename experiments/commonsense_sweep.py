"""Learning rates for `commonsense`, chosen per method on validation items, the same number of tries for each method.

    dora-lab run commonsense_sweep              # mini: 4 methods x 5 learning rates, one seed, about half a minute each

A method's rates lie on one grid, a factor of two apart, around what is usual for it (adapters five times FT's).
Scored on the validation split with a seed that `commonsense` does not use; the best mean accuracy of protocol
"generate" is the rate that goes into `commonsense`. No test item is looked at.
"""

from __future__ import annotations

from dataclasses import replace

from dora_lab.spec import Spec
from experiments import _mini

TIERS = ("mini",)
SEED = 100
STEPS = (1 / 4, 1 / 2, 1, 2, 4)  # of the middle
MIDDLE = {"ft": 1e-3, "lora": 5e-3, "dora": 5e-3}
VALIDATION_ITEMS = 800  # in all


def specs(tier: str) -> list[Spec]:
    """Every method of the mini tier at every rate of its grid."""
    rank = _mini.MINI["rank"]
    low_rank = _mini.low_rank
    methods = (_mini.full(), low_rank("lora", rank), low_rank("dora", rank), low_rank("dora", rank // 2))
    rates = [(method, MIDDLE[method.name] * step) for method in methods for step in STEPS]
    return [_try(_mini.trained_mini(method, rate, SEED)) for method, rate in rates]


def _try(spec: Spec) -> Spec:
    return replace(
        spec,
        experiment="commonsense_sweep",
        data=replace(spec.data, validation_items=VALIDATION_ITEMS),
        probe=None,
        evaluation=replace(spec.evaluation, split="validation", protocols=("generate",)),
    )
