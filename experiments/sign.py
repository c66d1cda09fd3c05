"""What decides the sign in figure 2: weight decay, the checkpoints and the base's norms.

    dora-lab run sign                             # mini: the embedded base, source mini2
    dora-lab run sign --tier small --data-dir DIR # SmolLM2's thirty layers

Full fine-tuning whose decoupled decay takes δ off every weight in all, LoRA and DoRA under as much Σ η λ (and, on the
mini tier, under as large a λ), and controls: decay on DoRA's m alone, on A and B alone, full fine-tuning of the
matrices alone, a constant rate, SGD with momentum at the rate of a sweep of its own. Small: also full fine-tuning on
one and the same function with its layers' norms set with and against the step's length (`model.rescale`). Training as
in `commonsense` and `small`; scored on few items, to see that the loss is one. What is predicted stands in
registered/sign.md, written before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from dora_lab.spec import Method, Optim, Probe, Spec, spec_id
from experiments import commonsense, small
from experiments._sign import DELTA_D, RATES, RESCALED

TIERS = ("mini", "small")
FRACTIONS = (0.25, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

DECAYS = (0.0, 0.005, 0.01, 0.025, 0.05)  # mini: δ of full fine-tuning
MINI_SEEDS = range(8)
MINI_CELLS = (("ft", None), ("lora", 8), ("dora", 8))

RATIOS = (0.0, 0.5, 1.0, 2.5, 5.0)  # small: δ / ΔD
TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
SEEDS = (0, 1, 2)


class Cell(NamedTuple):
    """What a run of the mini tier is one of, but for its seed."""

    method: str
    control: str  # of `CONTROLS`; "": none
    decay: float  # δ of the full fine-tuning whose Σ η λ (under `SAME`: whose λ) it has


class SmallCell(NamedTuple):
    """What a run of the small tier is one of, but for its seed."""

    method: str
    ratio: float  # of `RATIOS`
    norms: str  # "found", or of `RESCALED`


SAME = "same λ"  # as full fine-tuning: at an adapter's rate it takes more
M_ALONE, FACTORS_ALONE, MATRICES, CONSTANT = "m alone", "A and B alone", "matrices alone", "constant rate"
SGD = "SGD"
SGD_GRID = (0.01, 0.03, 0.09, 0.27, 0.81)
SGD_RATE = 0.063  # results/tables/rates: the vertex of the sweep, frozen before any run at it


def specs(tier: str) -> list[Spec]:
    """All runs, seed by seed."""
    if tier == "small":
        return [spec for _, spec in _small()]
    return [*sweep(), *confirmation()]


def sweep() -> list[Spec]:
    """Full fine-tuning by SGD at every rate of its grid, one seed, on validation items."""
    return [
        _with(replace(commonsense.swept("ft", None, rate, 100), experiment="sign"), optimizer="sgd")
        for rate in SGD_GRID
    ]


def confirmation() -> list[Spec]:
    """The runs of the mini tier that are judged, seed by seed."""
    return [spec for seed in MINI_SEEDS for _, spec in _mini(seed)]


@cache
def cells() -> dict[str, Cell]:
    """The cell of every run of the mini tier, by its id."""
    return {spec_id(spec): cell for seed in MINI_SEEDS for cell, spec in _mini(seed)}


def small_cells(sha256: str | None = None) -> dict[str, SmallCell]:
    """The cell of every run of the small tier on data of that hash, by its id."""
    return {spec_id(replace(spec, data=replace(spec.data, sha256=sha256))): cell for cell, spec in _small()}


def _mini(seed: int) -> Iterator[tuple[Cell, Spec]]:
    for method, rank in MINI_CELLS:
        spec = of_mini("sign", method, rank, seed)
        for decay in DECAYS:
            yield Cell(method, "", decay), decayed(spec, decay_of_mini(spec, _sum(decay)))
            if method != "ft" and decay:
                yield Cell(method, SAME, decay), decayed(spec, _of_ft(seed, decay))
    for decay in (0.0, 0.025):
        spec = of_mini("sign", "dora", 8, seed)
        if decay:
            for control, pattern in ((M_ALONE, "magnitude"), (FACTORS_ALONE, "lora_")):
                group = f"{pattern}=1:{decay_of_mini(spec, _sum(decay)):g}"
                yield Cell("dora", control, decay), _with(spec, groups=(group,))
        spec, weight_decay = of_mini("sign", "ft", None, seed), _of_ft(seed, decay)
        matrices = replace(spec, method=Method(name="ft_modules", target_modules=KINDS))
        yield Cell("ft", MATRICES, decay), decayed(matrices, weight_decay)
        # a constant rate adds up to twice as much, but for its warm-up
        yield Cell("ft", CONSTANT, decay), decayed(_with(spec, schedule="constant"), weight_decay / 2)
        by_sgd = _with(spec, optimizer="sgd", learning_rate=SGD_RATE)
        yield Cell("ft", SGD, decay), decayed(by_sgd, decay_of_mini(by_sgd, _sum(decay)))


def of_mini(experiment: str, method: str, rank: int | None, seed: int) -> Spec:
    """The run of `commonsense` with that seed, without decay, with more checkpoints, scored on few items."""
    spec = commonsense.at_its_rate(method, rank, seed)
    return replace(
        spec,
        experiment=experiment,
        data=replace(spec.data, test_items=10),
        probe=Probe(fractions=FRACTIONS),
        evaluation=replace(spec.evaluation, text="none"),
    )


def decay_of_mini(spec: Spec, amount: float) -> float:
    """The λ of Σ η λ = amount in a run of the mini tier."""
    return _weight_decay(_optim(spec), commonsense.MINI["train_items"], amount)


def _of_ft(seed: int, decay: float) -> float:
    return decay_of_mini(of_mini("sign", "ft", None, seed), _sum(decay))


def _sum(decay: float) -> float:
    """The Σ η λ of a δ."""
    return -math.log(1 - decay) or 0.0


def _small() -> Iterator[tuple[SmallCell, Spec]]:
    for seed in SEEDS:
        for ratio in RATIOS:
            yield SmallCell("ft", ratio, "found"), _of_small("ft", None, ratio, seed)
    for seed in SEEDS:
        yield SmallCell("lora", RATIOS[-1], "found"), _of_small("lora", 16, RATIOS[-1], seed)
    for seed in SEEDS[:2]:
        for norms, entries in RESCALED.items():
            spec = _of_small("ft", None, 2.5, seed)
            yield SmallCell("ft", 2.5, norms), replace(spec, model=replace(spec.model, rescale=entries))
    for ratio in (0.0, 2.5):
        yield SmallCell("dora", ratio, "found"), _of_small("dora", 16, ratio, 0)


def _of_small(method: str, rank: int | None, ratio: float, seed: int) -> Spec:
    """A run whose Σ η λ is ratio · ΔD of full fine-tuning; adapters get as much, on what they train."""
    spec = small.trained(method, rank, RATES[method], seed)
    spec = replace(
        spec,
        experiment="sign",
        data=replace(spec.data, tasks=TRAINED, test_items=50),
        probe=Probe(fractions=FRACTIONS),
    )
    return decayed(spec, _weight_decay(_optim(spec), small.SMALL["train_items"], ratio * DELTA_D))


def _weight_decay(optim: Optim, items: int, amount: float) -> float:
    """The λ of Σ η_t λ = amount, where η rises to its peak and falls to zero in straight lines."""
    return amount / (optim.learning_rate * optim.steps(items) / 2)


def decayed(spec: Spec, weight_decay: float) -> Spec:
    """The same run with decoupled weight decay, of three digits."""
    return _with(spec, weight_decay=float(f"{weight_decay:.3g}"))


def _with(spec: Spec, **changes: object) -> Spec:
    return replace(spec, optim=replace(_optim(spec), **changes))  # type: ignore[arg-type]


def _optim(spec: Spec) -> Optim:
    assert spec.optim is not None
    return spec.optim
