"""The test of the law of figure 2: the norms of a base set by hand, its function left as it was.

    dora-lab run sign_norms                                              # the embedded base, 288 runs of 25 s
    dora-lab run sign_norms --only model.name=NAME --model-dir FOLDER    # another base of `_sign_norms.BASES`, 54 runs

Layers of query, value and up are rescaled so that their norms go with the length |E| of the method's own step (n ∝
|E|^½), are flat, go against it (n ∝ 1/|E|), or stay as found; key, output and down take the inverse, so that every
output stays (`model.rescale`). Full fine-tuning, LoRA and DoRA, Σ η λ of 0, 2.4 and 20 times the method's own ΔD (the
paper's panel lies at 2.4), eight seeds. Training as in `sign`. What is predicted stands in registered/sign_norms.md,
written before.

Another base: `python -m dora_lab.mini.pretrain --seed N --out FOLDER` (52 minutes), six runs of it without decay, an
entry of `_sign_norms.BASES` as its script prints it, with the fingerprint of its folder as revision. Its runs are 54:
norms with |E| and against it, three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from dora_lab.spec import Probe, Spec, spec_id
from experiments._sign_norms import BASES, Base, delta_d, target
from experiments.sign import MINI_CELLS, MINI_SEEDS, decay_of_mini, decayed, of_mini

TIERS = ("mini",)
NORMS = ("found", "with", "flat", "against")
RATIOS = (0.0, 2.4, 20.0)  # Σ η λ / ΔD
SCALED = ("q_proj", "v_proj", "up_proj")
OTHER_NORMS, OTHER_SEEDS = ("with", "against"), MINI_SEEDS[:3]  # of another base: seeds of one repeat, bases test
FRACTIONS = (0.7, 0.8, 0.9, 1.0)  # late ones alone, fewer than `sign` has: 288 runs are a tenth of all records


class Cell(NamedTuple):
    """What a run is one of, but for its seed."""

    base: str
    method: str
    norms: str  # of `NORMS`
    ratio: float  # of `RATIOS`


def specs(tier: str) -> list[Spec]:
    """All runs, base by base and seed by seed."""
    return [spec for _, spec in _runs()]


@cache
def cells() -> dict[str, Cell]:
    """The cell of every run, by its id."""
    return {spec_id(spec): cell for cell, spec in _runs()}


def decay(base: Base, method: str, ratio: float) -> float:
    """δ = 1 − exp(−Σ η λ) of a cell."""
    return 1 - math.exp(-ratio * delta_d(base, method))


def grid(base: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(norms, seeds) of a base's runs."""
    return (NORMS, MINI_SEEDS) if base == "mini" else (OTHER_NORMS, OTHER_SEEDS)


def _runs() -> Iterator[tuple[Cell, Spec]]:
    for name, base in BASES.items():
        all_norms, seeds = grid(name)
        for seed in seeds:
            for method, rank in MINI_CELLS:
                spec = replace(of_mini("sign_norms", method, rank, seed), probe=Probe(fractions=FRACTIONS))
                for norms in all_norms:
                    model = replace(
                        spec.model, name=name, revision=base.revision, rescale=_rescale(base, method, norms)
                    )
                    for ratio in RATIOS:
                        weight_decay = decay_of_mini(spec, ratio * delta_d(base, method))
                        yield Cell(name, method, norms, ratio), decayed(replace(spec, model=model), weight_decay)


def _rescale(base: Base, method: str, norms: str) -> tuple[str, ...]:
    """The entries of `model.rescale`."""
    if norms == "found":
        return ()
    factors = {kind: target(base, method, kind, norms) / base.norms[kind] for kind in SCALED}
    return tuple(f"{kind}={'/'.join(f'{c:.4g}' for c in c_L)}" for kind, c_L in factors.items())
