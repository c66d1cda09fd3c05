"""Every number that the paper prints against runs of the same protocol, and against re-runs by others.

The paper's number is one more draw: with n >= 3 runs that differ in the seed alone, the difference has the standard
error s sqrt(1 + 1/n), and `verdict` says whether the two are equivalent. With one or two runs it is "1 of 3", "2 of 3",
with none the cell is "not run". Only complete runs of tier paper, on that model and by its protocol, count.

A score below chance is no knowledge: an answer that cannot be parsed counts as wrong. Such cells are flagged (more than
two binomial standard errors below the chance level), the paper's own and those of others included, and so is a share
of more than 1 % unparsed answers, which only our runs record.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false, reportUnhashable=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab.methods.catalog import catalog
from dora_lab.models import shapes
from dora_lab.paper.verdict import EQUIVALENT, MARGINS, NOT, UNDECIDED, decide, from_printed
from dora_lab.report import statistics
from dora_lab.runs.record import spec_of
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import iter_runs
from dora_lab.spec import Spec
from dora_lab.tasks import all_tasks, table_1

ENOUGH = 3  # runs
CELL_VERDICTS = (EQUIVALENT, NOT, UNDECIDED, *(f"{n} of {ENOUGH}" for n in range(1, ENOUGH)), "not run")
UNPARSED = 1.0  # percent
RELEASED = "released checkpoint, evaluated again"
_IN_GRAPH, _BARE = "norm in graph", "m: QKVOGUD, V: QKV"
_Key = tuple[str, str, float | None, str]  # the paper's name of a model, method, rank, what else was done


@dataclass(frozen=True)
class _Run:
    status: str
    seed: int
    by_protocol: bool  # the paper's
    by_task: dict[str, dict[str, Any]]  # column of table 1 -> row of eval.jsonl


def cells(root: Path, rows: pd.DataFrame, protocol: Iterable[Spec]) -> pd.DataFrame:
    """One row per number that the paper prints (rows of kind "number"), in its order.

    Args: root: results folder; rows: `claims()`; protocol: specs of the paper's protocol, any seed (those of the
        experiments' tier paper): a run counts if it is one of them but for the seed and what cannot change a result.
    Returns columns experiment, source, model, method, setting, rank, subject, metric, paper; elsewhere and reruns
        (text: value and where it stands), released (the paper's own adapter evaluated by somebody else), n_reruns,
        reruns_low, reruns_high; n, mean, sd, low, high (the prediction interval), unparsed_percent of our runs
        (missing without); verdict, flags (text, "" for none). Accuracies are percent.
    """
    runs = _runs(root, {_neutral(spec) for spec in protocol})
    sizes = rows[(rows["kind"] == "data") & (rows["metric"] == "test_items")].set_index("subject")["value"].to_dict()
    others = rows[rows["kind"].isin(["rerun", "reprint"])].to_dict("records")
    names = ("experiment", "source", "model", "method", "setting", "rank", "subject", "metric")
    out, below = [], {}
    for row in rows[rows["kind"] == "number"].to_dict("records"):
        told, reruns = _of_others(row, others)
        mine, flags = _of_ours(row, runs.get(_key(row), []))
        scores = {"the paper's": [row["value"]], "re-run": reruns, "ours": [mine["mean"]] if mine["n"] else []}
        where = row["source"], row["method"], _key(row)
        below[(*where, row["subject"])] = {whose: _below_chance(values, row, sizes) for whose, values in scores.items()}
        out.append({name: row[name] for name in names} | {"paper": row["value"]} | told | mine | {"flags": flags})
        out[-1]["where"] = where
    for cell in out:
        cell["flags"] = "; ".join([*_chance_flags(cell, below), *cell["flags"]])
        del cell["where"]
    return pd.DataFrame(out)


def summary(found: pd.DataFrame, experiment: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `cells` found in short: (how many cells of each verdict per table of the paper, the cells with runs)."""
    if experiment is not None:
        found = found[found["experiment"] == experiment]
    counts = pd.crosstab(found["source"], found["verdict"]).reindex(columns=list(CELL_VERDICTS), fill_value=0)
    flagged = (found["flags"] != "").groupby(found["source"]).sum()
    counts = counts.reindex(list(dict.fromkeys(found["source"]))).assign(flagged=flagged).rename_axis(None, axis=1)
    names = ["source", "model", "method", "rank", "subject", "paper"]
    ran = found.loc[found["n"] > 0, [*names, "mean", "sd", "n", "low", "high", "verdict", "flags"]]
    return counts.reset_index(), ran


# -------------------------------------------------------------------------------------------------------------- ours
def _runs(root: Path, protocol: set[Spec]) -> dict[_Key, list[_Run]]:
    """The runs of tier paper by the cell that they are about."""
    columns = {task.name: task.column for task in all_tasks()}
    found: dict[_Key, list[_Run]] = defaultdict(list)
    for path, record in iter_runs(Path(root), tier="paper"):
        spec = spec_of(record)
        name, method = shapes.printed_name(spec.model.name), spec.method
        if name is None or method.name not in catalog() or spec.evaluation.split != "test":
            continue
        if not _is_that_model(name, record):
            continue
        setting = _BARE if method.magnitude_modules else "" if method.detach_norm else _IN_GRAPH
        rows = read_rows(path, "eval") if record["status"] == "complete" else []
        scored = {
            columns[row["task"]]: row
            for row in rows
            if row["protocol"] == "generate" and row["metric"] == "accuracy" and row["value"] is not None
        }
        run = _Run(record["status"], spec.seed, _neutral(spec) in protocol, scored)
        found[name, catalog()[method.name].label, method.rank, setting].append(run)
    return found


def _is_that_model(name: str, record: dict[str, Any]) -> bool:
    """Whether the base has the parameters of the paper's model: a folder can have any name. Unknown: not yet loaded."""
    params = record.get("params") or {}
    if "total" not in params:
        return record["status"] != "complete"
    return params["total"] - params["trainable"] == shapes.PAPER[name][0].parameters()


def _neutral(spec: Spec) -> Spec:
    """The spec without what cannot change the score of a task: seed, batches, pins, masked padding, other tasks."""
    name = shapes.printed_name(spec.model.name) or spec.model.name
    return replace(
        spec,
        experiment="any",
        seed=0,
        model=replace(spec.model, name=name, revision=None, pad="own"),
        data=replace(spec.data, sha256=None, revision=None, pad_to_multiple_of=1, tasks=("any",)),
        optim=spec.optim and replace(spec.optim, micro_batch_size=1),
        probe=None,
        evaluation=replace(spec.evaluation, batch_size=1, protocols=("generate",)),
    )


def _of_ours(row: dict[str, Any], runs: Sequence[_Run]) -> tuple[dict[str, Any], list[str]]:
    """Numbers and verdict of our runs of a cell, and flags."""
    mine: dict[str, Any] = dict.fromkeys(("mean", "sd", "low", "high", "unparsed_percent"))
    runs = runs if row["metric"] == "accuracy_percent" else []
    lost = sum(run.status in ("failed", "interrupted") for run in runs)
    other = sum(run.status == "complete" and not run.by_protocol for run in runs)
    flags = [f"{lost} run{'' if lost == 1 else 's'} failed or interrupted"] if lost else []
    flags += [f"{other} run{'' if other == 1 else 's'} of another protocol left out"] if other else []
    by_seed: dict[int, tuple[float, int, int]] = {}  # a seed run twice is one draw
    for run in runs:
        if run.by_protocol and (found := _score(row["subject"], run)) is not None:
            by_seed.setdefault(run.seed, found)
    scored = list(by_seed.values())
    values = [value for value, _, _ in scored]
    mine |= {"n": len(values), "verdict": f"{len(values)} of {ENOUGH}" if values else "not run"}
    if values:
        mean, sd = statistics.mean_sd(values)
        unparsed = 100 * sum(lost for _, _, lost in scored) / sum(asked for _, asked, _ in scored)
        mine |= {"mean": mean, "sd": sd, "unparsed_percent": unparsed}
        flags += [f"unparsed {unparsed:.1f} %"] if unparsed > UNPARSED else []
    if len(values) >= ENOUGH:
        low, high = statistics.prediction_interval(values)
        rounding = 0.05 if round(row["value"], 1) == row["value"] else 0.005
        found = from_printed(values, row["value"], rounding=rounding)
        mine |= {"low": low, "high": high, "verdict": decide(found, EQUIVALENT, MARGINS["accuracy"], found.p())}
    return mine, flags


def _score(subject: str, run: _Run) -> tuple[float, int, int] | None:
    """(percent, items, unparsed) of a task or of the average over table 1; None if the run does not have it."""
    wanted = [task.column for task in table_1()] if subject == "average" else [subject]
    if not set(wanted) <= set(run.by_task):
        return None
    rows = [run.by_task[name] for name in wanted]
    mean = 100 * sum(row["value"] for row in rows) / len(rows)
    return mean, sum(row["n"] for row in rows), sum(row["n_unparsed"] for row in rows)


# ------------------------------------------------------------------------------------------------------------ others
def _key(row: dict[str, Any]) -> _Key:
    setting = str(row["setting"])
    kind = _IN_GRAPH if _IN_GRAPH in setting and "against" not in setting else _BARE if setting == _BARE else ""
    rank = None if math.isnan(row["rank"]) else row["rank"]
    return str(row["model"]), str(row["method"]).removesuffix("†"), rank, kind


def _of_others(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[float]]:
    """What others print or have measured for the same cell, in words, and the values of their re-runs.

    A re-run of no stated rank stands beside every rank.
    """
    model, method, rank, kind = _key(row)
    same = [
        other
        for other in others
        if (other["subject"], other["metric"]) == (row["subject"], row["metric"])
        and _key(other) in ((model, method, rank, kind), (model, method, None, kind))
    ]
    printed = [other for other in same if other["kind"] == "reprint"]
    released = [other for other in same if other["setting"] == RELEASED]
    again = [other for other in same if other["kind"] == "rerun" and other not in released]
    # a table of one thread may repeat, by rank, a run that the thread gives in full
    seen = {(other["source"], other["value"]): other for other in reversed(again)}
    again = [other for other in again if seen[other["source"], other["value"]] is other]
    values = [other["value"] for other in again]
    told = {
        "elsewhere": "; ".join(map(_told, printed)) or None,
        "reruns": "; ".join(map(_told, again)) or None,
        "released": "; ".join(map(_told, released)) or None,
        "n_reruns": len(again),
        "reruns_low": min(values, default=None),
        "reruns_high": max(values, default=None),
    }
    return told, values


def _told(other: dict[str, Any]) -> str:
    setting = f", {other['setting']}" if other["setting"] and other["setting"] != RELEASED else ""
    value = f"{other['value']:.2f}".removesuffix("0")
    return f"{value} ({other['source']}{setting})"


# ------------------------------------------------------------------------------------------------------------- flags
def _below_chance(values: Iterable[float], row: dict[str, Any], sizes: dict[str, float]) -> list[str]:
    """Those of the values, in text, that are below what guessing gives."""
    chance = {task.column: task.chance for task in all_tasks()}.get(row["subject"])
    items = sizes.get(row["subject"])
    if row["metric"] != "accuracy_percent" or chance is None or items is None:
        return []
    floor = 100 * (chance - 2 * math.sqrt(chance * (1 - chance) / items))
    return [f"{value:.1f}" for value in values if value < floor]


def _chance_flags(cell: dict[str, Any], below: dict[tuple[Any, ...], dict[str, list[str]]]) -> list[str]:
    """Whose score is below chance; an average says in which of its cells."""
    if cell["subject"] != "average":
        found = below[(*cell["where"], cell["subject"])]
        return [f"{whose} {', '.join(values)} below chance" for whose, values in found.items() if values]
    columns = [task.column for task in all_tasks()]
    parts = {name: below[(*cell["where"], name)] for name in columns if (*cell["where"], name) in below}
    return [
        f"{whose} below chance in {', '.join(names)}"
        for whose in ("the paper's", "re-run", "ours")
        if (names := [name for name, found in parts.items() if found[whose]])
    ]
