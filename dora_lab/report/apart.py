"""What sets the rows of a table apart, in words: a method at another learning rate is not the method alone."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from typing import Any

import pandas as pd

from dora_lab.report.labels import ordered_labels
from dora_lab.report.naming import GROUP
from dora_lab.spec import words

_NAMED = ("method.name", "method.rank", "method.target_modules")  # what a row's name says, or goes without saying
RATE = "optim.learning_rate"
_SETTING = ["tier", "model", "data", "method", "rank"]
ENOUGH = 3  # rates that make a grid
BESIDE = {"alpha": "method.alpha", "learning_rate": RATE}
COSTS = {"seconds_train": "seconds.train", "peak_memory_bytes": "peak_memory_bytes"}


def sets_apart(runs: pd.DataFrame, everything: pd.DataFrame) -> str | None:
    """A sentence on the fields of the specs in which the labels of a block differ, besides method and rank.

    Args: runs: rows of `frame` that share a block; everything: rows of all experiments. Runs on a validation split are
        the search for a learning rate: a rate that is the highest or the lowest of such a search is said to be so.
    Returns None where there is nothing to say. A field that a method does not have (the rate of a base) is left out.
    """
    if not len(runs):
        return None
    runs, labels = runs.drop_duplicates("spec_id"), ordered_labels(runs)
    said = []
    for field in sorted(column for column in runs if column.startswith(("method.", "optim.", "data."))):
        if field in _NAMED:
            continue
        values = {label: _of(runs[runs["label"] == label], field) for label in labels}
        values = {label: value for label, value in values.items() if value is not None}
        if len(set(values.values())) > 1:
            name = words().get(field, field)
            ends = {label: _end(runs[runs["label"] == label], everything) if field == RATE else "" for label in values}
            told = ", ".join(f"{label} {value}{ends[label]}" for label, value in values.items())
            said.append(f"{name if isinstance(name, str) else field}: {told}")
    return f"What sets rows apart besides method and rank: {'; '.join(said)}." if said else None


def beside(records: pd.DataFrame) -> pd.DataFrame:
    """What can stand beside every score, a row per `GROUP` and label: alpha, learning rate, time and memory.

    Args: records: a frame of the stream "record".
    Returns `alpha` and `learning_rate` as text ("8/16" where a label's runs differ), `seconds_train` (of training
        alone) and `peak_memory_bytes` as means over its runs; None where a record does not say, or nothing is trained.
    """
    rows = [
        dict(zip([*GROUP, "label"], key, strict=True))
        | {name: _of(runs, field) if field in runs else None for name, field in BESIDE.items()}
        | {name: runs[field].mean() if field in runs else None for name, field in COSTS.items()}
        for key, runs in records.groupby([*GROUP, "label"], dropna=False)
    ]
    return pd.DataFrame(rows, columns=[*GROUP, "label", *BESIDE, *COSTS])


def _of(runs: pd.DataFrame, field: str) -> str | None:
    """The one value of a label's runs; None where they have none."""
    known = runs[field].dropna().unique()
    return None if not len(known) else "/".join(f"{value:g}" if _number(value) else str(value) for value in known)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _end(runs: pd.DataFrame, everything: pd.DataFrame) -> str:
    """Whether the learning rate of a label's runs is an end of the grid that it was chosen from."""
    first = runs.iloc[0]
    tried = everything[everything["split"] == "validation"]
    for name in _SETTING:
        tried = tried[tried[name].isna() if pd.isna(first[name]) else tried[name] == first[name]]
    rates = sorted(tried[RATE].dropna().unique()) if RATE in tried else []
    if len(rates) < ENOUGH or first[RATE] not in (rates[0], rates[-1]):
        return ""
    return f" (the {'lowest' if first[RATE] == rates[0] else 'highest'} of the {len(rates)} tried)"
