"""The optimiser of a run: AdamW or SGD, its parameters in the groups that `optim.groups` names.

Decay is decoupled in both: a weight is multiplied by 1 - (its learning rate) x (its decay) and then moved, so that over
a run it shrinks by 1 - prod(1 - rate x decay) where nothing else moves it, whatever the optimiser.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from dora_lab.io.limits import group_of
from dora_lab.spec import Optim, SpecError, did_you_mean

MOMENTUM = 0.9  # of "sgd"


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD, its decay as AdamW's (its own adds decay x weight to the gradient, so momentum keeps it)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Shrink every weight by 1 - lr x decay, then step."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["decay"])
        return super().step(closure)


def make_optimizer(
    trained: Mapping[str, nn.Parameter], decayed: Collection[str], optim: Optim
) -> torch.optim.Optimizer:
    """The optimiser of the parameters that are trained, by name.

    decayed: names that `optim.weight_decay` is about where no group says otherwise (transformers leaves out biases and
    norms). The first group holds what no pattern names, at the rate itself: what is logged as the learning rate is its.
    Raises SpecError for a pattern that names nothing that is trained.
    """
    rules = [group_of(text) for text in optim.groups]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, optim.weight_decay): [], (1.0, 0.0): []}
    hits = dict.fromkeys((rule.pattern for rule in rules), 0)
    for name, weight in trained.items():
        rule = next((rule for rule in rules if re.search(rule.pattern, name)), None)
        decay = optim.weight_decay if name in decayed else 0.0
        if rule is not None:
            hits[rule.pattern] += 1
            decay = decay if rule.decay is None else rule.decay
        groups.setdefault((1.0 if rule is None else rule.factor, decay), []).append(weight)
    if idle := [pattern for pattern, count in hits.items() if not count]:
        near = did_you_mean(idle[0], {name.rpartition(".")[2] for name in trained})
        raise SpecError(
            f"optim.groups: '{idle[0]}' names no parameter that is trained and no pattern before it; {near}"
        )
    key = "decay" if optim.optimizer == "sgd" else "weight_decay"
    made = [
        {"params": weights, "lr": factor * optim.learning_rate, key: decay}
        for (factor, decay), weights in groups.items()
    ]
    if optim.optimizer == "sgd":
        return DecoupledSGD(made, lr=optim.learning_rate, momentum=MOMENTUM)
    return torch.optim.AdamW(made, lr=optim.learning_rate, betas=(0.9, 0.999), eps=optim.adam_eps, fused=True)
