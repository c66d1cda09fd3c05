"""Values of single items in a row of the stream eval, and which of them belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_lab.runs.item_values import TYPES, number_of, unpack


def item_values(row: Mapping[str, Any], metric: str) -> NDArray[np.float64]:
    """(items,) values of a row: "accuracy" (0 or 1, from `correct`), a kind of `runs.item_values.TYPES`, or
    "normalised", (score - floor) / (ceiling - floor).

    Raises ValueError, naming the run and task, for a row without them: of an early version, or of a validation split.
    """
    where = f"run {row.get('spec_id')}, task {row.get('task')}"
    if metric == "accuracy":
        text = row.get("correct")
        if not isinstance(text, str) or set(text) - {"0", "1"} or len(text) != row["n"]:
            raise ValueError(f"{where}, field correct: expected {row['n']} characters 0 or 1; evaluate the run again")
        return np.frombuffer(text.encode(), np.uint8).astype(float) - ord("0")
    if metric == "normalised":
        low, high = (row.get(bound) for bound in ("floor", "ceiling"))
        if low is None or high is None or not low < high:
            raise ValueError(f"{where}: floor {low} and ceiling {high}; a score is normalised where both are known")
        return (item_values(row, "score") - low) / (high - low)
    if metric not in TYPES:
        raise ValueError(f"metric {metric!r} is not one of accuracy, normalised, {', '.join(TYPES)}")
    kept = row.get("per_item")
    if not isinstance(kept, Mapping) or metric not in kept:
        raise ValueError(f"{where}: no {metric} of single items; evaluate the run again on the test split")
    values = unpack(metric, kept[metric])
    if len(values) != row["n"]:
        raise ValueError(f"{where}, field per_item.{metric}: {len(values)} values of {row['n']} items; restore the row")
    return values


def clusters(row: Mapping[str, Any]) -> NDArray[np.int64]:
    """(items,) the number of the fact that each item asks about; without facts, each item is one by itself."""
    kept = row.get("per_item")
    if isinstance(kept, Mapping) and "fact" in kept:
        return item_values(row, "fact").astype(np.int64)
    # negative: never the number of a fact; and of another task, other ones
    return -(number_of(str(row["task"])) * 2**20 + 1 + np.arange(int(row["n"]), dtype=np.int64))
