"""The pilot of the instrument: how far families and metrics spread over seeds, before anything is claimed.

    dora-lab run pilot                          # mini: LoRA and FT on sources `mini` and `mini2`, half a minute each

Both sources, LoRA and full fine-tuning at the rates of the earlier runs, seeds from 200 on, which nothing else uses;
scored on validation items. What it found stands in results/tables/pilot, what is decided from it will stand in
experiments/registered/commonsense.md. No claim rests on these runs.
"""

from __future__ import annotations

from dataclasses import replace

from dora_lab.spec import Evaluation, Method, Spec
from experiments import _mini

TIERS = ("mini",)
SEEDS = (200, 201, 202, 203, 204)
SOURCES = {"mini": (1536, 800), "mini2": (2048, 800)}  # training items, validation items


def specs(tier: str) -> list[Spec]:
    """Both methods on both sources, all of a seed together."""
    methods = (_mini.full(), _mini.low_rank("lora", _mini.MINI["rank"]))
    return [_try(method, source, seed) for seed in SEEDS for source in SOURCES for method in methods]


def _try(method: Method, source: str, seed: int) -> Spec:
    spec = _mini.trained_mini(method, _mini.MINI["learning_rate"][method.name, method.rank], seed)
    trained, scored = SOURCES[source]
    return replace(
        spec,
        experiment="pilot",
        data=replace(spec.data, name=source, train_items=trained, validation_items=scored),
        probe=None,
        evaluation=Evaluation(protocols=("loglikelihood",), split="validation"),
    )
