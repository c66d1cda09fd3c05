"""How nearly two runs of one spec answer the items of a task alike: what single items score, and what is printed of it.

With d the difference of an item's scores in two runs, Σd² is what they answer otherwise (for right and wrong, its
number of items), and Σd what the score has moved by. Of two unrelated runs with the same shares Σd² would be
n E(a − b)², a and b drawn apart. Rounding moves some items, up as often as down: |Σd| ≤ `PAIRED` √Σd².
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from dora_lab.report.items import item_values

# standard errors of a mean of paired differences: of two of ten seeds on VL-BART up to 3.7 in a task, 3.95 in a run
PAIRED = 4.0
SCORE = 3.0  # standard errors of the difference of two scores, where a score is no mean of its items
# Σd² as a share of what it is of unrelated runs: of two of ten seeds on VL-BART up to .37 (LoRA), .36 (DoRA), .50 (FT),
# and of one task up to .67, .66 and .91 (FT's 99th percentile: .83); two runs that have parted are like two seeds
OF_ALL, OF_TASK = 0.25, 0.5
OF_ALL_PARTED, OF_TASK_PARTED = 0.7, 0.9
_ENOUGH = 5  # items that two unrelated runs would answer otherwise, for their share to say something
ANSWERED = ("value", "stderr", "n_unparsed", "correct", "rules")  # what an item answered otherwise moves
_ROUNDED = 2e-3  # by what the mean of items as they are kept may be off, relative
EXACT = 1e-9  # the last digits of a sum of floats

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Moved:
    """Of a task in two runs: items answered otherwise, Σd, Σd², and what Σd² would be of unrelated runs."""

    items: int
    gained: float
    squared: float
    unrelated: float

    @classmethod
    def between(cls, ours: np.ndarray, theirs: np.ndarray) -> Moved:
        off = ours - theirs
        unrelated = len(off) * (ours.var() + theirs.var() + (ours.mean() - theirs.mean()) ** 2)
        return cls(int((np.abs(off) > 1e-6).sum()), float(off.sum()), float((off**2).sum()), float(unrelated))

    def __add__(self, other: Moved) -> Moved:
        return Moved(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @property
    def errors(self) -> float:
        """|Σd| in its standard errors, 0 where no item has moved."""
        return abs(self.gained) / math.sqrt(self.squared) if self.squared else 0.0

    @property
    def share(self) -> float:
        """Σd² of what it would be of unrelated runs."""
        return self.squared / self.unrelated if self.unrelated else 0.0


NONE = Moved(0, 0.0, 0.0, 0.0)
Distances = list[tuple[float, str]]  # in the most that is allowed, what it is of


def counted(
    by_task: Sequence[tuple[str, str, Moved | None]], parted: bool
) -> tuple[dict[str, Moved] | None, Distances]:
    """(by protocol, how items are answered otherwise, None where a row does not say; how far that is from rounding), of
    tasks: (where, protocol, how its items are answered)."""
    whole: dict[str, Moved] = {}
    found: Distances = []
    for where, protocol, some in by_task:
        if some is not None:
            found += _distances(some, OF_TASK_PARTED if parted else OF_TASK, where)
            whole[protocol] = whole.get(protocol, NONE) + some
    for protocol, some in whole.items():
        found += _distances(some, OF_ALL_PARTED if parted else OF_ALL, f"eval, all tasks by {protocol}")
    return (None if any(some is None for *_, some in by_task) else whole), found


def _distances(some: Moved, most: float, where: str) -> Distances:
    if not some.items:
        return []
    told = f"{where}: {some.items} items are answered otherwise"
    errors = f"the score moves by {some.gained:+.3g} items, {some.errors:.2g} standard errors, at most {PAIRED:g}"
    share = f"{100 * some.share:.0f} % of those of unrelated runs, at most {100 * most:.0f}"
    found = [(some.errors / PAIRED, f"{told}, {errors}")]
    return [*found, (some.share / most, f"{told}, {share}")] if some.unrelated >= _ENOUGH else found


def moved(ours: Row, theirs: Row) -> Moved | None:
    """None where a row does not say how single items scored."""
    scored = _scored(ours, theirs)
    return None if scored is None else Moved.between(*scored)


def scores(row: Row) -> np.ndarray | None:
    """How each item scored, (items,): in a measure that knows parts where the row has it, else right or wrong."""
    for metric in ("score", "accuracy"):
        try:
            return item_values(row, metric)
        except (ValueError, TypeError):
            continue
    return None


def printed(ours: Row, theirs: Row) -> Iterator[tuple[float, str]]:
    """(distance in the most that is allowed, what it is of) of each number that a row says of its answers."""
    scored = _scored(ours, theirs)
    if scored is None:
        errors = _both(ours, theirs, "stderr")
        error = math.hypot(*errors) if numbers(*errors) else 0.0
        means, others, alike = None, 0, False
    else:
        error = math.sqrt(sum(side.var() for side in scored) / len(scored[0]))
        means, others = [float(side.mean()) for side in scored], Moved.between(*scored).items
        alike = others == 0
    for name, (a, b) in _numbers_of(ours, theirs).items():
        told = f"{name} {_shown(a)}, the committed run has {_shown(b)}"
        if same(a, b):
            continue
        if alike or not numbers(a, b):
            yield math.inf, told
        elif means is not None and math.isclose(b, means[1], rel_tol=_ROUNDED):
            if not math.isclose(a, means[0], rel_tol=_ROUNDED):
                yield math.inf, f"{told}; of its own items the mean is {means[0]:.4g}"
        else:
            far = abs(a - b) / (2 * SCORE * error) if error else math.inf  # of half the items or a quarter of them
            yield far, f"{told}: {2 * SCORE * far:.2g} standard errors of a mean, at most {2 * SCORE:g}"
    a, b = _both(ours, theirs, "n_unparsed")
    if not same(a, b):
        far = abs(a - b) / (others + SCORE * math.sqrt(max(1, a + b))) if numbers(a, b) else math.inf
        yield far, f"n_unparsed {_shown(a)}, the committed run has {_shown(b)}"
    if alike and not same(ours.get("correct"), theirs.get("correct")) and {"correct"} <= ours.keys() & theirs.keys():
        yield math.inf, "correct says otherwise of single items, whose scores are those of the committed run"
    yield from _stderr(ours, theirs, scored)


def _stderr(ours: Row, theirs: Row, scored: tuple[np.ndarray, np.ndarray] | None) -> Iterator[tuple[float, str]]:
    """As `printed`; a standard error that follows from the committed run's items has to follow from these, too."""
    a, b = _both(ours, theirs, "stderr")
    if same(a, b):
        return
    told = f"stderr {_shown(a)}, the committed run has {_shown(b)}"
    if not numbers(a, b):
        yield math.inf, told
        return
    expected = [float(side.std()) / math.sqrt(max(1, len(side) - 1)) for side in scored] if scored else None
    if expected and math.isclose(b, expected[1], rel_tol=1e-2):
        if not math.isclose(a, expected[0], rel_tol=1e-2):
            yield math.inf, told
    else:
        yield abs(a - b) / (0.9 * max(abs(a), abs(b))), told


