"""How nearly two runs of one spec agree, stream by stream: the four levels of `compare`.

- "same bytes": every row of metrics, probe and eval is alike to the last digit; wall time alone may differ, and columns
  that the other record is too old to have.
- "same answers": every item is answered alike, and every other number lies within its `TOLERANCES`.
- "within the interval": items may be answered otherwise, though fewer than by unrelated runs, and every other number
  lies within `WIDE` times its tolerance; or the training parts (below), and the means agree.
- "differs": anything else.

Another kind of processor adds up floats in another order. Measured between two (AVX2 alone against the wider units that
the records were made on): every item alike, ΔM within 0.03 %, ΔD 0.13 %, its percentiles 0.9 %, losses 0.6 %; per
input feature ΔM 0.12 and ΔD 0.15 %; norms of gradients 1.2 %; mean likelihoods 0.06 %, their margin 0.11 % of the mean
choice_nll; those of single items 0.83 % of what they spread over (root mean square by standard deviation).

Some training amplifies that rounding: VL-BART's losses agree to 1e-6 for eight steps and leave their tolerance at step
28 to 47; after it single steps, layers and likelihoods are nothing alike. Such runs *part* at the first step whose loss
or gradient is off by more than `WIDE` tolerances, if that is none of the first `STEADY`, which another rate, seed or
batch moves. What comes after is compared by its means, which are to be as near as those of two seeds (`MEANS`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dora_lab.report.items import item_values
from dora_lab.runs.item_values import unpack

LEVELS = ("same bytes", "same answers", "within the interval", "differs")  # from the best to the worst
STREAMS = ("eval", "probe", "metrics")
WIDE = 10.0
_M, _D, _SPREAD, _LOSS = 3.5e-4, 1.35e-3, 9e-3, 6e-3  # what was measured, and what rounds to it
ITEMS = 1e-2  # likelihoods of single items: root mean square of the difference, by their standard deviation
TOLERANCES = {  # relative to the larger of the two; a number that is not here has to be equal
    **dict.fromkeys(("delta_m", "delta_m_share"), _M),
    **dict.fromkeys(("delta_d", "relative_change"), _D),
    **dict.fromkeys(("delta_m_in", "delta_d_in"), 2e-3),
    **dict.fromkeys((f"{name}_p{q}" for name in ("delta_m", "delta_d") for q in (10, 50, 90)), _SPREAD),
    **dict.fromkeys(("delta_m_sd", "delta_m_signed", "grown", "growth", "radial", "radial_sd"), _SPREAD),
    "rotation": _D,
    **dict.fromkeys(("loss", "eval_loss", "choice_nll", "answer_nll", "margin"), _LOSS),
    "grad_norm": 2e-2,
    "learning_rate": 1e-9,
}
STEADY = 20  # steps that have to agree within their tolerances before two runs may part
# Of means over the steps, over a checkpoint's layers or over a task's items, after two runs have parted; relative to
# the larger. Rounded up from the most that two of ten seeds of FT, LoRA or DoRA differ by on VL-BART (800 steps); two
# processors, seven runs: 0.05 (loss), 0.14 (grad_norm), 0.20 (answer_nll), 0.18 (ΔM, its percentiles), 0.21 (ΔD).
MEANS = {
    "loss": 0.07,
    **dict.fromkeys(("eval_loss", "choice_nll", "answer_nll", "margin", "grad_norm"), 0.4),
    **{name: 0.3 for name in TOLERANCES if name.startswith(("delta_m", "grown", "growth", "radial"))},
    **{name: 0.45 for name in TOLERANCES if name.startswith(("delta_d", "rotation", "relative_change"))},
}
_SCALE = {
    "delta_m_signed": "delta_m",
    "growth": "radial_sd",
    "radial": "radial_sd",
    "margin": "choice_nll",
}  # a mean that cancels out is measured by the mean that does not
_WALL = ("seconds",)
_ANSWERS = ("value", "stderr", "n_unparsed", "correct", "rules")  # what an item answered otherwise moves
_MEAN_OF = {
    "eval": ("task", "protocol", "metric"),
    "probe": ("step", "axis"),
    "metrics": (),
}  # means: rows alike in these
_KEYS = {"eval": ("task", "protocol", "metric"), "probe": ("step", "fraction", "module", "axis"), "metrics": ("step",)}

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # by stream


@dataclass(frozen=True)
class Agreement:
    """Of two runs: the level; items answered otherwise (None: the records do not say); what keeps them apart."""

    level: str
    flipped: int | None
    why: str | None = None


def agreement(ours: Rows, theirs: Rows) -> Agreement:
    """The level at which two runs of one spec agree, given the rows of `STREAMS` of each.

    Columns that came after `theirs` was made are left out: what it has is compared.
    """
    ours = {name: _as_wide(ours[name], theirs[name]) for name in STREAMS}
    if all(_plain(ours[name]) == _plain(theirs[name]) for name in STREAMS):
        return Agreement(LEVELS[0], 0)
    strange = next((text for name in STREAMS for text in _other_rows(name, ours[name], theirs[name])), None)
    if strange is not None:
        return Agreement(LEVELS[3], None, strange)
    flipped, at_random = _flips(ours["eval"], theirs["eval"])
    if flipped is not None and at_random is not None and flipped > at_random:
        why = f"{flipped} items are answered otherwise, as many as in two runs that have nothing to do with each other"
        return Agreement(LEVELS[3], flipped, why)
    unparsed = [[row.get("n_unparsed") for row in rows["eval"]] for rows in (ours, theirs)]
    alike = (flipped == 0 and unparsed[0] == unparsed[1]) or _plain(ours["eval"]) == _plain(theirs["eval"])
    parted = _parted(ours["metrics"], theirs["metrics"])
    furthest, what = max(_distances(ours, theirs, alike, parted), default=(0.0, ""))
    if alike and furthest <= 1 and parted is None:
        return Agreement(LEVELS[1], flipped)
    if parted is not None and furthest <= WIDE:
        return Agreement(LEVELS[2], flipped, f"the runs part at step {parted}; from there on their means agree")
    return Agreement(LEVELS[2] if furthest <= WIDE else LEVELS[3], flipped, what if furthest > 1 else None)


def worst(levels: Sequence[str]) -> str:
    """The worst of some levels."""
    return max(levels, key=LEVELS.index)


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{field: value for field, value in row.items() if field not in _WALL} for row in rows]


def _as_wide(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    known = {field for row in theirs for field in row}
    return [{field: value for field, value in row.items() if field in known} for row in ours] if theirs else ours


def _other_rows(name: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whether the two streams are about other things: other rows, prompts, numbers of items."""
    if len(ours) != len(theirs):
        yield f"{name}: {len(ours)} rows, the committed run has {len(theirs)}"
        return
    fixed = {*_KEYS[name], *(("n", "prompt_sha256", "chance", "majority") if name == "eval" else ())}
    for mine, other in zip(ours, theirs, strict=True):
        for field in sorted(fixed & set(mine) & set(other)):
            if mine[field] != other[field]:
                yield f"{_where(name, other)}: {field} {mine[field]!r:.20}, the committed run has {other[field]!r:.20}"


