"""A user's own runs against the committed ones, run by run and stream by stream."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dora_lab.io.text import shown
from dora_lab.paper.agreement import (
    DIFFERS,
    INTERVAL,
    LEVELS,
    MEANS,
    STREAMS,
    TOLERANCES,
    WHOLE,
    WIDE,
    Agreement,
    Rows,
    agreement,
    worst,
)
from dora_lab.paper.answers import NONE, PAIRED
from dora_lab.report.labels import MISSING as MISSING_VALUE
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import Survey, survey
from dora_lab.spec import SpecError, did_you_mean
from dora_lab.tasks import load_task

MISSING = "missing"
_Cell = tuple[str, str, str]  # setting (experiment, tier, model and data), method, protocol


@dataclass(frozen=True)
class _Run:
    """One complete run: where it stands in the table, its rows; what it was made with (`made`) and what has to be equal
    of its record (`facts`: parameters, steps, hashes of what it read); its accuracies (fraction, items) by protocol,
    task."""

    spec_id: str
    setting: str
    method: str
    rows: Rows
    made: Mapping[str, Any]
    facts: Mapping[str, Any]
    text_nll: Mapping[str, Any]
    scores: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)

    def average(self, protocol: str) -> float:
        return sum(value for value, _ in self.scores[protocol].values()) / len(self.scores[protocol])

    def variance(self, protocol: str) -> float:
        found = self.scores[protocol]
        return sum(v * (1 - v) / n for v, n in found.values() if n) / len(found) ** 2


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    rows: setting, method, protocol ("–": nothing is scored), runs (of both), of (committed), local and committed
    (average accuracies, fractions, over tasks and the runs that both have; None where no score is an accuracy),
    tolerance (two binomial standard errors of the difference), flipped (items answered otherwise), agreement (a level,
    or "missing" where runs of yours are) and others (the level of those that are there, where some are missing), why
    (what keeps runs apart, the worst first). beside: setting, protocol, method, whose (yours or
    committed), runs, the mean accuracy over those runs by task and over tasks; yours with those that no committed run
    is like. notes: sentences for a person, the verdict last.
    agrees: every committed method has all its runs, none differs, and every committed run could be read.
    """

    rows: tuple[dict[str, Any], ...] = ()
    beside: tuple[dict[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    agrees: bool = False


STEPS = 4  # each folder is surveyed, then read


def compare(
    local_root: Path,
    committed_root: Path,
    experiment: str | None = None,
    only: Container[str] | None = None,
    step: Callable[[], object] = lambda: None,
) -> Comparison:
    """A user's runs against the committed records, run by run of the same spec_id, summarised per method.

    Every stream is compared, at the levels that `agreement` names; of the record, the parameters, steps and tokens of
    training and the hashes of what was read have to be equal, NLL of held-out text alike. A method is as good as the
    worst of its runs; over all of them, too, items must be answered better about as often as worse, and its averages
    differ by at most two binomial standard errors of the difference of two such averages (items counted once, not once
    per seed, since all seeds answer the same items). The commit of the code, packages and machines are told, not
    compared.
    Committed runs on data, a model or a tier that none of the user's runs is about are left out: nobody asked for them.

    Args: the roots are results folders (with `runs/` in them); experiment: one name, None = all that the user has;
    only: the spec ids that are compared, None = all of them; step: called after each of `STEPS`.
    Raises: SpecError for a results folder without runs/, and for an experiment that neither folder has runs of.
    """
    found = [_survey(Path(local_root), experiment)]
    step()
    # what the user has no folder of is not read, unless there is nothing else to speak of
    mine = [experiment] if experiment else sorted({path.parent.name for path, _ in found[0].runs})
    theirs = [_survey(Path(committed_root), name) for name in mine]
    if not any(one.runs for one in theirs):
        theirs = [_survey(Path(committed_root), experiment)]
    found.append(Survey([run for one in theirs for run in one.runs], [lost for one in theirs for lost in one.left_out]))
    step()
    if experiment is not None and not any(one.runs or one.left_out for one in found):
        there = {path.name for root in (local_root, committed_root) for path in (Path(root) / "runs").iterdir()}
        near = did_you_mean(experiment, there)
        raise SpecError(f"neither {local_root} nor {committed_root} has a run of an experiment '{experiment}'; {near}")
    kept = [[run for run in _complete(one) if only is None or run[1]["spec_id"] in only] for one in found]
    local, committed = ({run.spec_id: run for run in _read(runs, step)} for runs in kept)
    said = tuple(shown(lost.why) for one in found for lost in one.left_out)
    for root, runs, others in ((committed_root, committed, local), (local_root, local, committed)):
        if not runs:
            there = ", ".join(sorted({run.setting for run in others.values()})) or "none"
            note = f"No complete runs in {root}: there is nothing to compare. In the other folder: {there}."
            return Comparison(left_out=said, notes=(note,))
    asked = {run.setting for run in local.values()}
    cells: dict[_Cell, list[_Run]] = defaultdict(list)
    for run in committed.values():
        for protocol in run.scores if run.setting in asked else ():
            cells[run.setting, run.method, protocol].append(run)
    if not cells:
        there = "; ".join(sorted({run.setting for run in committed.values()}))
        note = f"No complete committed run in {committed_root} is about {', '.join(sorted(asked))}. There: {there}."
        return Comparison(left_out=said, notes=(note,))
    agreements = {key: _of_runs(local[key], run) for key, run in committed.items() if key in local}
    rows = tuple(_row(cell, runs, local, agreements) for cell, runs in sorted(cells.items()))
    counts, lost = Counter(row["agreement"] for row in rows), len(found[1].left_out)
    notes = _not_compared(found[0], local, committed, f"{lost} parts or runs of {committed_root}" if lost else None)
    notes += [*_made_otherwise(local, committed, agreements), NOTE, _verdict(counts, lost)]
    beside = tuple(_beside({"yours": local.values(), "committed": committed.values()}, asked))
    return Comparison(rows, beside, said, tuple(notes), not (counts[DIFFERS] or counts[MISSING] or lost))


NOTE = (
    "Average accuracy in percent over tasks and the runs that both have; tolerance: two binomial standard errors of "
    "the difference; flipped: items answered otherwise. Same bytes: every stream, wall time aside; same answers: every "
    "item alike and the other streams within their tolerances; within the interval: items flipped, about as many up as "
    "down, or ten tolerances; means alone: alike for twenty steps, then apart as rounding may grow, and from there on "
    "nothing single, but means as near as those of two seeds."
)


def _of_runs(ours: _Run, theirs: _Run) -> Agreement:
    """How two runs of one spec agree: their streams, and what has to be equal of their records."""
    found = agreement(ours.rows, theirs.rows)
    facts = [(name, ours.facts.get(name), value) for name, value in theirs.facts.items()]
    apart = [f"record, {name}: {a!r:.20}, the committed run has {b!r:.20}" for name, a, b in facts if a != b]
    limit = WHOLE["answer_nll"] if found.level == MEANS else WIDE * TOLERANCES["eval_loss"]
    for name, value in theirs.text_nll.items():
        other = ours.text_nll.get(name)
        near = isinstance(other, float) and isinstance(value, float) and math.isclose(other, value, rel_tol=limit)
        if other != value and not near:
            apart.append(f"record, text_nll.{name}: {other!r:.20}, the committed run has {value!r:.20}")
    return replace(found, level=DIFFERS, why=apart[0]) if apart else found


def _row(cell: _Cell, runs: Sequence[_Run], local: dict[str, _Run], agreements: dict[str, Agreement]) -> dict[str, Any]:
    """One line of the table: a method's runs by one protocol."""
    pairs = [(local[run.spec_id], run) for run in runs if run.spec_id in local]
    level, (ours, theirs, tolerance), why = _agreement(pairs, [agreements[run.spec_id] for _, run in pairs], cell[2])
    part = len(pairs) < len(runs) and level != DIFFERS
    flips = [(agreements[run.spec_id].moved or {}).get(cell[2]) for _, run in pairs]
    return dict(zip(("setting", "method", "protocol"), cell, strict=True)) | {
        "runs": len(pairs), "of": len(runs), "local": ours, "committed": theirs, "tolerance": tolerance,
        "flipped": sum(one.items for one in flips if one) if flips and None not in flips else None,
        "agreement": MISSING if part else level, "others": level if part and pairs else None, "why": why,
    }  # fmt: skip


def _beside(sides: Mapping[str, Iterable[_Run]], asked: Container[str]) -> Iterator[dict[str, Any]]:
    """A line per setting, protocol, method and side: its mean accuracy on each task."""
    groups: dict[tuple[str, ...], list[_Run]] = defaultdict(list)
    for whose, runs in sides.items():
        for run in runs:
            for protocol in run.scores if run.setting in asked else ():
                if run.scores[protocol]:
                    groups[run.setting, protocol, run.method, whose].append(run)
    for key, runs in sorted(groups.items(), key=lambda group: (*group[0][:3], group[0][3] != "yours")):
        means = {
            _column(task): sum(run.scores[key[1]][task][0] for run in runs) / len(runs)
            for task in runs[0].scores[key[1]]
            if all(task in run.scores[key[1]] for run in runs)
        }
        average = sum(run.average(key[1]) for run in runs) / len(runs)
        named = dict(zip(("setting", "protocol", "method", "whose"), key, strict=True))
        yield named | {"runs": len(runs)} | means | {"average": average}


def _column(task: str) -> str:
    """The head of a task's column; of a task that is not this lab's, its name."""
    try:
        return load_task(task).column
    except ValueError:
        return task


def _agreement(
    pairs: Sequence[tuple[_Run, _Run]], found: Sequence[Agreement], protocol: str
) -> tuple[str, tuple[float | None, ...], list[str]]:
    """(level, (our average, theirs, tolerance), what keeps them apart) of a method's runs by one protocol."""
    if not pairs:
        return MISSING, (None, None, None), []
    told = [(one.level, f"{run.spec_id}: {one.why}") for (run, _), one in zip(pairs, found, strict=True) if one.why]
    why = [said for _, said in sorted(told, key=lambda one: -LEVELS.index(one[0]))]
    if any(set(a.scores.get(protocol, {})) != set(b.scores[protocol]) for a, b in pairs):
        return DIFFERS, (None, None, None), [*why, "other tasks are scored"]
    level = worst([one.level for one in found])
    moved = sum(((one.moved or {}).get(protocol, NONE) for one in found), NONE)
    if moved.errors > PAIRED:
        said = f"over {len(pairs)} runs scores move by {moved.gained:+.3g} items of {moved.items} answered otherwise"
        level, why = DIFFERS, [*why[:1], f"{said}: {moved.errors:.2g} standard errors, at most {PAIRED:g}", *why[1:]]
    if not all(run.scores[protocol] for pair in pairs for run in pair):
        return level, (None, None, None), why
    ours, theirs = (sum(pair[side].average(protocol) for pair in pairs) / len(pairs) for side in (0, 1))
    tolerance = 2 * math.sqrt(sum(a.variance(protocol) + b.variance(protocol) for a, b in pairs) / len(pairs))
    if level in (INTERVAL, MEANS) and abs(ours - theirs) > tolerance:
        level, why = DIFFERS, ["the averages differ by more than the tolerance", *why]
    return level, (ours, theirs, tolerance), why


def _verdict(counts: Counter[str], lost: int) -> str:
    if counts[DIFFERS]:
        said = "The numbers do not all agree with the committed records"
    elif lost:
        said = "What can be read of the committed records agrees, but not all of it can"
    elif counts[MISSING]:
        said = "What is there agrees with the committed records, but runs are missing"
    else:
        said = "The numbers agree with the committed records"
    return f"{said}: {', '.join(f'{counts[one]} {one}' for one in (*LEVELS, MISSING) if counts[one])}."


def _survey(root: Path, experiment: str | None) -> Survey:
    if not (root / "runs").is_dir():
        raise SpecError(
            f"{root} is no results folder: it has no runs/; `dora-lab run EXPERIMENT --results {root}` makes some"
        )
    return survey(root, experiment)


def _complete(found: Survey) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, record) for path, record in found.runs if record["status"] == "complete"]


