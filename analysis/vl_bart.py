"""Scores of VL-BART's runs on the paper's four tasks, and the paper's own: what the tables 2 and 3 are made of."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dora_lab import paper, report
from dora_lab.report import Block, number
from dora_lab.report.statistics import mean_sd
from dora_lab.spec import Method
from dora_lab.tasks import load_task

PRINTED = (
    "measured here. Single runs, as the paper prints them; FT and LoRA it quotes, trained in another way than DoRA."
)
MEANS = (
    "Mean ± standard deviation over seeds. Accuracy in percent, captions CIDEr-D times 100. Average: as the paper has "
    "it, the plain mean of the tasks; no verdict stands on it. NLL: -log p per token of the best answer, in nats, mean "
    "over tasks; lower is better."
)


def score_rows(
    evals: pd.DataFrame, tasks: Mapping[str, str], cells: Mapping[str, Method], seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row per setting: name, label, seeds, seconds of training, mean and sd of each task's score (as printed), of the
    average, of the normalised mean (None without bounds) and of the NLL; floor and ceiling of each task.

    Args: tasks: what was asked, and its name in the row; cells: the method of a row by the row's name; seconds: by run.
    """
    wanted, found = [*tasks], []
    names = {_told(method): name for name, method in cells.items()}
    for label in report.ordered_labels(evals):
        mine = evals[(evals["label"] == label) & evals["task"].isin(wanted)]
        runs = [run.set_index("task").loc[wanted] for _, run in mine.groupby("seed") if {*run["task"]} == {*wanted}]
        if not runs:
            continue
        first = runs[0].iloc[0]
        told = first["method"], first["method.dropout"], first["method.detach_norm"]
        row: dict[str, Any] = {"name": names.get(told, label), "label": label}
        row |= {"seeds": len(runs), "learning_rate": first.get("optim.learning_rate"), "spec_id": first["spec_id"]}
        spent = [seconds.get(name, float("nan")) for name in mine["spec_id"].unique()]
        row |= {
            "seconds": float(np.mean(spent)),
            "rank": first["rank"],
            "alpha": first["method.alpha"],
            "percent": first["trainable_percent"],
        }
        for task, plain in tasks.items():
            row[plain], row[f"{plain}_sd"] = mean_sd([100 * run.loc[task, "value"] for run in runs])
            for bound in ("floor", "ceiling"):
                row[f"{plain}_{bound}"] = 100 * _known(runs[0].loc[task].get(bound))
        row["average"], row["average_sd"] = mean_sd([100 * run["value"].mean() for run in runs])
        row["nll"], row["nll_sd"] = mean_sd([run["answer_nll"].mean() for run in runs])
        normal = [value for run in runs if np.isfinite(value := _normalised(run))]
        row["normalised"], row["normalised_sd"] = mean_sd(normal) if len(normal) == len(runs) else (None, None)
        found.append(row)
    given = [row["name"] for row in found]
    return [row | {"name": row["label"] if given.count(row["name"]) > 1 else row["name"]} for row in found]


def _told(method: Method) -> tuple[str, float, bool]:
    return method.name, method.dropout, method.detach_norm


def _one(values: Sequence[float]) -> float:
    """The value that all rows have; of runs that were asked other items there is none."""
    return values[0] if len({*values}) == 1 else float("nan")


def _known(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _normalised(run: pd.DataFrame) -> float:
    if not {"floor", "ceiling"} <= {*run.columns}:
        return float("nan")
    low, high = run["floor"].astype(float), run["ceiling"].astype(float)
    return float(100 * ((run["value"] - low) / (high - low)).mean(skipna=False))


def seconds_of(records: pd.DataFrame) -> dict[str, float]:
    """Seconds of training by run."""
    return records.set_index("spec_id")["seconds.train"].to_dict() if "seconds.train" in records else {}


def shown(rows: Sequence[dict[str, Any]], tasks: Sequence[str], bounded: bool = False) -> pd.DataFrame:
    """The rows as cells of a table; bounded: of an embedded world, with what can be reached on it."""
    heads = {task: ("mini-" if bounded else "") + load_task(task).column for task in tasks}
    cells = []
    for row in rows:
        trained = row["percent"] != 0
        line = {"Method": row["name"], "r": None if pd.isna(row["rank"]) else str(row["rank"])}
        line["Rate"] = f"{row['learning_rate']:g}" if trained and pd.notna(row["learning_rate"]) else None
        line["#Params %"] = number(row["percent"], digits=2)
        line["Train, s"] = number(row["seconds"]) if trained else None
        line |= {head: number(row[task], row[f"{task}_sd"]) for task, head in heads.items()}
        line["Average"] = number(row["average"], row["average_sd"])
        if bounded:
            line["Normalised"] = number(row["normalised"], row["normalised_sd"])
        cells.append(line | {"NLL": number(row["nll"], row["nll_sd"], digits=3), "Seeds": str(row["seeds"])})
    if bounded:
        for bound in ("floor", "ceiling"):
            values = [_one([row[f"{task}_{bound}"] for row in rows]) for task in tasks]
            line = {"Method": bound} | dict(zip(heads.values(), map(number, values), strict=True))
            cells.append(
                line | {"Average": number(float(np.mean(values))), "Normalised": number(100.0 * (bound != "floor"))}
            )
    return pd.DataFrame(cells)


def printed(experiment: str, tasks: Sequence[str], title: str) -> Block:
    """The paper's rows of an experiment; of table 7 the one with the norm in the graph, as the other is table 2's."""
    rows = paper.claims(experiment)
    rows = rows[(rows["kind"] == "number") & (rows["metric"].isin(("accuracy_percent", "cider", "mean")))]
    cells = []
    for (source, method, setting), part in rows.groupby(["source", "method", "setting"], sort=False):
        values = part.set_index("subject")["value"]
        if source == "Table 7" and setting != "norm in graph":
            continue
        line = {"Source": source, "Method": f"{method}, {setting}" if setting else method}
        line["#Params %"] = number(part["trainable_percent"].iloc[0], digits=2)
        heads = [*(load_task(task).column for task in tasks), "average"]
        cells.append(line | {head.replace("average", "Average"): number(values.get(head)) for head in heads})
    return Block(title=title, cells=pd.DataFrame(cells), text=("Source", "Method"), isnt=PRINTED)
