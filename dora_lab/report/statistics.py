"""Statistics of the reading side: correlations within seeds, and what is taken over seeds.

numpy and scipy only. Nothing here knows a run, a method or a file: arrays in, numbers with intervals out.

Shape legend: S = seeds, B = bootstrap replicates, P = points (layer x checkpoint), L = layers, C = checkpoints, Q = C,
or 1 where all checkpoints share one mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
REPLICATES = 4000
_SEED = 20240209  # fixed: a table built twice from the same records is the same table


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One number with its uncertainty.

    `value` is in the unit of what was estimated (a correlation in [-1, 1], or accuracy as a fraction), `low` and
    `high` bound the 95 % interval (None where there are too few data for one), `p` is two-sided, `per_seed` holds the
    same number for every seed alone, `n` says in words what was counted, `test` names the computation. `resampled` is a
    second interval, by resampling, where there is one.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    per_seed: tuple[float, ...]
    n: str
    test: str
    resampled: tuple[float, float] | None = None


def correlation(points: Mapping[int, tuple[ArrayLike, ArrayLike]], lost: int = 0) -> Estimate | None:
    """Pearson correlation of x_P and y_P inside each seed, averaged over seeds as Fisher z (weights P - lost - 3).

    Seeds are not pooled: a shift between seeds would otherwise pass for a correlation. The interval treats the points
    of one seed as independent, as a plain Pearson r over layers and checkpoints (section 4.1) does; checkpoints of
    one layer are not, so read it as a lower bound of the uncertainty. With one seed it is scipy's own interval.

    Args: points: seed -> (x_P, y_P); lost: degrees of freedom that centring the points has cost (means taken off beyond
        the first). Returns None if no seed has two points that differ in x and y.
    Raises: ValueError if x and y of a seed differ in length or hold a NaN.
    """
    found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for seed, (x, y) in points.items():
        x_P, y_P = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        if x_P.shape != y_P.shape or np.isnan(x_P).any() or np.isnan(y_P).any():
            raise ValueError(
                f"correlation of seed {seed}: x and y must be of one length and without NaN; "
                f"got shapes {x_P.shape} and {y_P.shape}. Check probe.jsonl of that run."
            )
        if len(x_P) > 1 and np.ptp(x_P) > 0 and np.ptp(y_P) > 0:
            found.append((x_P, y_P))
    if not found:
        return None
    per_seed = tuple(_pearson(x_P, y_P) for x_P, y_P in found)
    n = f"{_count(len(found), 'seed')} × {'/'.join(map(str, sorted({len(x_P) for x_P, _ in found})))} points"
    test = "Pearson r within a seed, Fisher mean over seeds"
    if len(found) == 1 and not lost:
        test = "Pearson r, one seed"
        if len(found[0][0]) > 3:
            result: Any = stats.pearsonr(*found[0])
            ends = result.confidence_interval(LEVEL)
            return Estimate(
                value=per_seed[0], low=float(ends.low), high=float(ends.high), p=float(result.pvalue),
                per_seed=per_seed, n=n, test=test,
            )  # fmt: skip
    weights = np.array([max(len(x_P) - lost - 3, 0) for x_P, _ in found], dtype=float)
    if weights.sum() == 0:
        return Estimate(value=float(np.mean(per_seed)), low=None, high=None, p=None, per_seed=per_seed, n=n, test=test)
    z = float(np.average(fisher_z(per_seed), weights=weights))
    half = float(stats.norm.ppf(0.5 + LEVEL / 2) / np.sqrt(weights.sum()))
    p = float(2 * stats.norm.sf(abs(z) * np.sqrt(weights.sum())))
    return Estimate(
        value=float(np.tanh(z)),
        low=float(np.tanh(z - half)),
        high=float(np.tanh(z + half)),
        p=p,
        per_seed=per_seed,
        n=n,
        test=test,
    )


def _pearson(x_P: NDArray[np.float64], y_P: NDArray[np.float64]) -> float:
    """As scipy's `pearsonr`, which computes a p beside it that takes ten times as long."""
    x_P, y_P = x_P - x_P.mean(), y_P - y_P.mean()
    return float(np.clip(x_P / np.linalg.norm(x_P) @ (y_P / np.linalg.norm(y_P)), -1.0, 1.0))


