"""The learning rate that a sweep chooses: one rule for every cell of every experiment.

numpy alone: rates and losses in, a rate out. Nothing here knows a run or a test item: what is given are validation
losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SAME_STEP = 1e-3  # of a step of the grid, in log2: rates are written with few digits


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A cell's rate.

    `rate` is the vertex of the parabola, two digits; `lowest` the rate of the grid with the lowest mean loss; `at_end`:
    `lowest` is an end of the grid, so that every cell's grid has to be longer before anything is chosen; `losses` the
    mean loss at each rate (None: a seed is missing, as where training came to NaN).
    """

    rate: float
    lowest: float
    at_end: bool
    losses: Mapping[float, float | None]


def choose(losses: Mapping[float, Sequence[float]], seeds: int) -> Choice | None:
    """The rate at the vertex of the parabola through the lowest mean loss and its neighbours, over log2 of the rate.

    The parabola uses three means where their lowest alone would take the luckiest of a few seeds. It stays among what
    was tried: its vertex is at most half a step from the lowest. Where that is an end, or a neighbour has no mean, the
    lowest itself is the rate.

    Args: losses: rate -> validation loss of each seed (its logarithm where losses are compared as ratios); seeds: how
        many a rate must have to count.
    Returns None if no rate has all its seeds.
    Raises: ValueError for a grid whose rates are not equally far apart in log2.
    """
    rates = sorted(losses)
    steps = np.diff(np.log2(rates))
    if len(steps) and np.ptp(steps) > _SAME_STEP * steps[0]:
        raise ValueError(f"the rates {', '.join(f'{rate:g}' for rate in rates)} are not equally far apart in log2")
    means = {
        rate: float(np.mean(losses[rate])) if len(losses[rate]) == seeds and np.isfinite(losses[rate]).all() else None
        for rate in rates
    }
    known = {rate: mean for rate, mean in means.items() if mean is not None}
    if not known:
        return None
    lowest = min(known, key=known.__getitem__)
    place = rates.index(lowest)
    at_end = place in (0, len(rates) - 1)
    rate = lowest
    if not at_end:
        before, after = means[rates[place - 1]], means[rates[place + 1]]
        if before is not None and after is not None:
            rate = lowest * 2 ** (float(steps[0]) * _vertex(before, known[lowest], after))
    return Choice(rate=float(f"{rate:.1e}"), lowest=lowest, at_end=at_end, losses=means)


def _vertex(before: float, lowest: float, after: float) -> float:
    """Where the parabola through (-1, before), (0, lowest), (1, after) is lowest; in [-1/2, 1/2]."""
    bend = before - 2 * lowest + after
    return (before - after) / (2 * bend) if bend else 0.0  # three equal losses
