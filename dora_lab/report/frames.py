"""Run records as frames, their labels, and scores over seeds."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false, reportUnhashable=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dora_lab.report import statistics
from dora_lab.report.labels import ordered_labels, ordered_tasks
from dora_lab.report.naming import GROUP, add_labels
from dora_lab.runs.record import spec_of
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import survey
from dora_lab.spec import Spec, leaves, to_dict

REFUSED = "damaged or misplaced (`dora-lab doctor` names them)"
_FIRST = (*GROUP, "spec_id", "method", "rank", "label", "seed", "trainable_percent", "commit", "modified")
_STREAMS = {  # columns that a frame has even when there are no rows
    "eval": (
        "task", "protocol", "metric", "value", "stderr", "n", "n_unparsed", "chance", "majority", "prompt_sha256",
        "correct", "choice_nll", "answer_nll", "margin",
    ),
    "probe": ("step", "fraction", "module", "layer", "kind", "delta_m", "delta_d", "relative_change"),
    "metrics": ("step", "tokens", "loss", "learning_rate", "grad_norm"),
    "timing": ("step", "seconds"),
    "record": ("status",),
}  # fmt: skip


def frame(
    root: Path, experiment: str | None = None, stream: str = "eval", declared: Iterable[Spec] = ()
) -> pd.DataFrame:
    """All complete runs of the results folder `root` (those in `root/runs`) as one frame.

    Args: experiment: name of one experiment; None = all. stream: "eval", "probe", "metrics", "timing" (one row per line
        of that file) or "record" (one row per run, the record flattened: "params.trainable", "seconds.train", ...).
        declared: the specs that the experiments name: their runs keep their labels whatever lies beside them.
    Returns a frame whose first columns describe the run: the spec flattened with dots ("optim.learning_rate"), plus
        `method`, `rank`, `model`, `data`, `eval_data`, `split` as short names, `label` (name in tables; runs that
        differ in more than the seed have different labels), `trainable_percent` (of all parameters; None unknown),
        `commit` and `modified` (uncommitted changes) of the code. `attrs["incomplete"]` counts the runs that were
        left out, `attrs["statuses"]` by label and status ("DoRA failed"), with the folders that `runs.survey` refuses.
        No runs: an empty frame of these columns.
    Raises: ValueError for an unknown stream.
    """
    if stream not in _STREAMS:
        raise ValueError(f"report.frame: stream {stream!r} is not one of {', '.join(_STREAMS)}")
    runs: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
    left_out: list[dict[str, Any]] = []
    found = survey(Path(root), experiment)
    for path, record in found.runs:
        if record["status"] == "complete":
            runs.append((path, record, _run_columns(record)))
        else:
            left_out.append(_run_columns(record) | {"status": record["status"]})
    named = [_spec_columns(spec) for spec in declared]
    statuses = _statuses([columns for _, _, columns in runs], left_out, named)
    if found.left_out:
        statuses[REFUSED] = len(found.left_out)
    add_labels([columns for _, _, columns in runs], named)
    if stream == "record":
        of_run = [
            _cells({k: v for k, v in record.items() if k not in ("spec", "spec_id", "code", "files")})
            for _, record, _ in runs
        ]
        result = pd.DataFrame([columns | more for (_, _, columns), more in zip(runs, of_run, strict=True)])
    else:
        result = _beside([columns for _, _, columns in runs], [read_rows(path, stream) for path, _, _ in runs])
    first = [*_FIRST, *_STREAMS[stream]]
    result = result.reindex(columns=[*first, *(c for c in result.columns if c not in first)])
    result["rank"] = result["rank"].astype("Int64")
    result.attrs.update(incomplete=len(left_out) + len(found.left_out), statuses=statuses)
    return result


def _beside(runs: Sequence[Mapping[str, Any]], streams: Sequence[Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """A row per line of the streams, the columns of its run before its own, which win where both have a name.

    The some hundred columns of a run are made once for it and repeated, not made anew for each of its lines.
    """
    rows = pd.DataFrame([row for stream in streams for row in stream])
    left = pd.DataFrame([columns for columns, stream in zip(runs, streams, strict=True) if stream])
    left = left.drop(columns=[name for name in left.columns if name in rows.columns])
    repeated = left.take(np.repeat(np.arange(len(left)), [len(stream) for stream in streams if stream]))
    return pd.concat([repeated.reset_index(drop=True), rows], axis=1)


def _statuses(
    complete: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]], named: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """How many of the runs that were left out ended how, by the labels that they would have beside the complete."""
    others = [dict(columns) for columns in left_out]
    add_labels([*(dict(columns) for columns in complete), *others], named)
    return dict(sorted(Counter(f"{columns['label']} {columns['status']}" for columns in others).items()))


def _run_columns(record: Mapping[str, Any]) -> dict[str, Any]:
    flat = _spec_columns(spec_of(record))  # with the fields that came after it
    params, code = record.get("params") or {}, record.get("code") or {}
    trainable, total = params.get("trainable"), params.get("total")
    return dict(flat) | {
        "spec_id": record["spec_id"],
        "trainable_percent": 100 * trainable / total if trainable is not None and total else None,
        "commit": code.get("commit") or (f"files {code['files']}" if code.get("files") else None),
        "modified": bool(code.get("diff")),
    }


@cache  # a report asks for the same specs, a few thousand, once for each of its tables and figures
def _spec_columns(spec: Spec) -> Mapping[str, Any]:
    """A spec flattened, and short names of what everybody asks for."""
    flat = _cells(to_dict(spec))
    return flat | {
        "method": flat["method.name"],
        "rank": flat.get("method.rank"),
        "model": flat["model.name"],
        "data": flat["data.name"],
        "split": flat.get("evaluation.split"),
        "eval_data": flat.get("data.eval_name") or flat["data.name"],
    }


def _cells(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a row; lists as JSON text, so that a column can be grouped and compared."""
    found = leaves(tree)
    return {path: json.dumps(value) if isinstance(value, list | tuple) else value for path, value in found.items()}