VIEWS = {  # what of ΔD and ΔM is correlated; each answers another question
    "pooled": "all layers and checkpoints as points, as the paper's figure 2 draws them",
    "between layers": "each checkpoint's mean taken off: whether layers that turn more also grow more",
    "over time": "each layer's mean taken off: whether both grow while training goes on",
    "changes": "what each checkpoint adds to the one before it (the first: to zero)",
}


def layer_correlation(points: Mapping[int, tuple[ArrayLike, ArrayLike]], view: str = "pooled") -> Estimate | None:
    """`correlation` of x_LC and y_LC in one of `VIEWS`, with a second interval by resampling layers.

    The Fisher interval takes the points of a seed for independent. `resampled` does not: layers are drawn with
    replacement, each with all its checkpoints, the same draw for every seed (all train the same layers), and seeds are
    drawn too; the 2.5 and 97.5 % quantiles of the recomputed mean. With few layers (four here) such an interval is too
    narrow, as every cluster bootstrap is; draws in which nothing varies are left out.

    Args: points: seed -> (x_LC, y_LC), the same layers and checkpoints for every seed. Returns None if no seed varies.
    Raises: ValueError for an unknown view, for matrices of different shapes, and what `correlation` raises.
    """
    if view not in VIEWS:
        raise ValueError(f"view {view!r} is not one of {', '.join(VIEWS)}")
    full = {seed: (np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for seed, (x, y) in points.items()}
    if len({values.shape for pair in full.values() for values in pair}) > 1:
        raise ValueError("layer_correlation: every seed needs the same layers and checkpoints; check probe.jsonl")
    seen = {seed: (_view(x, view), _view(y, view)) for seed, (x, y) in full.items()}
    layers, checkpoints = next(iter(seen.values()))[0].shape if seen else (0, 0)
    lost = {"between layers": checkpoints - 1, "over time": layers - 1}.get(view, 0)
    found = correlation({seed: (x.ravel(), y.ravel()) for seed, (x, y) in seen.items()}, lost)
    varying = [pair for pair in seen.values() if min(np.ptp(pair[0]), np.ptp(pair[1])) > 0]
    return None if found is None else replace(found, resampled=_resampled(varying, view == "between layers"))


def cautious(found: Estimate) -> Estimate:
    """The estimate of `layer_correlation` with an interval that does not take its points for independent.

    Of two seeds or more, Student's t over seeds of Fisher's z; of one, layers resampled with all their checkpoints.
    No interval, and no p, where neither can be had: one layer, or seeds without spread.
    """
    if len(found.per_seed) > 1:
        over = over_seeds(list(fisher_z(found.per_seed)))
        ends = None if over is None or over.low is None or over.high is None else np.tanh([over.low, over.high])
        p, test = over and over.p, "t over seeds of Fisher's z"
    else:
        ends, p, test = found.resampled, None, "layers resampled"
    low, high = (None, None) if ends is None or ends[0] == ends[1] else (float(ends[0]), float(ends[1]))
    return replace(found, low=low, high=high, p=p, test=test)


def layer_slope(points: Mapping[int, tuple[ArrayLike, ArrayLike]]) -> Estimate | None:
    """Least-squares slope of y_LC on x_LC (units of y per x) within each seed, mean over seeds; interval as `cautious`.

    Args: points: seed -> (x_LC, y_LC). Returns None if x varies in no seed.
    """
    full = [(np.asarray(x, dtype=float), np.asarray(y, dtype=float)) for x, y in points.values()]
    full = [(x, y) for x, y in full if np.ptp(x) > 0]
    if not full:
        return None
    slopes = tuple(float(np.polyfit((x - x.mean()).ravel(), y.ravel(), 1)[0]) for x, y in full)
    if over := over_seeds(slopes):
        return over
    found = Estimate(
        value=float(np.mean(slopes)), low=None, high=None, p=None, per_seed=slopes, n=_count(len(slopes), "seed"),
        test="layers resampled",
    )  # fmt: skip
    if len(slopes) > 1:
        return found
    x_LC, y_LC = full[0]
    slope_B = _weighted(_drawn(len(x_LC), 1)[0], x_LC, y_LC, False)[1]
    low, high = map(float, np.nanquantile(slope_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return found if low == high else replace(found, low=low, high=high)


def _view(x_LC: NDArray[np.float64], view: str) -> NDArray[np.float64]:
    if view == "changes":
        return np.diff(x_LC, axis=1, prepend=0.0)
    if view == "pooled":
        return x_LC
    return x_LC - x_LC.mean(axis=0 if view == "between layers" else 1, keepdims=True)


def _resampled(seeds: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], each: bool) -> tuple[float, float]:
    """Interval of the Fisher mean over resampled layers and seeds; each: checkpoint means are taken off anew."""
    counts_BL, weights_BS = _drawn(len(seeds[0][0]), len(seeds))
    z_BS = np.stack([fisher_z(_weighted(counts_BL, *pair, each)[0]) for pair in seeds], 1)
    known_BS = weights_BS * ~np.isnan(z_BS)
    usable_B = known_BS.sum(axis=1) > 0
    mean_B = (known_BS * np.nan_to_num(z_BS)).sum(axis=1)[usable_B] / known_BS.sum(axis=1)[usable_B]
    low, high = np.tanh(np.quantile(mean_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return float(low), float(high)


@lru_cache(maxsize=64)  # a table asks for some hundred intervals of as many layers and seeds
def _drawn(layers: int, seeds: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often each layer, and each seed, is in each of `REPLICATES` draws: counts_BL, counts_BS."""
    generator = np.random.default_rng(_SEED)
    counts = [generator.multinomial(n, np.full(n, 1 / n), size=REPLICATES) for n in (layers, seeds)]
    return counts[0].astype(float), counts[1].astype(float)


def _weighted(
    counts_BL: NDArray[np.float64], x_LC: NDArray[np.float64], y_LC: NDArray[np.float64], each: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pearson's r_B, and the slope_B of y on x, with each layer counted so often; nan where x (or, for r, y) does not
    vary."""
    x_LC, y_LC = (v - v.mean() for v in (x_LC, y_LC))  # near zero: sums of squares keep their digits

    def sums(v_LC: NDArray[np.float64]) -> NDArray[np.float64]:
        return counts_BL @ (v_LC if each else v_LC.sum(axis=1, keepdims=True))

    n = counts_BL.shape[1] * (1 if each else x_LC.shape[1])
    sx_BQ, sy_BQ = sums(x_LC), sums(y_LC)
    xy_B = (sums(x_LC * y_LC) - sx_BQ * sy_BQ / n).sum(axis=1)
    xx_B, yy_B = ((sums(v * v) - s * s / n).sum(axis=1) for v, s in ((x_LC, sx_BQ), (y_LC, sy_BQ)))
    floor = [1e-12 * float((v * v).sum()) for v in (x_LC, y_LC)]
    turns_B = xx_B > floor[0]
    varies_B = turns_B & (yy_B > floor[1])
    r_B = np.where(varies_B, xy_B, np.nan) / np.sqrt(np.where(varies_B, xx_B * yy_B, 1.0))
    return r_B, np.where(turns_B, xy_B, np.nan) / np.where(turns_B, xx_B, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment for testing several hypotheses at once, in the order given; each in [0, 1]."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p
    return [float(value) for value in np.minimum(adjusted, 1.0)]


def over_seeds(values_S: Sequence[float]) -> Estimate | None:
    """Mean of one number per seed, Student's t interval, p against zero; None below two seeds or without spread."""
    if len(values_S) < 2 or np.ptp(values_S) == 0:
        return None
    result: Any = stats.ttest_1samp(values_S, 0.0)
    interval = result.confidence_interval(LEVEL)
    return Estimate(
        value=float(np.mean(values_S)),
        low=float(interval.low),
        high=float(interval.high),
        p=float(result.pvalue),
        per_seed=tuple(map(float, values_S)),
        n=_count(len(values_S), "seed"),
        test="t over seeds",
    )


def mean_interval(values_S: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean and ends of its 95 % interval (`over_seeds`); no ends below two seeds or without spread."""
    mean, _ = mean_sd(values_S)
    found = over_seeds(values_S)
    return (mean, None, None) if found is None else (mean, found.low, found.high)


def fisher_z(r: ArrayLike) -> NDArray[np.float64]:
    """atanh r, the scale on which differences of correlations are taken; finite for r = -1 and 1 too."""
    return np.arctanh(np.clip(np.asarray(r, dtype=float), -1 + 1e-15, 1 - 1e-15))


def prediction_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where one more value of the same (normal) population lies with probability `LEVEL`.

    mean +- t(n-1) s sqrt(1 + 1/n), in the unit of the values. Raises: ValueError for fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"prediction_interval: needs at least two values, got {len(values)}")
    half = stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) * np.sqrt(1 + 1 / len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); the latter None for one value, both None for none."""
    if not len(values):
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
