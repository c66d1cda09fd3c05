"""The pilot: how far families and metrics spread over seeds on validation items, beside the margins of a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis import frame, script
from dora_lab import report
from dora_lab.paper.verdict import MARGINS
from dora_lab.report import Block, number
from dora_lab.report.statistics import mean_sd

METRICS = {"accuracy": ("accuracy, %", "points", 1), "choice_nll": ("choice NLL, nats", "% of the choice NLL", 3)}
RATIO = ("choice_nll",)  # compared by the logarithm of a ratio, the others by a difference
SPREAD = "sd / margin"
SETTING = {"rank": "rank", "alpha": "method.alpha", "rate": "optim.learning_rate"}
HEADS = {"r": "rank", "α": "alpha", "Rate": "rate"}
ISNT = "a result. Validation items of a small world, to choose a metric and a number of seeds by."
NOTE = (
    "Mean ± standard deviation over seeds. Differences are taken within a seed; of the choice NLL, 100 times the "
    "logarithm of the ratio. sd / margin: the standard deviation of these differences over the margin of a verdict "
    f"({MARGINS['accuracy']:g} point, {MARGINS['choice_nll']:g} % of the choice NLL). Average: over tasks within a run "
    "first."
)


def build(results: Path) -> list[Path]:
    """Write results/tables/pilot.{md,csv,tex}; returns their paths, none where there is no pilot."""
    evals = frame(results, "pilot")
    evals = evals[(evals["split"] == "validation") & (evals["protocol"] == "loglikelihood")]
    if not len(evals):
        return []
    blocks, data = [], []
    for _, part in report.groups(evals):
        rows = _rows(part)
        first = part.iloc[0]
        title = f"{first['experiment']}, tier {first['tier']}, model {first['model']}, data {first['data']}"
        blocks.append(_block(title, rows))
        data += [{"data": first["data"]} | row for row in rows]
    source = report.provenance(evals, evals.attrs["statuses"])
    title = "Spread over seeds on validation items"
    return report.save_table(results / "tables", "pilot", title, blocks, pd.DataFrame(data), source, ISNT)


def _rows(evals: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per number of one source: level of each label, and difference of each two, by metric and task."""
    labels = report.ordered_labels(evals)
    evals = evals.assign(accuracy=evals["value"])
    rows: list[dict[str, Any]] = []
    for metric in METRICS:
        of_label = {}
        for label in labels:
            mine = evals[evals["label"] == label]
            table = mine.pivot(index="seed", columns="task", values=metric)
            # a run that lacks a task has no average
            of_label[label] = table.assign(average=table.mean(axis=1, skipna=False))
            scale = 1 if metric in RATIO else 100
            named = {"label": label, "metric": metric} | {name: mine[field].iloc[0] for name, field in SETTING.items()}
            rows += _summary(named, of_label[label] * scale, None)
        for one, other in combinations(labels, 2):
            tables = [np.log(of_label[name]) if metric in RATIO else of_label[name] for name in (one, other)]
            named = {"label": f"{one} − {other}", "metric": metric} | dict.fromkeys(SETTING)
            rows += _summary(named, 100 * (tables[0] - tables[1]), MARGINS[metric])
    return rows


def _summary(named: dict[str, Any], table: pd.DataFrame, margin: float | None) -> list[dict[str, Any]]:
    found = []
    for task in [*report.ordered_tasks(set(table.columns) - {"average"}), "average"]:
        values = table[task].dropna()
        mean, sd = mean_sd(values.tolist())
        spread = None if margin is None or sd is None else sd / margin
        found.append(named | {"task": task, "mean": mean, "sd": sd, "seeds": len(values), SPREAD: spread})
    return found


def _block(title: str, rows: Sequence[dict[str, Any]]) -> Block:
    by = pd.DataFrame(rows)
    lines, spreads = [], []
    for (label, metric), part in by.groupby(["label", "metric"], sort=False):
        setting, seeds = part.iloc[0], str(part["seeds"].max())
        set_to = {head: None if pd.isna(setting[name]) else f"{setting[name]:g}" for head, name in HEADS.items()}
        level, unit, digits = METRICS[metric]
        if pd.notna(setting["rate"]):
            shown = {_head(row["task"]): number(row["mean"], row["sd"], digits) for _, row in part.iterrows()}
            lines.append({"": f"{label}, {level}"} | set_to | shown | {"Seeds": seeds})
            continue
        shown = {_head(row["task"]): number(row["mean"], row["sd"]) for _, row in part.iterrows()}
        lines.append({"": f"{label}, {unit}"} | set_to | shown | {"Seeds": seeds})
        shown = {_head(row["task"]): number(row[SPREAD], digits=2) for _, row in part.iterrows()}
        spreads.append({"": f"{SPREAD}, {label}, {unit}"} | set_to | shown | {"Seeds": seeds})
    notes = (NOTE, *filter(None, [_smaller(by)]))
    cells, narrow = pd.DataFrame([*lines, *spreads]), ("", *HEADS, "Average", "Seeds")
    wide = tuple(name for name in cells if name not in ("r", "α"))
    return Block(title=title, cells=cells, apart=len(spreads), notes=notes, narrow=narrow, wide=wide)


def _smaller(rows: pd.DataFrame) -> str | None:
    """Which metric's average spreads less beside its margin, and how well so few seeds tell."""
    found = rows[(rows["task"] == "average") & rows[SPREAD].notna()].sort_values(SPREAD)
    if found["metric"].nunique() < 2:
        return None
    best, n = found.iloc[0], int(found["seeds"].min())
    metric = METRICS[best["metric"]][0].split(",")[0]
    low, high = np.sqrt((n - 1) / stats.chi2.ppf([0.975, 0.025], n - 1))
    return (
        f"Least spread beside its margin: the average of {best['label']} by {metric}. With {n} seeds a standard "
        f"deviation is known within factors of {low:.1f} and {high:.1f} (95 %, normal)."
    )


def _head(task: str) -> str:
    return "Average" if task == "average" else report.TASKS.get(task, task)


if __name__ == "__main__":
    script(build, __doc__)
