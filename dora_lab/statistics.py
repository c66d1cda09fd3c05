"""Statistics of the reading side: correlations within seeds, paired contrasts over seeds and items.

numpy and scipy only. Nothing here knows a run, a method or a file: arrays in, numbers with intervals out.

Shape legend: S = seeds, I = items of one task, B = bootstrap replicates, P = points (layer x checkpoint).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    same number for every seed alone, `n` says in words what was counted, `test` names the computation.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    per_seed: tuple[float, ...]
    n: str
    test: str


def correlation(points: Mapping[int, tuple[ArrayLike, ArrayLike]]) -> Estimate | None:
    """Pearson correlation of x_P and y_P inside each seed, averaged over seeds as Fisher z (weights P - 3).

    Seeds are not pooled: a shift between seeds would otherwise pass for a correlation. The interval treats the points
    of one seed as independent, as a plain Pearson r over layers and checkpoints (section 4.1) does; checkpoints of
    one layer are not, so read it as a lower bound of the uncertainty. With one seed it is scipy's own interval.

    Args: points: seed -> (x_P, y_P). Returns None if no seed has two points that differ in x and y.
    Raises: ValueError if x and y of a seed differ in length or hold a NaN.
    """
    found: list[tuple[float, int, float, float, float]] = []  # r, P, low, high, p
    for seed, (x, y) in points.items():
        x_P, y_P = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        if x_P.shape != y_P.shape or np.isnan(x_P).any() or np.isnan(y_P).any():
            raise ValueError(
                f"correlation of seed {seed}: x and y must be of one length and without NaN; "
                f"got shapes {x_P.shape} and {y_P.shape}. Check probe.jsonl of that run."
            )
        if len(x_P) < 2 or np.ptp(x_P) == 0 or np.ptp(y_P) == 0:
            continue
        result: Any = stats.pearsonr(x_P, y_P)
        interval = result.confidence_interval(LEVEL)
        found.append(
            (float(result.statistic), len(x_P), float(interval.low), float(interval.high), float(result.pvalue))
        )
    if not found:
        return None
    per_seed = tuple(r for r, *_ in found)
    sizes = {size for _, size, *_ in found}
    n = f"{_count(len(found), 'seed')} × {'/'.join(map(str, sorted(sizes)))} points"
    test = "Pearson r within a seed, Fisher mean over seeds"
    if len(found) == 1:
        r, size, low, high, p = found[0]
        usable = size > 3
        return Estimate(
            value=r,
            low=low if usable else None,
            high=high if usable else None,
            p=p if usable else None,
            per_seed=per_seed,
            n=n,
            test="Pearson r, one seed",
        )
    weights = np.array([max(size - 3, 0) for _, size, *_ in found], dtype=float)
    if weights.sum() == 0:
        return Estimate(value=float(np.mean(per_seed)), low=None, high=None, p=None, per_seed=per_seed, n=n, test=test)
    z = float(np.average(np.arctanh(np.clip(per_seed, -1 + 1e-15, 1 - 1e-15)), weights=weights))
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


def contrast_over_items(tasks: Mapping[str, NDArray[np.float64]], replicates: int = REPLICATES) -> Estimate:
    """Macro-averaged paired difference with a bootstrap over seeds and items (both resampled, crossed).

    Args: tasks: task -> d_SI, the difference of correctness (for two methods: -1, 0 or 1) for every seed and item;
        every task has the same seeds in the same order, and the items of a task are the same for every seed.
    Returns the mean over tasks of the task means (so a small task weighs as much as a large one), as a fraction.
        Items are resampled within a task, once for all seeds, because all seeds answer the same items. With one seed
        only the items vary. With few seeds resampling understates what a new seed would do; look at `per_seed` too.
    Raises: ValueError if there are no tasks, a task has no items, or the numbers of seeds differ.
    """
    shapes = {name: np.shape(d_SI) for name, d_SI in tasks.items()}
    if not shapes or any(len(s) != 2 or 0 in s for s in shapes.values()) or len({s[0] for s in shapes.values()}) != 1:
        raise ValueError(
            f"contrast_over_items: every task needs the same number of seeds and at least one item; "
            f"got shapes (seeds, items) {shapes}. Check the `correct` strings in eval.jsonl."
        )
    seeds = next(iter(shapes.values()))[0]
    generator = np.random.default_rng(_SEED)
    per_seed_S = np.mean([d_SI.mean(axis=1) for d_SI in tasks.values()], axis=0)
    means_BS = np.zeros((replicates, seeds))
    for d_SI in tasks.values():
        items = d_SI.shape[1]
        for start in range(0, replicates, 500):  # in pieces: counts of all replicates of 10,000 items are 320 MB
            stop = min(start + 500, replicates)
            counts_BI = generator.multinomial(items, np.full(items, 1 / items), size=stop - start)
            means_BS[start:stop] += counts_BI @ d_SI.T / items / len(tasks)
    weights_BS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds
    values_B = (means_BS * weights_BS).sum(axis=1)
    low, high = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min(int((values_B <= 0).sum()), int((values_B >= 0).sum()))
    total = sum(shape[1] for shape in shapes.values())
    return Estimate(
        value=float(per_seed_S.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (beyond + 1) / (replicates + 1)),
        per_seed=tuple(map(float, per_seed_S)),
        n=f"{_count(seeds, 'seed')} × {total} items",
        test="paired bootstrap over seeds and items",
    )


def contrast_over_tasks(tasks: Mapping[str, Sequence[float]]) -> Estimate:
    """The same difference from task accuracies alone (where no item-level record exists): a paired t-test.

    Args: tasks: task -> d_S, the difference of accuracy (fraction) for every seed; the unit of the test is one
        (seed, task) pair, so it asks whether the difference is the same over tasks, not over items.
    Raises: ValueError if tasks is empty or the numbers of seeds differ.
    """
    lengths = {name: len(d_S) for name, d_S in tasks.items()}
    if not lengths or 0 in lengths.values() or len(set(lengths.values())) != 1:
        raise ValueError(
            f"contrast_over_tasks: every task needs the same number of seeds, at least one; got {lengths}."
        )
    d_TS = np.array([list(d_S) for d_S in tasks.values()], dtype=float)
    low = high = p = None
    if d_TS.size > 1 and np.ptp(d_TS) > 0:
        result: Any = stats.ttest_1samp(d_TS.ravel(), 0.0)
        interval = result.confidence_interval(LEVEL)
        low, high, p = float(interval.low), float(interval.high), float(result.pvalue)
    return Estimate(
        value=float(d_TS.mean()),
        low=low,
        high=high,
        p=p,
        per_seed=tuple(map(float, d_TS.mean(axis=0))),
        n=f"{_count(d_TS.shape[1], 'seed')} × {_count(d_TS.shape[0], 'task')}",
        test="paired t over seed × task",
    )


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
