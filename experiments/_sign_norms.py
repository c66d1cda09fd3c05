"""What experiment `sign_norms` was given before its runs, and what the law makes of it: measured, frozen.

    python -m experiments._sign_norms RESULTS    # prints an entry of `BASES` for each base of the runs in RESULTS

Measured in runs without decay of seeds that are judged nowhere, at the last checkpoint: each layer's norm n, the length
|E| of what turned its rows, and what DoRA's m learned. AdamW's step does not know the norm, so |E| stays where a layer
is rescaled. Those runs are `of_mini("sign", METHOD, RANK, SEED)` of experiments/sign.py.

Shape legend: L = layers, N = draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dora_lab.io.limits import PARTNERS
from dora_lab.report import law

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")  # scaled, and their partners
SEEDS = (100, 101)
SPREAD = {"ft": 0.03, "lora": 0.1, "dora": 0.1}  # of log |E|: a little above what these two seeds differ by in a layer
DRAWS = 2000
HIDDEN, INPUTS = 128, {"down_proj": 384}  # inputs of a row
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base as found, layer by layer: kind -> values of its layers; method -> kind -> values of its layers."""

    revision: str | None  # the fingerprint of its folder; None: the embedded one
    norms: dict[str, tuple[float, ...]]  # mean row norm
    lengths: dict[str, dict[str, tuple[float, ...]]]  # |E|
    learned: dict[str, tuple[tuple[float, float], ...]]  # DoRA: mean and deviation over rows of what m changed by


BASES: dict[str, Base] = {
    # runs 9f96425a7cad, cfa7cb40f11b, 895b90ae49c8 (seed 100), a5b27a21d0df, 8f80c9458aac, 9a1e24ff9a7c (seed 101)
    "mini": Base(
        revision=None,
        norms={
            "q_proj": (1.48, 1.59, 1.701, 1.487), "k_proj": (1.437, 1.531, 1.623, 1.468),
            "v_proj": (1.459, 1.373, 1.653, 2.396), "o_proj": (1.463, 1.328, 1.597, 2.285),
            "up_proj": (1.581, 1.894, 2.022, 2.116), "down_proj": (3.055, 3.1, 3.233, 3.348),
        },
        lengths={
            "ft": {
                "q_proj": (0.1125, 0.1116, 0.1179, 0.1262), "k_proj": (0.1214, 0.1111, 0.1144, 0.1213),
                "v_proj": (0.129, 0.1056, 0.09805, 0.1051), "o_proj": (0.1056, 0.1065, 0.1035, 0.1036),
                "up_proj": (0.3603, 0.2098, 0.1918, 0.1217), "down_proj": (0.1909, 0.197, 0.1975, 0.223),
            },
            "lora": {
                "q_proj": (0.3418, 0.4196, 0.4343, 0.547), "k_proj": (0.327, 0.3931, 0.4447, 0.4209),
                "v_proj": (0.3092, 0.4127, 0.431, 0.4063),
                "up_proj": (0.846, 0.7224, 0.7756, 0.6502), "down_proj": (0.5859, 0.6807, 0.8133, 0.9693),
            },
            "dora": {
                "q_proj": (0.3094, 0.4205, 0.4325, 0.5497), "k_proj": (0.3176, 0.4055, 0.4486, 0.4236),
                "v_proj": (0.3061, 0.4384, 0.4483, 0.4151),
                "up_proj": (0.8541, 0.745, 0.7981, 0.6689), "down_proj": (0.5949, 0.7072, 0.8534, 0.9876),
            },
        },
        learned={
            "q_proj": ((-0.00229, 0.05152), (0.007629, 0.06065), (0.008342, 0.06049), (0.01308, 0.06224)),
            "k_proj": ((6.688e-05, 0.05117), (0.009922, 0.06001), (0.008154, 0.05745), (0.01095, 0.06197)),
            "v_proj": ((-0.01266, 0.05708), (-0.009834, 0.0591), (0.002821, 0.06097), (0.006712, 0.06615)),
            "up_proj": ((0.01153, 0.06685), (0.003207, 0.06672), (-0.00133, 0.06762), (-0.0006762, 0.07051)),
            "down_proj": ((0.002944, 0.06111), (-0.0003854, 0.06586), (-0.0001975, 0.07241), (0.01172, 0.07685)),
        },
    ),
}  # fmt: skip


