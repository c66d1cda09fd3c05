"""Why do ΔD and ΔM correlate as they do? Figures 2 and 7 again with one thing changed at a time.

    dora-lab run decomposition                  # mini: 125 runs of about 17 seconds, one per core at a time

The settings of `commonsense` in the middle, and around them the learning rate, the rank (alpha / rank kept), alpha
(rank kept: the scale of the update) and the number of training items (one epoch each, so also the number of steps).
Five seeds per setting. Only the weights are asked for: the evaluation is two items per task, so that a run is whole.
Runs are listed seed by seed: a grid that was stopped early is smaller, not lopsided.
"""

from __future__ import annotations

from dataclasses import replace

from dora_lab.spec import Evaluation, Method, Optim, Spec
from experiments import _mini

TIERS = ("mini",)
SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATES = (1 / 4, 1, 4)  # of the rate in `commonsense`
ALPHAS = (1 / 4, 1, 4)  # of alpha in `commonsense`
RANKS = (2, 4, 8, 16)
TRAIN_ITEMS = (384, 1536, 3072)


def specs(tier: str) -> list[Spec]:
    """Every setting with every seed, all settings of a seed together."""
    return [spec for seed in SEEDS for spec in _settings(seed)]


def _settings(seed: int) -> list[Spec]:
    found: list[Spec] = []
    for method in (
        _mini.full(),
        *(_mini.low_rank(name, _mini.MINI["rank"]) for name in ("lora", "dora")),
    ):
        middle = _middle(method, seed)
        rate = _optim(middle).learning_rate
        found += [replace(middle, optim=replace(_optim(middle), learning_rate=rate * step)) for step in LEARNING_RATES]
        found += [replace(middle, data=replace(middle.data, train_items=items)) for items in TRAIN_ITEMS]
        if method.rank is not None and method.alpha is not None:
            scale = method.alpha / method.rank
            found += [replace(middle, method=replace(method, rank=rank, alpha=scale * rank)) for rank in RANKS]
            found += [replace(middle, method=replace(method, alpha=method.alpha * step)) for step in ALPHAS]
    return list(dict.fromkeys(found))  # the middle is a level of every factor


def _middle(method: Method, seed: int) -> Spec:
    rate = _mini.MINI["learning_rate"][method.name, method.rank]
    spec = _mini.trained_mini(method, rate, seed)
    return replace(
        spec,
        experiment="decomposition",
        data=replace(spec.data, test_items=2),
        evaluation=Evaluation(protocols=("loglikelihood",)),
    )


def _optim(spec: Spec) -> Optim:
    assert spec.optim is not None  # every method here is trained
    return spec.optim
