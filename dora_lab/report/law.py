"""What decides the sign of the correlation of ΔD with ΔM: the law of one row, and what it predicts for a base.

Of a row w₀ of norm n and its change E, with p = 1 + E·w₀/n² (radial) and d = 1 − cos(w₀ + E, w₀), exactly, where
cos > 0:

    |w₀ + E| / n = p / (1 − d),   growth = |w₀ + E| / n − 1 = (p − 1) + p d / (1 − d)

because p n is the length of w₀ + E along w₀, and 1 − d the cosine that this length has to the whole. What follows needs
assumptions, which the functions name. The derivation, and what the paper's reading says instead, are in
results/sign.md. numpy alone.

Shape legend: L = layers, R = values of decay / ΔD, N = draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

Floats = NDArray[np.float64]


def lora(n: ArrayLike, d: ArrayLike) -> Floats:
    """ΔM of rows of norm n turned by d where E is orthogonal to w₀: p = 1 (LoRA, nearly: no decay acts on W₀)."""
    d = np.asarray(d, float)
    return np.asarray(n, float) * d / (1 - d)


def full(n: ArrayLike, d: ArrayLike, decay: ArrayLike, inputs: int | None = None) -> Floats:
    """ΔM of rows of norm n turned by d under full fine-tuning with decoupled weight decay: n · mean |d − δ + noise|.

    E = −δ w₀ + what the gradients add, which is taken to point anywhere in the row's `inputs` dimensions: p − 1 is −δ
    and a normal deviate of spread √(2d / inputs). None: no such noise, n |d − δ|. To first order in d and δ.
    """
    mean = np.asarray(d, float) - np.asarray(decay, float)
    if inputs is None:
        return np.asarray(n, float) * np.abs(mean)
    return np.asarray(n, float) * _folded(mean, np.sqrt(2 * np.asarray(d, float) / inputs))


def learned(n: ArrayLike, decay: ArrayLike, mean: ArrayLike, sd: ArrayLike) -> Floats:
    """ΔM of rows whose magnitude is itself decayed and trained (DoRA): mean |−δ n + X|.

    X is what the gradients add, in weight units, normal over rows with that mean and deviation (of a training without
    decay: AdamW's step does not know the norm), whatever the row turns by.
    """
    mean = np.asarray(mean, float) - np.asarray(decay, float) * np.asarray(n, float)
    return _folded(mean, np.asarray(sd, float))


def turned(n: ArrayLike, e: ArrayLike) -> Floats:
    """d of rows of norm n that change by E, |E| = e, orthogonal to them."""
    n = np.asarray(n, float)
    return 1 - n / np.hypot(n, np.asarray(e, float))


def length(n: ArrayLike, d: ArrayLike) -> Floats:
    """|E| orthogonal to rows of norm n that turned by d: the inverse of `turned`."""
    return np.asarray(n, float) * np.sqrt((1 - np.asarray(d, float)) ** -2 - 1)


def decayed(peak: float, weight_decay: float, steps: float) -> float:
    """δ = 1 − Π(1 − η_t λ) of a schedule that rises to its peak and falls to zero in straight lines."""
    return float(1 - np.exp(-peak * weight_decay * steps / 2))


def curve(
    norms: ArrayLike, delta_d: float, spread: float, ratios: Sequence[float], inputs: int | None = None,
    model: Callable[..., Floats] = full, draws: int = 2000, seed: int = 20240209,
) -> pd.DataFrame:  # fmt: skip
    """r over layers of (ΔD, ΔM), against δ / ΔD, as the norms of a base alone let one expect it.

    Assumed: at one checkpoint, the layers' |E| are independent of their norms and lognormal with a standard deviation
    `spread` of log |E| (AdamW's steps: 0.06 to 0.08 was seen for full fine-tuning, 0.18 to 0.35 for adapters), and
    d = |E|² / 2n². So a base whose |E| goes with its norms, or against them, lies elsewhere: nothing here sees that.

    Args: norms: n_L, each layer's mean row norm; delta_d: mean ΔD of the layers; ratios: the R values of δ / ΔD;
        inputs: as in `full`; model: `full`, or a function of its arguments.
    Returns a row per ratio: ratio, r (median over draws), low and high (5 % and 95 % of them).
    Raises: ValueError for fewer than three layers, or norms, ΔD or spread that are not positive.
    """
    n_L = np.asarray(norms, float)
    if n_L.ndim != 1 or len(n_L) < 3 or not (n_L > 0).all() or delta_d <= 0 or spread <= 0:
        raise ValueError("a curve needs the positive norms of at least three layers, and a positive ΔD and spread")
    e_NL = np.exp(np.random.default_rng(seed).normal(0, spread, (draws, len(n_L))))
    d_NL = e_NL**2 / n_L**2
    d_NL *= delta_d / d_NL.mean(axis=1, keepdims=True)
    rows = []
    for ratio in ratios:
        r_N = pearson(d_NL, model(n_L, d_NL, ratio * delta_d, inputs))
        low, middle, high = np.quantile(r_N, (0.05, 0.5, 0.95))
        rows.append({"ratio": ratio, "r": middle, "low": low, "high": high})
    return pd.DataFrame(rows)


def _folded(mean: Floats, sd: Floats) -> Floats:
    """E |X| of X ~ N(mean, sd²); |mean| where sd is 0."""
    safe = np.where(sd > 0, sd, 1)
    value = safe * np.sqrt(2 / np.pi) * np.exp(-(mean**2) / (2 * safe**2)) + mean * erf(mean / (safe * np.sqrt(2)))
    return np.where(sd > 0, value, np.abs(mean))


def pearson(x_NL: Floats, y_NL: Floats) -> Floats:
    """r_N over the layers of each draw."""
    x_NL, y_NL = (a - a.mean(axis=1, keepdims=True) for a in (x_NL, y_NL))
    return (x_NL * y_NL).sum(axis=1) / np.sqrt((x_NL**2).sum(axis=1) * (y_NL**2).sum(axis=1))


ASSUMED = (
    "Full fine-tuning with weight decay, late in training; |E| lognormal over layers, independent of the norms: a base "
    "whose |E| goes with its norms lies above, one whose |E| goes against them below."
)
RATIOS = (0.0, 0.5, 1.0, 2.4, 5.0, 20.0, np.inf)  # 2.4: where the paper's panel of full fine-tuning lies


def prediction(norms: Sequence[dict[str, Any]], delta_d: float, spread: float) -> pd.DataFrame:
    """The curve of every kind of matrix that three layers or more have; a row per kind.

    norms: rows of `probing.norms`; delta_d, spread: as in `curve`. Columns: kind, layers, norm (mean of the layers'),
    s_n (standard deviation over layers of log norm), and per ratio r, low and high as text.
    """
    rows = []
    of_layers: Any = pd.DataFrame(norms).dropna(subset=["layer"])
    for kind, part in of_layers.groupby("kind", sort=False):
        layers = part.groupby("layer")["norm"].mean().to_numpy()
        if len(layers) < 3:
            continue
        found = curve(layers, delta_d, spread, [min(ratio, 1e9) for ratio in RATIOS], int(part["inputs"].iloc[0]))
        cells = {
            f"δ/ΔD {ratio:g}".replace("inf", "∞"): f"{r:+.2f} [{low:+.2f}, {high:+.2f}]"
            for ratio, r, low, high in zip(RATIOS, found["r"], found["low"], found["high"], strict=True)
        }
        about = {"kind": kind, "layers": len(layers), "norm": f"{layers.mean():.3g}"}
        rows.append(about | {"s_n": f"{np.std(np.log(layers)):.3f}"} | cells)
    return pd.DataFrame(rows)
