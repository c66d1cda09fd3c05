"""The one rule that decides a claim: paired over seeds, items of one fact together, adjusted, with equivalence.

A claim is about a combination of conditions (two methods; four, for a slope over ranks) that answered the same items
with the same seeds. Its value is the mean over seeds of the mean over tasks; accuracy in points of 100, a likelihood as
the logarithm of a ratio, in percent. What varies: the seeds, and the facts that the items happen to ask about, which
are the same for all seeds. So its variance is that of the seeds' means over n, plus the facts' share that no seed
averages away.

Verdicts: *holds* and *does not hold* (adjusted p < .05 on the claimed or the other side; "inside the margin" is added
where the 90 % interval lies within the margin), else *equivalent* (that interval lies within the margin: two one-sided
tests at 5 %), else *undecided*. *not inferior*: the one-sided 95 % bound lies above minus the margin.

Shape legend: S = seeds, I = items of a task, C = facts. numpy and scipy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
HOLDS, NOT, EQUIVALENT, NOT_INFERIOR, UNDECIDED = "holds", "does not hold", "equivalent", "not inferior", "undecided"
HYPOTHESES = ("superior", "not inferior", "equivalent")
# points of 100; percent of the likelihood
MARGINS = {"accuracy": 1.0, "choice_nll": 5.0, "normalised": 1.0, "answer_nll": 5.0}
LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A combination of conditions: points of accuracy, or percent of a likelihood (100 x the logarithm of a ratio).

    `sd` is the standard error, `df` its degrees of freedom (Satterthwaite); both None with one seed, which no interval
    can be had from. `of_seeds` is the share of the variance that more seeds would lower.
    """

    value: float
    sd: float | None
    df: float | None
    per_seed: tuple[float, ...]
    facts: int
    items: int
    of_seeds: float | None = None

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """The two-sided t interval, unadjusted."""
        if self.sd is None or self.df is None:
            return None
        half = float(stats.t.ppf(0.5 + level / 2, self.df)) * self.sd
        return self.value - half, self.value + half

    def p(self, against: float = 0.0, sides: int = 2) -> float | None:
        """p of "the value is `against`" (two sides), or of "it is no more than `against`" (one)."""
        if self.sd is None or self.df is None:
            return None
        if self.sd == 0:
            return float(self.value == against) if sides == 2 else float(self.value <= against)
        t = (self.value - against) / self.sd
        return float(2 * stats.t.sf(abs(t), self.df) if sides == 2 else stats.t.sf(t, self.df))


def contrast(
    terms: Sequence[tuple[float, Mapping[str, Floats]]], facts: Mapping[str, NDArray[np.int64]], ratio: bool
) -> Contrast:
    """The contrast of conditions.

    Args: terms: (coefficient, task -> values_SI) of each condition, the same tasks, seeds and items in all; facts: task
        -> number of the fact that each item asks about, (I,), the same number for the same fact in every task; ratio:
        values are likelihoods, compared by the logarithm of their macro means, else fractions compared by difference.
    Raises ValueError for conditions of other tasks, seeds or items.
    """
    tasks = list(facts)
    shapes = {(task, np.shape(values[task])) for _, values in terms for task in tasks if task in values}
    if not tasks or any(set(values) != set(tasks) for _, values in terms) or len(shapes) != len(tasks):
        raise ValueError(f"conditions of a contrast need the same tasks, seeds and items; got {sorted(shapes)}")
    macro = [(c, np.mean([values[task].mean(axis=1) for task in tasks], axis=0)) for c, values in terms]  # each (S,)
    per_seed = 100 * np.sum([c * (np.log(mean_S) if ratio else mean_S) for c, mean_S in macro], axis=0)
    scale = [100 * c / (mean_S.mean() if ratio else 1) for c, mean_S in macro]  # to first order, for the facts' share
    parts = {
        task: np.sum([s * values[task] for s, (_, values) in zip(scale, terms, strict=True)], axis=0) for task in tasks
    }
    numbers = np.unique(np.concatenate([np.asarray(facts[task]) for task in tasks]))
    seeds, m = len(per_seed), len(numbers)
    size = sum(len(facts[task]) for task in tasks)
    if seeds < 2:
        return Contrast(value=float(per_seed.mean()), sd=None, df=None, per_seed=tuple(per_seed), facts=m, items=size)
    u_SC = np.zeros((seeds, m))  # what each fact adds to each seed's mean
    for task, d_SI in parts.items():
        place = np.searchsorted(numbers, facts[task])
        off_SI = d_SI - d_SI.mean(axis=1, keepdims=True)
        for seed in range(seeds):
            u_SC[seed] += np.bincount(place, off_SI[seed], m) / d_SI.shape[1] / len(tasks)
    among_seeds = float(per_seed.var(ddof=1)) / seeds
    u_C = u_SC.mean(axis=0)
    among_facts = float((u_C**2).sum()) * m / max(m - 1, 1)
    both = (
        float(((u_SC - u_C) ** 2).sum()) * m / max(m - 1, 1) / (seeds * (seeds - 1))
    )  # in both of them: once too often
    shared = max(0.0, among_facts - both)
    variance = among_seeds + shared
    spread = among_seeds**2 / (seeds - 1) + (among_facts**2 / max(m - 1, 1) if shared else 0.0)
    df = variance**2 / spread if spread else float(seeds - 1)
    return Contrast(
        value=float(per_seed.mean()), sd=float(np.sqrt(variance)), df=df, per_seed=tuple(map(float, per_seed)), facts=m,
        items=size, of_seeds=among_seeds / variance if variance else None,
    )  # fmt: skip