def groups(data: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split a frame into what may share a table or figure (`GROUP`).

    Returns (suffix, rows) pairs: suffix is "" for the embedded default (tier mini, model mini, data mini), otherwise
    "_<tier>_<model>_<data>" (and the evaluation's data and split where they differ), for the names of files.
    """
    found = []
    for key, rows in data.groupby(GROUP, dropna=False, sort=True):
        tier, model, trained, evaluated, split = (str(part) for part in key[1:6])
        plain = {tier, model, trained, evaluated} == {"mini"} and split == "test"
        more = [name for name, usual in ((evaluated, trained), (split, "test")) if name != usual]
        # the names of models and data are anybody's, and these are names of files
        safe = "_".join(re.sub(r"[^\w.-]+", "-", part)[:80] for part in (tier, model, trained, *more))
        found.append(("" if plain else f"_{safe}", rows))
    return sorted(found, key=lambda pair: pair[0])


def scores(evals: pd.DataFrame) -> pd.DataFrame:
    """Accuracy per group, protocol, label and task over seeds, and the average over tasks.

    Args: evals: rows of `frame(stream="eval")` with metric "accuracy" (fractions).
    Returns one row per (GROUP, protocol, label, task), `task` being a task name or "average": mean and sd (percent;
        sd None for one seed), n_seeds, n_items (of one seed), unparsed_percent (None where nothing is parsed), chance
        and majority (percent, None unknown), method, rank, trainable_percent. The average is the mean over tasks
        within a run, then over seeds; a run that lacks a task of its group and protocol has no average.
    """
    rows: list[dict[str, Any]] = []
    accuracy = evals[evals["metric"] == "accuracy"] if len(evals) else evals
    if not len(accuracy):
        names = (
            "protocol", "label", "task", "mean", "sd", "n_seeds", "n_items", "unparsed_percent", "chance",
            "majority",
        )  # fmt: skip
        return pd.DataFrame(columns=[*GROUP, *names, "method", "rank", "trainable_percent"])
    for key, block in accuracy.groupby([*GROUP, "protocol"], dropna=False, sort=True):
        tasks = ordered_tasks(block["task"])
        for label in ordered_labels(block):
            runs = block[block["label"] == label]
            common = dict(zip([*GROUP, "protocol"], key, strict=True)) | {
                "label": label,
                "method": runs["method"].iloc[0],
                "rank": runs["rank"].iloc[0],
                "trainable_percent": _none(runs["trainable_percent"].iloc[0]),
            }
            for task in tasks:
                of_task = runs[runs["task"] == task]
                rows.append(common | {"task": task} | _summary(of_task, 100 * of_task["value"].dropna()))
            averages = [
                100 * run["value"].mean()
                for _, run in runs.groupby("spec_id")
                if set(run.loc[run["value"].notna(), "task"]) == set(tasks)
            ]
            rows.append(common | {"task": "average"} | _summary(runs, averages) | {"n_items": _per_seed_items(runs)})
    return pd.DataFrame(rows)


def _summary(rows: pd.DataFrame, values: Sequence[float] | pd.Series) -> dict[str, Any]:
    mean, sd = statistics.mean_sd(list(values))
    parsed = rows[rows["n_unparsed"].notna()] if "n_unparsed" in rows else rows.iloc[:0]
    out: dict[str, Any] = {
        "mean": mean,
        "sd": sd,
        "n_seeds": len(values),
        "n_items": _single(rows, "n"),
        "unparsed_percent": 100 * parsed["n_unparsed"].sum() / parsed["n"].sum() if len(parsed) else None,
    }
    for name in ("chance", "majority"):
        known = rows.groupby("task")[name].first() if name in rows and len(rows) else pd.Series(dtype=float)
        out[name] = 100 * float(known.mean()) if len(known) and known.notna().all() else None
    return out


def _per_seed_items(runs: pd.DataFrame) -> int | None:
    sums = set(runs.groupby("spec_id")["n"].sum())
    return int(sums.pop()) if len(sums) == 1 else None


def _single(rows: pd.DataFrame, column: str) -> int | None:
    values = set(rows[column].dropna())
    return int(values.pop()) if len(values) == 1 else None


def _none(value: Any) -> Any:
    return None if pd.isna(value) else value
