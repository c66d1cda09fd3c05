"""What decides the sign in figure 2: weight decay and the base's norms, on a real language model.

    dora-lab run sign --data-dir DIR

Full fine-tuning whose weight decay takes δ = 0 to 5 times the mean ΔD off every weight, LoRA and DoRA under as much
decay, and full fine-tuning on one and the same function with its layers' norms set with and against the step's length
(`model.rescale`). Training as in `small`. What is predicted stands in registered/sign.md, written before.
"""

from __future__ import annotations

from dataclasses import replace

from dora_lab.spec import Probe, Spec
from experiments import small
from experiments._sign import DELTA_D, RATES, RESCALED

TIERS = ("small",)
TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")  # scored to see that the loss is the same
SEEDS = (0, 1, 2)
RATIOS = (0.0, 0.5, 1.0, 2.5, 5.0)  # δ / ΔD
FRACTIONS = (0.25, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def specs(tier: str) -> list[Spec]:
    """All runs, seed by seed."""
    if not RATES:
        return []
    decayed = [_decayed("ft", None, ratio, seed) for seed in SEEDS for ratio in RATIOS] + [
        _decayed("lora", 16, RATIOS[-1], seed) for seed in SEEDS
    ]
    normed = [
        replace(spec, model=replace(spec.model, rescale=entries))
        for seed in SEEDS[:2]
        for entries in RESCALED.values()
        for spec in [_decayed("ft", None, 2.5, seed)]
    ]
    return [*decayed, *normed, *(_decayed("dora", 16, ratio, 0) for ratio in (0.0, 2.5))]


def _decayed(method: str, rank: int | None, ratio: float, seed: int) -> Spec:
    """A run whose Σ η λ is that of full fine-tuning at δ = ratio · ΔD; adapters get the same, on what they train."""
    spec = small.trained(method, rank, RATES[method], seed)
    assert spec.optim is not None
    return replace(
        spec,
        experiment="sign",
        data=replace(spec.data, tasks=TRAINED, test_items=50),
        optim=replace(spec.optim, weight_decay=float(f"{weight_decay(RATES[method], ratio):.3g}")),
        probe=Probe(fractions=FRACTIONS),
    )


def weight_decay(rate: float, ratio: float) -> float:
    """The λ whose δ = 1 − Π(1 − η_t λ) is ratio · ΔD, to first order; η rises and falls in straight lines."""
    steps = -(-small.SMALL["train_items"] // small.SMALL["batch_size"])
    return ratio * DELTA_D / (rate * steps / 2)