def _numbers_of(ours: Row, theirs: Row) -> dict[str, tuple[Any, Any]]:
    """The score that counts and those by other rules, by name, of both; what one of them lacks, is None."""
    sides = []
    for row in (ours, theirs):
        found = {"value": row.get("value")}
        rules = row.get("rules")
        for rule, by_rule in rules.items() if isinstance(rules, Mapping) else [("", rules)]:
            named = by_rule.items() if isinstance(by_rule, Mapping) else [("", by_rule)]
            found |= {f"rules {rule} {name}".rstrip(): number for name, number in named}
        sides.append(found)
    return {name: (sides[0].get(name), sides[1].get(name)) for name in {**sides[1], **sides[0]}}


def _both(ours: Row, theirs: Row, name: str) -> tuple[Any, Any]:
    return ours.get(name), theirs.get(name)


def _scored(ours: Row, theirs: Row) -> tuple[np.ndarray, np.ndarray] | None:
    first, second = scores(ours), scores(theirs)
    if first is None or second is None or len(first) != len(second):
        return None
    return first, second


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, floats but for the last digits of a sum."""
    if type(a) is dict and type(b) is dict:
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return a == b or math.isclose(a, b, rel_tol=EXACT, abs_tol=EXACT)
    return a == b


def numbers(*values: object) -> bool:
    """Whether all are numbers that floats can hold."""
    return all(type(value) in (int, float) and abs(value) < 1e300 for value in values)  # type: ignore[operator]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if numbers(value) else f"{value!r:.20}"
