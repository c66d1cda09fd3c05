"""How things are shown: names, order, colours and markers of methods, tasks and matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from dora_lab.methods.catalog import catalog, spare_colour
from dora_lab.tasks import all_tasks

MISSING = "–"
HALF_RANK = "†"


@dataclass(frozen=True)
class Style:
    """How a method is shown: name in tables, colour, marker and line (all three differ, so that grey print works)."""

    label: str
    colour: str
    marker: str
    line: str


# In the order of tables and legends. A method that has no file follows in alphabetical order under its own name.
METHODS: dict[str, Style] = {}
for _name, _entry in catalog().items():
    METHODS[_name] = Style(_entry.label, _entry.colour, _entry.marker, _entry.line)
    if _entry.half is not None:
        METHODS[_name + HALF_RANK] = Style(_entry.label + HALF_RANK, *_entry.half, _entry.line)

# Task name -> column head, in the order of the paper's table 1. What is not listed follows under its own name.
TASKS: dict[str, str] = {task.name: task.column for task in all_tasks()}
# Kind of matrix -> the paper's name of it.
KINDS: dict[str, str] = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def ordered_labels(data: pd.DataFrame) -> list[str]:
    """The labels of a frame in the order of `METHODS`, higher ranks first."""
    names = list(METHODS)
    seen = data[["label", "method", "rank"]].drop_duplicates()
    keys = {
        label: (
            names.index(method) if method in names else len(names),
            method,
            0 if pd.isna(rank) else -int(rank),
            label,
        )
        for label, method, rank in seen.itertuples(index=False, name=None)
    }
    return sorted(keys, key=lambda label: keys[label])


def ordered_tasks(names: Iterable[str]) -> list[str]:
    """Task names in the paper's order, others after them by alphabet."""
    order = list(TASKS)
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))


def style(label: str) -> Style:
    """Style of a label; methods without one get the next of four spare colours (stable for a name)."""
    for known in METHODS.values():
        if known.label == label:
            return known
    return Style(label, spare_colour(label), "D", "-")