def _flips(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> tuple[int | None, float | None]:
    """(items answered otherwise, how many at least it would be between unrelated runs with these scores).

    Two unrelated answers to an item score alike with probability Σ_v p_v p'_v, p_v the share of items that score v; "at
    least" is two standard deviations below the mean. Both None where a row does not say how single items scored.
    """
    flipped, mean, variance = 0, 0.0, 0.0
    for mine, other in zip(ours, theirs, strict=True):
        first, second = _scores(mine), _scores(other)
        if first is None or second is None or len(first) != len(second):
            return None, None
        n = len(first)
        values = np.union1d(first, second)
        p, p_other = (np.array([(some == value).mean() for value in values]) for some in (first, second))
        q = 1 - float(p @ p_other)
        flipped += int((first != second).sum())
        mean, variance = mean + n * q, variance + n * q * (1 - q)
    least = mean - 2 * math.sqrt(variance)
    return flipped, least if least > 0 else None


def _scores(row: Mapping[str, Any]) -> np.ndarray | None:
    """How each item scored, (items,): as right or wrong, or in a measure that knows more; None where no one says."""
    try:
        return item_values(row, "accuracy" if isinstance(row.get("correct"), str) else "score")
    except ValueError:
        return None


def _parted(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> int | None:
    """The step at which two runs part; None where they do not, or differ from the first steps on."""
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        named = (
            (field, mine[field], other[field]) for field in ("loss", "grad_norm") if field in mine and field in other
        )
        furthest = max(
            (abs(a - b) / max(abs(a), abs(b)) / TOLERANCES[field] for field, a, b in named if a != b), default=0
        )
        if furthest > (1 if index < STEADY else WIDE):
            return None if index < STEADY else int(mine["step"])
    return None


def _distances(ours: Rows, theirs: Rows, alike: bool, parted: int | None) -> Iterator[tuple[float, str]]:
    """(distance in tolerances, what it is of) of every number that both runs have; infinite where it may not differ."""
    for name in STREAMS:
        after: dict[tuple[Any, ...], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = defaultdict(list)
        for mine, other in zip(ours[name], theirs[name], strict=True):
            by_mean = parted is not None and mine.get("step", parted) >= parted  # what is scored, comes last
            if by_mean:
                after[tuple(mine.get(key) for key in _MEAN_OF[name])].append((mine, other))
            yield from _of_rows(name, mine, other, alike, by_mean)
        for pairs in after.values():
            yield from _of_means(name, pairs)


def _of_rows(
    name: str, mine: Mapping[str, Any], other: Mapping[str, Any], alike: bool, by_mean: bool
) -> Iterator[tuple[float, str]]:
    """As `_distances`, of two rows; by_mean: without what is compared by means."""
    for field in set(mine) & set(other) - set(_WALL):
        a, b = mine[field], other[field]
        if a == b or (by_mean and field in MEANS and _numbers(a, b)):
            continue
        if name == "eval" and not alike and field in _ANSWERS:
            continue  # `_flips` and the interval of the averages speak of them
        if field == "per_item" and isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _of_items(a, b, alike, by_mean, _where(name, other))
            continue
        if field not in TOLERANCES or not _numbers(a, b):
            yield math.inf, f"{_where(name, other)}: {field} {a!r:.20}, the committed run has {b!r:.20}"
            continue
        size = max(abs(v[key]) for v in (mine, other) for key in (field, _SCALE.get(field, field)) if key in v)
        yield _told(f"{_where(name, other)}: {field}", abs(a - b) / size, TOLERANCES[field])


def _of_means(name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Iterator[tuple[float, str]]:
    """As `_distances`, of the means over some rows of two runs that have parted; at most `WIDE` where they agree."""
    first, last = (
        " ".join(str(row[key]) for key in ("task", "step") if key in row) for row in (pairs[0][1], pairs[-1][1])
    )
    where = f"{name}, mean of {len(pairs)} rows ({first}{f' to {last}' if last != first else ''})"

    def mean(side: int, field: str) -> float:
        return float(np.mean([pair[side][field] for pair in pairs]))

    for field in MEANS.keys() & pairs[0][0].keys() & pairs[0][1].keys():
        if not _numbers(*(row[field] for pair in pairs for row in pair)):
            continue  # a likelihood that rows of this kind have not; where one has it, `_of_rows` says so
        scale = _SCALE.get(field, field)
        size = max(abs(mean(side, key)) for side in (0, 1) for key in {field, scale} & pairs[0][side].keys())
        off = abs(mean(0, field) - mean(1, field)) / size if size else 0.0
        distance, what = _told(f"{where}: {field}", off, MEANS[field])
        yield WIDE * distance, what


def _of_items(
    ours: Mapping[str, str], theirs: Mapping[str, str], alike: bool, by_mean: bool, where: str
) -> Iterator[tuple[float, str]]:
    """As `_of_rows`, of the values of single items, which a row holds packed."""
    for name in sorted(set(ours) & set(theirs)):
        if ours[name] == theirs[name] or (name == "score" and not alike):
            continue
        what = f"{where}: {name} of single items"
        first, second = unpack(name, ours[name]), unpack(name, theirs[name])
        if name in ("score", "fact") or len(first) != len(second):
            yield math.inf, f"{what}, the committed run has others"
            continue
        if by_mean:
            continue
        off, spread = math.sqrt(float(((first - second) ** 2).mean())), float(second.std())
        yield _told(what, off / spread if spread else math.inf, ITEMS)


def _numbers(*values: Any) -> bool:
    return all(type(value) in (int, float) for value in values)


def _told(what: str, off: float, limit: float) -> tuple[float, str]:
    return off / limit, f"{what} is off by {100 * off:.2g} %, tolerance {100 * limit:g} %"


def _where(name: str, row: Mapping[str, Any]) -> str:
    return f"{name}, {', '.join(str(row[key]) for key in _KEYS[name] if row.get(key) is not None)}"
