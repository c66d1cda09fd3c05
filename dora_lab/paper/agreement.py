"""How nearly two runs of one spec agree, stream by stream: the five levels of `compare`.

- "same bytes": every row of metrics, probe and eval is alike to the last digit; wall time alone may differ, and columns
  that the other record is too old to have.
- "same answers": every item is answered alike, and every other number lies within its `TOLERANCES`.
- "within the interval": some items are answered otherwise, as often better as worse (`answers`), and far fewer than by
  unrelated runs; every other number lies within `WIDE` times its tolerance.
- "means alone": the training parts (below); up to there it is as above, from there on means agree, no single numbers.
- "differs": anything else; a field that the committed run has and the other lacks, too.

Another kind of processor adds up floats in another order. Measured between two (AVX2 alone against the wider units that
the records were made on): every item alike, ΔM within 0.03 %, ΔD 0.13 %, its percentiles 0.9 %, losses 0.6 %; per
input feature ΔM 0.12 and ΔD 0.15 %; norms of gradients 1.2 %; mean likelihoods 0.06 %, their margin 0.11 % of the mean
choice_nll; those of single items 0.83 % of what they spread over (root mean square by standard deviation).

The first `EARLY` steps are alike to six digits on any processor, which other methods, rates, decays and seeds are not.
Some training amplifies rounding then: VL-BART's losses agree to 1e-6 for eight steps and leave their tolerance at step
28 to 47; after it single steps, layers and likelihoods are nothing alike. Such runs *part* at the first step from
which on most losses or gradients are off by more than a tolerance, if that is none of the first or last `STEADY` and
the difference has grown until then, by no more than `JUMP` in a step (20 in the one run of VL-BART that was looked
at): what was as good as equal a step before, is no rounding. What comes after is compared by means, which are to be as
near as those of two seeds (`WHOLE`, `PART`, measured on VL-BART alone), by which layers move most (`PROFILE`), and by
r of ΔM and ΔD over layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from dora_lab.paper.answers import ANSWERED, EXACT, NONE, Moved, counted, moved, numbers, printed, same
from dora_lab.runs.item_values import unpack

LEVELS = ("same bytes", "same answers", "within the interval", "means alone", "differs")  # from the best to the worst
SAME, ANSWERS_ALIKE, INTERVAL, MEANS, DIFFERS = LEVELS
STREAMS = ("metrics", "probe", "eval")  # in the order in which a run makes them: the first that is off, is told
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
    "learning_rate": EXACT,
}
EARLY = 8  # steps in which rounding moves losses by 4e-7 and gradients by 4e-6 at the most
AT_FIRST = {"loss": 1e-5, "grad_norm": 1e-4}  # the most that two runs of one spec may differ by in them
STEADY = 20  # steps that have to agree within their tolerances before two runs may part
JUMP = 100.0  # the most that the largest difference of losses or gradients so far may grow by in one step
LIKELIHOODS_PARTED = 0.9  # Σd² of items' likelihoods as a share of unrelated runs': of two seeds on VL-BART up to .72
# r over layers of log ΔM or log ΔD in two runs that have parted, each less its kind's mean: of two seeds at least .39
PROFILE = 0.2
# Of means after two runs have parted, relative to the larger. Rounded up from the most that two of ten seeds of FT,
# LoRA or DoRA differ by on VL-BART (800 steps, 18 layers of a kind). First over all steps, a checkpoint's layers
# or all tasks, then over a quarter of the steps, a kind of matrix or a task.
WHOLE = {
    "loss": 0.06,
    **dict.fromkeys(("eval_loss", "grad_norm"), 0.3),
    **dict.fromkeys(("choice_nll", "answer_nll", "margin"), 0.1),
    **{name: 0.3 for name in TOLERANCES if name.startswith(("delta_m", "grown", "growth", "radial"))},
    **{name: 0.45 for name in TOLERANCES if name.startswith(("delta_d", "rotation", "relative_change"))},
}
PART = {
    "loss": 0.15,
    **dict.fromkeys(("eval_loss", "grad_norm"), 0.4),
    **dict.fromkeys(("choice_nll", "answer_nll", "margin"), 0.4),
    **{name: 0.4 for name, most in WHOLE.items() if most == 0.3},
    **{name: 0.55 for name, most in WHOLE.items() if most == 0.45},
}
_UNPARTED = {"loss": 2 * _LOSS, "grad_norm": 4e-2}  # rounding moves losses up as often as down
_ONE_STEP = {"loss": 0.3, "eval_loss": 0.3, "grad_norm": 0.9}  # of one step, besides; of n steps, by √n less
_LAYERS = 18  # of fewer, the means of a kind may differ by more
_SCALE = {
    "delta_m_signed": "delta_m",
    "growth": "radial_sd",
    "radial": "radial_sd",
    "margin": "choice_nll",
}  # a mean that cancels out is measured by the mean that does not
_FLOOR = {"grown": 0.1}  # a share that is 0 in most runs: what is less than this, is measured by this
_WALL = ("seconds",)
_COUNTS = ("undirected",)  # of rows of a matrix that have no direction: no two runs that have parted need have as many
_KEYS = {"eval": ("task", "protocol", "metric"), "probe": ("step", "fraction", "module", "axis"), "metrics": ("step",)}

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]  # by stream
Pair = tuple[Row, Row]  # ours, theirs


@dataclass(frozen=True)
class Agreement:
    """Of two runs: the level; by protocol, how items are answered otherwise (None: the records do not say); what keeps
    them apart."""

    level: str
    moved: Mapping[str, Moved] | None
    why: str | None = None


def agreement(ours: Rows, theirs: Rows) -> Agreement:
    """The level at which two runs of one spec agree, given the rows of `STREAMS` of each.

    Columns that came after `theirs` was made are left out: all that it has is compared.
    """
    ours = {name: _as_wide(ours[name], theirs[name]) for name in STREAMS}
    if all(_plain(ours[name]) == _plain(theirs[name]) for name in STREAMS):
        return Agreement(SAME, {row["protocol"]: NONE for row in theirs["eval"]})
    pairs: dict[str, list[Pair]] = {}
    for name in STREAMS:
        mine, others = ({_key(name, row): row for row in rows} for rows in (ours[name], theirs[name]))
        pairs[name] = [(mine[key], other) for key, other in others.items() if key in mine]
        strange = next(_other_rows(name, ours[name], theirs[name], pairs[name]), None)
        if strange is not None:
            return Agreement(DIFFERS, None, strange)
    parted, too_soon = _parted(pairs["metrics"])
    by_task = [(_where("eval", pair[1]), pair[1]["protocol"], moved(*pair)) for pair in pairs["eval"]]
    by_protocol, answered = counted(by_task, parted is not None)
    found = [*_distances(pairs, parted), *((_beyond_one(far), what) for far, what in answered)]
    far, why = max(found, key=lambda one: one[0], default=(0.0, None))
    if far > WIDE:
        _, why = next(one for one in found if one[0] > WIDE)  # what follows, may follow from it
        return Agreement(DIFFERS, by_protocol, f"{why}{too_soon if parted is None else ''}")
    if parted is not None:
        return Agreement(MEANS, by_protocol, f"the runs part at step {parted}; from there on their means agree")
    return Agreement(INTERVAL, by_protocol, why) if far > 1 else Agreement(ANSWERS_ALIKE, by_protocol)


def worst(levels: Sequence[str]) -> str:
    """The worst of some levels."""
    return max(levels, key=LEVELS.index)


def _plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{field: value for field, value in row.items() if field not in _WALL} for row in rows]


def _as_wide(ours: Sequence[Row], theirs: Sequence[Row]) -> Sequence[Row]:
    known = {field for row in theirs for field in row}
    return [{field: value for field, value in row.items() if field in known} for row in ours] if theirs else ours


def _key(name: str, row: Row) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in _KEYS[name])


def _other_rows(name: str, ours: Sequence[Row], theirs: Sequence[Row], pairs: Sequence[Pair]) -> Iterator[str]:
    """Whether the two streams are about other things: other rows, prompts, numbers of items, other fields."""
    if len(ours) != len(theirs):
        yield f"{name}: {len(ours)} rows, the committed run has {len(theirs)}"
    mine = {_key(name, row) for row in ours}
    for other in theirs:
        if _key(name, other) not in mine:
            yield f"{_where(name, other)}: the committed run has such a row"
    for a, b in pairs:
        # what is right or wrong alone, is not written where an item is right in parts
        derived = {"correct"} if name == "eval" and "correct" not in a and moved(a, b) is not None else set()
        if lost := sorted(field for field in b.keys() - a.keys() - {*_WALL} - derived if b[field] is not None):
            yield f"{_where(name, b)}: no {lost[0]}, the committed run has it"
        for field in ("n", "prompt_sha256", "chance", "majority") if name == "eval" else ():
            if not same(a.get(field), b.get(field)):
                yield f"{_where(name, b)}: {field} {a.get(field)!r:.20}, the committed run has {b.get(field)!r:.20}"


def _parted(pairs: Sequence[Pair]) -> tuple[int | None, str]:
    """(the step at which two runs part, None where they do not; what is to be said where they could not)."""
    off, apart = [], []
    for a, b in pairs:
        both = [name for name in ("loss", "grad_norm") if numbers(a.get(name), b.get(name))]
        apart.append(max((_off(a[name], b[name]) for name in both), default=0.0))
        off.append(max((_off(a[name], b[name]) / TOLERANCES[name] for name in both), default=0.0))
    first = next((index for index, far in enumerate(off) if far > 1), None)
    if first is None or max(off) <= WIDE:
        return None, ""
    steps = [other["step"] for _, other in pairs]
    if first < STEADY:
        return None, f"; step {steps[first]} is off, too early for rounding alone"
    sofar = np.maximum.accumulate(apart)
    for index in range(EARLY, len(sofar)):
        if sofar[index] > AT_FIRST["grad_norm"] and sofar[index] > JUMP * sofar[index - 1]:
            return None, f"; at step {steps[index]} the difference has grown more at once than by rounding"
    lasting = (index for index, far in enumerate(off[: 1 - STEADY]) if far > 1 and median(off[index:]) > 1)
    index = next(lasting, None)
    return (None, "; too late to say whether by rounding") if index is None else (steps[index], "")


def _distances(pairs: Mapping[str, Sequence[Pair]], parted: int | None) -> Iterator[tuple[float, str]]:
    """(distance in tolerances, what it is of) of every number that both runs have; infinite where it may not differ."""
    for name in STREAMS:
        after = []
        for pair in pairs[name]:
            by_mean = parted is not None and pair[0].get("step", parted) >= parted  # what is scored, comes last
            after += [pair] * by_mean
            if name == "metrics" and pair[1]["step"] <= EARLY:
                yield from _at_first(pair)
            if name == "eval":
                for far, what in printed(*pair):
                    yield _beyond_one(far), f"{_where(name, pair[1])}: {what}"
            yield from _of_rows(name, *pair, by_mean)
        if name == "metrics" and parted is None and pairs[name]:
            yield from _of_means(name, pairs[name], _UNPARTED, 1.0, noise=False)
        for grouped, limits in ((_whole, WHOLE), (_part, PART)):
            groups: dict[tuple[Any, ...], list[Pair]] = defaultdict(list)
            for index, pair in enumerate(after):
                groups[grouped(name, pair[1], index / len(after))].append(pair)
            for some in groups.values():
                few = name == "probe" and grouped is _part and len(some) < _LAYERS
                yield from _of_means(name, some, limits, math.sqrt(_LAYERS / len(some)) if few else 1.0)
                if name == "probe":
                    yield from (_of_profiles if grouped is _whole else _of_layers)(some)


def _beyond_one(far: float) -> float:
    """In tolerances: what is answered otherwise is no answer alike, however near the scores are."""
    return max(1 + EXACT, WIDE * far)


def _whole(name: str, row: Row, _: float) -> tuple[Any, ...]:
    return {"probe": (row.get("step"), row.get("axis")), "eval": (row.get("protocol"),)}.get(name, ())


def _part(name: str, row: Row, passed: float) -> tuple[Any, ...]:
    """A quarter of the steps, a kind of matrix at a checkpoint, a task."""
    if name == "metrics":
        return (int(4 * passed),)
    return (*_whole(name, row, passed), _kind(row)) if name == "probe" else _key(name, row)


def _kind(row: Row) -> str:
    return str(row["module"]).rpartition(".")[2]


def _at_first(pair: Pair) -> Iterator[tuple[float, str]]:
    """As `_distances`, of a step that comes before rounding is amplified."""
    for field, limit in AT_FIRST.items():
        a, b = (row.get(field) for row in pair)
        if numbers(a, b):
            yield _told(f"{_where('metrics', pair[1])}: {field}", _off(a, b), limit, WIDE)


def _of_rows(name: str, mine: Row, other: Row, by_mean: bool) -> Iterator[tuple[float, str]]:
    """As `_distances`, of two rows; by_mean: without what is compared by means."""
    for field in sorted(mine.keys() & other.keys() - {*_WALL}):
        a, b = mine[field], other[field]
        if same(a, b) or (by_mean and field in WHOLE and numbers(a, b)) or (by_mean and field in _COUNTS):
            continue
        if name == "eval" and field in ANSWERED:
            continue  # `printed` speaks of them
        if field == "per_item" and isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _of_items(a, b, by_mean, _where(name, other))
            continue
        if field not in TOLERANCES or not numbers(a, b):
            yield math.inf, f"{_where(name, other)}: {field} {a!r:.20}, the committed run has {b!r:.20}"
            continue
        sizes = [row[key] for row in (mine, other) for key in {field, _SCALE.get(field, field)} & row.keys()]
        size = max(abs(value) for value in sizes if numbers(value))
        yield _told(f"{_where(name, other)}: {field}", abs(a - b) / size, TOLERANCES[field])


def _of_means(
    name: str, pairs: Sequence[Pair], limits: Mapping[str, float], scale: float, noise: bool = True
) -> Iterator[tuple[float, str]]:
    """As `_distances`, of the means over some rows; at most `WIDE` where they agree. noise: each step has its own."""
    first, last = (
        " ".join(str(row[key]) for key in ("task", "step") if key in row) for row in (pairs[0][1], pairs[-1][1])
    )
    where = f"{name}, mean of {len(pairs)} rows ({first}{f' to {last}' if last != first else ''})"
    for field, limit in limits.items():
        both = [pair for pair in pairs if all(numbers(row.get(field)) for row in pair)]
        if not both:
            continue  # a likelihood that rows of this kind have not; where one has it, `_of_rows` says so
        means = {
            key: [float(np.mean([pair[side][key] for pair in both])) for side in (0, 1)]
            for key in {field, _SCALE.get(field, field)}
            if all(numbers(row.get(key)) for pair in both for row in pair)
        }
        size = max(_FLOOR.get(field, 0.0), *(abs(value) for found in means.values() for value in found))
        off = abs(means[field][0] - means[field][1]) / size if size else 0.0
        of_steps = _ONE_STEP[field] / math.sqrt(len(both)) if noise and name == "metrics" else 0.0
        yield _told(f"{where}: {field}", off, min(0.9, scale * limit + of_steps), WIDE)


def _of_layers(pairs: Sequence[Pair]) -> Iterator[tuple[float, str]]:
    """As `_distances`, of the layers of a kind at a checkpoint: which of them have moved at all, and r of ΔD and ΔM, of
    which Fisher's z may differ by three standard errors (two of ten seeds: at most 2.7)."""
    where = f"{_where('probe', pairs[0][1])} and {len(pairs) - 1} other layers"
    for field in ("delta_m", "delta_d"):
        if any((a.get(field) == 0) != (b.get(field) == 0) for a, b in pairs):
            yield math.inf, f"{where}: {field} is 0 in one of the runs alone"
    if len(pairs) < 6 or not all(numbers(row.get("delta_d"), row.get("delta_m")) for pair in pairs for row in pair):
        return
    points = [np.array([[row["delta_d"], row["delta_m"]] for row in side]).T for side in zip(*pairs, strict=True)]
    if min(np.ptp(values) for side in points for values in side) > 0:
        r, r_other = (float(np.corrcoef(side)[0, 1]) for side in points)
        z, z_other = (math.atanh(max(-1 + EXACT, min(1 - EXACT, value))) for value in (r, r_other))
        most = 3 * math.sqrt(2 / (len(pairs) - 3))
        what = f"{where}: r of ΔD and ΔM is {r:.2f}, in the committed run {r_other:.2f}"
        yield WIDE * abs(z - z_other) / most, what