def _read(runs: Iterable[tuple[Path, dict[str, Any]]], step: Callable[[], object]) -> list[_Run]:
    read = [_run(run) for run in runs]
    step()
    return read


def _run(pair: tuple[Path, dict[str, Any]]) -> _Run:
    path, record = pair
    spec = record["spec"]
    method, rank = spec["method"]["name"], spec["method"].get("rank")
    data = spec["data"].get("eval_name") or spec["data"]["name"]
    run = _Run(
        record["spec_id"],
        f"{spec['experiment']}, tier {spec['tier']}, model {spec['model']['name']}, data {data}",
        method if rank is None else f"{method} rank {rank}",
        {name: read_rows(path, name) for name in STREAMS},
        {"processor": _part(record, "machine").get("processor"), **_part(record, "packages")},
        _facts(record),
        {name: value for name, value in _part(record, "text_nll").items() if value is not None},
    )
    for row in run.rows["eval"]:
        scores = run.scores.setdefault(row["protocol"], {})
        if row["metric"] == "accuracy" and row["value"] is not None:
            scores[row["task"]] = float(row["value"]), int(row["n"])
    return run if run.scores else replace(run, scores={MISSING_VALUE: {}})


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


_EQUAL = {"params": ("trainable", "total"), "training": ("steps", "tokens", "shortened", "answers_cut", "unanswered")}


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs of one spec have in common, by name; what a record does not say, is not there."""
    parts = {f"{part}.{name}": _part(record, part).get(name) for part, names in _EQUAL.items() for name in names}
    inputs = _part(record, "inputs")
    parts |= {f"inputs.{name}.sha256": _part(inputs, name).get("sha256") for name in inputs}
    return {name: value for name, value in parts.items() if value is not None}


def _not_compared(
    mine: Survey, local: Mapping[str, _Run], committed: Mapping[str, _Run], unread: str | None
) -> list[str]:
    """What is in no row: runs of the user's that nobody committed or that are not complete, and what cannot be read."""
    extra = len(set(local) - set(committed))
    notes = [f"{extra} of your runs have no committed record and are not compared."] if extra else []
    asked = [(record["spec_id"], record["status"]) for _, record in mine.runs if record["spec_id"] in committed]
    if left := [f"{name} ({status})" for name, status in asked if status != "complete"]:
        named = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        notes.append(
            f"Of your runs that a committed one is like, not complete: {named}. `dora-lab run` goes on with them."
        )
    return [*notes, f"{unread} cannot be read: what was in them is not compared."] if unread else notes


def _made_otherwise(
    local: Mapping[str, _Run], committed: Mapping[str, _Run], found: Mapping[str, Agreement]
) -> list[str]:
    """With what, of packages and processors, a run was made that was not made with the same: the first, one that
    differs if there is one."""
    for key in sorted(found, key=lambda key: found[key].level != DIFFERS):
        mine, others = local[key].made, committed[key].made
        changed = [
            f"{name} {mine.get(name) or '–'!s:.24} (committed: {others.get(name) or '–'!s:.24})"
            for name in sorted({*mine, *others})
            if mine.get(name) != others.get(name)
        ]
        if changed:
            return [f"Made with others ({key}): {', '.join(changed)}."]
    return []