def target(base: Base, method: str, kind: str, norms: str) -> Floats:
    """n_L of a kind's layers: as "found", "flat", "with" the method's |E| (n ∝ |E|^½) or "against" it (n ∝ 1 / |E|).

    Of query, value and up, whose mean is kept; a partner's norms are divided by what these are multiplied by.
    """
    n_L = np.array(base.norms[kind])
    if norms == "found":
        return n_L
    if kind in (partner_of := {partner: scaled for scaled, partner in PARTNERS.items()}):
        scaled = partner_of[kind]
        return n_L * base.norms[scaled] / target(base, method, scaled, norms)
    e_L = np.array(base.lengths[method][kind])
    shape_L = {"with": np.sqrt(e_L), "flat": np.ones_like(e_L), "against": 1 / e_L}[norms]
    return shape_L * n_L.mean() / shape_L.mean()


def predicted(base: Base, method: str, kind: str, norms: str, decay: float) -> tuple[float, float, float]:
    """r over the layers of (ΔD, ΔM) at the last checkpoint, by the law: with |E| as measured, and 5 % and 95 % of draws
    in which every layer's |E| differs by `SPREAD`.

    decay: δ of what is decayed: of W (full fine-tuning), of m (DoRA), of nothing that reaches W₀ (LoRA).
    """
    n_L, e_L = target(base, method, kind, norms), np.array(base.lengths[method][kind])
    draws_NL = np.random.default_rng(20240209).normal(0, SPREAD[method], (DRAWS, len(e_L)))
    e_NL = e_L * np.exp(np.concatenate([np.zeros((1, len(e_L))), draws_NL]))
    if method == "lora":
        d_NL = law.turned(n_L, e_NL)
        m_NL = law.lora(n_L, d_NL)
    elif method == "dora":
        d_NL = law.turned(n_L, e_NL)
        m_NL = np.broadcast_to(law.learned(n_L, decay, *np.array(base.learned[kind]).T), d_NL.shape)
    else:
        d_NL = law.turned(n_L * (1 - decay), e_NL)  # what is left of W₀ turns further
        m_NL = law.full(n_L, d_NL, decay, INPUTS.get(kind, HIDDEN))
    r_N = law.pearson(d_NL, m_NL)
    low, high = np.quantile(r_N[1:], (0.05, 0.95))
    return float(r_N[0]), float(low), float(high)


def delta_d(base: Base, method: str, kinds: tuple[str, ...] = ("q_proj", "v_proj")) -> float:
    """Mean ΔD of the layers as found; of query and value: what δ is a multiple of."""
    means = [law.turned(base.norms[kind], base.lengths[method][kind]).mean() for kind in kinds]
    return float(np.mean(means))


def measured(probes: pd.DataFrame, revision: str | None) -> Base:
    """The base that the runs of one model without decay were made on; means over `SEEDS`, of |E| geometric.

    Raises ValueError where a method lacks a seed.
    """
    last = probes[(probes["fraction"] == 1) & (probes["optim.weight_decay"] == 0) & probes["seed"].isin(SEEDS)]
    last = last[(last["optim.groups"] == "[]") & (last["optim.schedule"] == "linear") & last["kind"].isin(KINDS)]
    moved = last[last["delta_d"] > 0]  # an adapter leaves the output matrices where they were
    moved = moved.assign(n=moved["delta_m"] / moved["delta_m_share"])
    moved["log_e"] = np.log(law.length(moved["n"], moved["delta_d"]))
    for method in ("ft", "lora", "dora"):
        if (seeds := set(moved.loc[moved["method"] == method, "seed"])) != set(SEEDS):
            raise ValueError(
                f"{method}: runs without decay of seeds {sorted(seeds)}, expected {SEEDS}; make the others"
            )
    columns = ["n", "log_e", "delta_m_signed", "delta_m_sd"]
    means = moved.groupby(["method", "kind", "layer"])[columns].mean()
    norms: dict[str, tuple[float, ...]] = {}
    lengths: dict[str, dict[str, tuple[float, ...]]] = {}
    learned: dict[str, tuple[tuple[float, float], ...]] = {}
    for (method, kind), part in means.groupby(["method", "kind"]):
        norms[kind] = _rounded(part["n"])
        lengths.setdefault(method, {})[kind] = _rounded(np.exp(part["log_e"]))
        if method == "dora":
            learned[kind] = tuple(zip(_rounded(part["delta_m_signed"]), _rounded(part["delta_m_sd"]), strict=True))
    return Base(revision=revision, norms=norms, lengths=lengths, learned=learned)


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)


if __name__ == "__main__":
    import sys
    from pathlib import Path
    from pprint import pprint

    from dora_lab import report

    found = report.frame(Path(sys.argv[1]), "sign", "probe")
    for (model, pinned), rows in found.groupby(["model", "model.revision"], dropna=False):
        pprint({model: measured(rows, None if pd.isna(pinned) else pinned)}, width=118)