def _of_profiles(pairs: Sequence[Pair]) -> Iterator[tuple[float, str]]:
    """As `_distances`, of all layers at a checkpoint: whether those that move most are the same."""
    kinds: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        kinds[_kind(pair[1])].append(pair)
    for field in ("delta_m", "delta_d"):
        centred: list[np.ndarray] = []  # (2, layers) of each kind
        for some in kinds.values():
            values: list[list[Any]] = [[row.get(field) for row in pair] for pair in some]
            logs = np.log(np.array([both for both in values if numbers(*both) and min(both) > 0], float).reshape(-1, 2))
            centred.append((logs - logs.mean(0)).T if len(logs) else logs.T)
        both = np.concatenate(centred, 1)
        if both.shape[1] >= 8 and min(np.ptp(both, 1)) > EXACT:
            r = float(np.corrcoef(both)[0, 1])
            what = (
                f"{_where('probe', pairs[0][1])} and {len(pairs) - 1} others: r of log {field} in both runs is {r:.2f}"
            )
            yield WIDE * (1 - r) / (1 - PROFILE), f"{what}, at least {PROFILE:g}"


def _of_items(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], by_mean: bool, where: str
) -> Iterator[tuple[float, str]]:
    """As `_of_rows`, of the values of single items, which a row holds packed."""
    for name in sorted(theirs):
        if ours.get(name) == theirs[name]:
            continue
        what = f"{where}: {name} of single items"
        try:
            first, second = (unpack(name, kept[name]) for kept in (ours, theirs))
        except (KeyError, TypeError, ValueError):
            yield math.inf, f"{what} cannot be read, the committed run has others"
            continue
        if name == "fact" or len(first) != len(second):
            yield math.inf, f"{what}, the committed run has others"
        elif name != "score":  # of which `Moved` speaks
            off, spread = math.sqrt(float(((first - second) ** 2).mean())), float(second.std())
            share = Moved.between(first, second).share
            if not np.array_equal(np.isfinite(first), np.isfinite(second)):
                yield math.inf, f"{what} are no numbers in one of the runs"
            elif by_mean:
                said = f"are {100 * share:.0f} % as far apart as unrelated ones, at most {100 * LIKELIHOODS_PARTED:.0f}"
                yield WIDE * share / LIKELIHOODS_PARTED, f"{what} {said}"
            else:
                yield _told(what, off / spread if spread else math.inf, ITEMS)


def _off(a: Any, b: Any) -> float:
    """By what two numbers differ, relative to the larger."""
    return 0.0 if same(a, b) else abs(a - b) / max(abs(a), abs(b))


def _told(what: str, off: float, limit: float, at: float = 1.0) -> tuple[float, str]:
    """`at`: how many tolerances `limit` is; what is no number is infinitely far."""
    said = f"tolerance {100 * limit:.3g} %" + ("" if at > 1 else f", within the interval {100 * WIDE * limit:.3g}")
    return (at * off / limit if math.isfinite(off) else math.inf), f"{what} is off by {100 * off:.2g} %, {said}"


def _where(name: str, row: Row) -> str:
    return f"{name}, {', '.join(str(row[key]) for key in _KEYS[name] if row.get(key) is not None)}"
