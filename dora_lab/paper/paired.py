"""Conditions that answered the same items with the same seeds, taken from a frame and contrasted by the one rule."""

# pyright: reportCallIssue=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dora_lab.paper.verdict import Contrast, contrast
from dora_lab.report.items import clusters, item_values

LOWER_IS_BETTER = ("choice_nll", "answer_nll")  # likelihoods: compared as ratios, and so that more is better


def paired(terms: Sequence[tuple[float, pd.DataFrame]], metric: str, tasks: Sequence[str] = ()) -> Contrast | None:
    """The contrast of conditions over tasks, of the seeds whose runs have a value of every task in every condition.

    Args: terms: (coefficient, rows of `report.frame`, stream eval, one per task and seed) of each condition; metric: as
        `report.items.item_values`; tasks: none: all that any condition has. Items of one fact are together where the
        rows say so.
    Returns None where no seed is shared. Raises ValueError for runs that answered different items.
    """
    cells = [
        {(row["task"], int(row["seed"])): row for row in part[part["value"].notna()].to_dict("records")}
        for _, part in terms
    ]
    tasks = sorted(tasks or {task for by in cells for task, _ in by})
    shared = [{seed for at, seed in by if at == task} for by in cells for task in tasks]
    seeds = sorted(set.intersection(*shared)) if shared else []
    if not seeds:
        return None
    used = {task: [by[task, seed] for by in cells for seed in seeds] for task in tasks}
    for rows in used.values():
        _require_same_items(rows)
    # early records have the numbers alone: their mean stands for their items
    known = metric != "accuracy" or all(isinstance(row.get("correct"), str) for rows in used.values() for row in rows)
    sign = -1 if metric in LOWER_IS_BETTER else 1

    def values(row: dict[str, Any]) -> NDArray[np.float64]:
        return item_values(row, metric) if known else np.array([float(row["value"])])

    return contrast(
        [
            (sign * coefficient, {task: np.array([values(by[task, seed]) for seed in seeds]) for task in tasks})
            for (coefficient, _), by in zip(terms, cells, strict=True)
        ],
        {task: clusters(used[task][0]) if known else np.zeros(1, np.int64) for task in tasks},
        ratio=metric in LOWER_IS_BETTER,
    )


def _require_same_items(rows: Sequence[dict[str, Any]]) -> None:
    seen = {(int(row["n"]), row.get("prompt_sha256")) for row in rows}
    if len(seen) > 1:
        raise ValueError(
            f"task {rows[0]['task']}: runs {', '.join(sorted({r['spec_id'] for r in rows}))} answered "
            f"different items (n, prompt_sha256: {sorted(seen, key=str)}), so they cannot be paired. "
            f"Run them again on the same data."
        )