def of_values(values: Sequence[float]) -> Contrast:
    """The mean of one number per seed (or of another independent draw), with t over them."""
    sd = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    df = None if sd is None else float(len(values) - 1)
    return Contrast(value=float(np.mean(values)), sd=sd, df=df, per_seed=tuple(values), facts=0, items=0)


def from_printed(
    values: Sequence[float], printed: float, noise: float | None = None, rounding: float = 0.05
) -> Contrast:
    """Our runs, which differ in the seed alone, less a printed number: of a run that differs in the seed as well.

    Args: values, printed: points; rounding: half a unit of the last printed digit, which the difference is brought
        nearer to 0 by; noise: the standard error of a single value that no seed moves (0: of the same items), where
        there is no spread over seeds to be had.
    """
    off = float(np.mean(values)) - printed
    off = float(np.sign(off)) * max(0.0, abs(off) - rounding - 1e-6)  # a printed 0.05 may have been rounded either way
    sd, df = noise, None if noise is None else np.inf
    if noise is None and len(values) > 1:
        sd, df = float(np.std(values, ddof=1) * np.sqrt(1 + 1 / len(values))), float(len(values) - 1)
    per_seed = tuple(value - printed for value in values)
    return Contrast(value=off, sd=sd, df=df, per_seed=per_seed, facts=0, items=0)


def p_value(found: Contrast, hypothesis: str, margin: float) -> float | None:
    """What is adjusted for a family: two-sided against 0, or of inferiority by the margin (one-sided)."""
    return found.p(-margin, sides=1) if hypothesis == NOT_INFERIOR else found.p()


def decide(found: Contrast, hypothesis: str, margin: float, p: float | None) -> str:
    """The verdict on a claim that the contrast's value is above 0 (`superior`), above minus the margin, or within it.

    p: of `p_value`, adjusted for the family that the claim is of. Raises ValueError for an unknown hypothesis.
    """
    if hypothesis not in HYPOTHESES:
        raise ValueError(f"hypothesis {hypothesis!r} is not one of {', '.join(HYPOTHESES)}")
    inner = found.interval(1 - 2 * LEVEL)
    if p is None or inner is None:
        return UNDECIDED
    within = -margin < inner[0] and inner[1] < margin
    if hypothesis == NOT_INFERIOR:
        return NOT_INFERIOR if p < LEVEL else NOT if inner[1] < -margin else UNDECIDED
    if hypothesis == EQUIVALENT:
        return EQUIVALENT if within else NOT if p < LEVEL else UNDECIDED
    if p < LEVEL:
        return (HOLDS if found.value > 0 else NOT) + (", inside the margin" if within else "")
    return EQUIVALENT if within else UNDECIDED


def placed(interval: tuple[float, float] | None, low: float, high: float) -> str:
    """The verdict on a claim that a number lies between low and high, from its 95 % interval.

    *holds* where all of the interval does, *does not hold* where none of it does, else (and without one) *undecided*.
    """
    if interval is None:
        return UNDECIDED
    if low < interval[0] and interval[1] < high:
        return HOLDS
    return NOT if interval[1] <= low or interval[0] >= high else UNDECIDED


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of hypotheses outside a registered family (false discovery rate), in the order given; in [0, 1]."""
    return list(map(float, stats.false_discovery_control(p_values))) if len(p_values) else []
