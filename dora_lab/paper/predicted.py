"""Predictions of a number, written down before the runs, against the runs: over seeds, by one interval.

A registered file says where a number will lie (a z below 0, a difference inside 0.3) and what would refute it. Here is
the rule for all of them; which number of which runs it is, the experiment's table says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from dora_lab.paper.verdict import HOLDS, NOT, UNDECIDED, placed
from dora_lab.report.statistics import over_seeds

REFUTED, NOT_RUN = "refuted", "not run"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """That a number, one of each seed, lies between `low` and `high` (open ends).

    `part` is the part of the registered file, `per_seed` holds the seeds that have every run it takes. `refutes`: the
    file names the contrary as what would refute the part. `unit`: "z" (Fisher's) or "r", a z that is shown as r.
    """

    part: str
    statement: str
    per_seed: Mapping[int, float]
    low: float = -inf
    high: float = inf
    refutes: bool = False
    unit: str = "z"


def judge(predictions: Sequence[Prediction], seeds: int) -> list[dict[str, Any]]:
    """A row per prediction: part, statement, value (mean over seeds), low, high (95 %, t over seeds), agree, outcome.

    value, low and high are correlations where the unit is "r". Outcome: "holds", "refuted" ("does not hold" where the
    file names no refutation), "undecided"; with fewer than `seeds` seeds "k of n seeds", with none "not run".
    """
    return [_row(prediction, seeds) for prediction in predictions]


def together(outcomes: Sequence[str]) -> str:
    """The outcome of a part from those of its rows: one that fails decides, then what lacks seeds."""
    for first in (REFUTED, NOT):
        if first in outcomes:
            return first
    if lacking := {outcome for outcome in outcomes if outcome not in (HOLDS, UNDECIDED)}:
        one = len(lacking) == 1 and (lacking != {NOT_RUN} or lacking == set(outcomes))
        return lacking.pop() if one else "not all run"
    return HOLDS if set(outcomes) == {HOLDS} else UNDECIDED


def _row(found: Prediction, seeds: int) -> dict[str, Any]:
    values = list(found.per_seed.values())
    shown = np.tanh if found.unit == "r" else float
    over = over_seeds(values)
    interval = None if over is None or over.low is None or over.high is None else (over.low, over.high)
    if len(values) > 1 and interval is None:  # every seed the same
        interval = (values[0], values[0])
    outcome = placed(interval, found.low, found.high)
    if outcome == NOT and found.refutes:
        outcome = REFUTED
    if len(values) < seeds:
        outcome = f"{len(values)} of {seeds} seeds" if values else NOT_RUN
    low, high = interval or (None, None)
    return {
        "part": found.part, "statement": found.statement, "unit": found.unit,
        "value": float(shown(np.mean(values))) if values else None,
        "low": None if low is None else float(shown(low)), "high": None if high is None else float(shown(high)),
        "agree": f"{sum(found.low < value < found.high for value in values)}/{len(values)}", "outcome": outcome,
    }  # fmt: skip
