"""How things are shown: names, order, colours and markers of methods, tasks and matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

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
    line: str | tuple[int, tuple[int, ...]]  # as matplotlib takes it


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


def cell_name(method: str, rank: int | None) -> str:
    """What a method at a rank is called where there are several: DoRA r=8. A method without a file keeps its name."""
    name = METHODS[method].label if method in METHODS else method
    return name if rank is None or pd.isna(rank) else f"{name} r={rank}"


def standing(data: pd.DataFrame) -> dict[str, str]:
    """LoRA, DoRA, DoRA† -> the label that stands for each where a method has several ranks, so that none is plain.

    It is the middle rank of those that LoRA and DoRA have both (one alone: of its own), and DoRA's at half of that.
    Args: data: the columns label, method and rank, as `frame` has them.
    """
    seen = data[["label", "method", "rank"]].drop_duplicates().itertuples(index=False, name=None)
    ranks: dict[str, set[int]] = {}
    for label, method, rank in seen:
        if method in ("lora", "dora") and not pd.isna(rank) and label == cell_name(method, rank):
            ranks.setdefault(method, set()).add(int(rank))
    if not (shared := sorted(set.intersection(*ranks.values())) if ranks else []):
        return {}
    middle, there = shared[len(shared) // 2], set(data["label"])
    found = {METHODS[method].label: cell_name(method, middle) for method in ranks}
    if middle // 2 in ranks.get("dora", ()):
        found[METHODS["dora" + HALF_RANK].label] = cell_name("dora", middle // 2)
    return {name: label for name, label in found.items() if name not in there}


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


_MARKERS = ("D", "P", "X", "v", "p", "h", "<", ">", "8", "d")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 3)), (0, (3, 1, 1, 1, 1, 1)))


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label of one figure, no two the same in marker and line.

    A method has its own; a variant of it ("DoRA r=8") has its colour, and a marker and a line that nobody else has as
    long as there are such.
    """
    known = {look.label: look for look in METHODS.values()}
    found = {label: known.get(label) for label in labels}
    taken = {(look.marker, look.line) for look in found.values() if look is not None}
    for label in [label for label, look in found.items() if look is None]:
        # of the methods that a label begins with, the longest: "DoRA" before "Do"
        method = max((name for name in known if label.startswith(f"{name} ")), key=len, default=None)
        free = [pair for pair in product(_MARKERS, _LINES) if pair not in taken]
        markers, lines = ({pair[side] for pair in taken} for side in (0, 1))
        marker, line = min(free, key=lambda pair: (pair[0] in markers) + (pair[1] in lines), default=("D", "-"))
        taken.add((marker, line))
        found[label] = Style(label, known[method].colour if method else spare_colour(label), marker, line)
    return {label: look for label, look in found.items() if look is not None}


def style(label: str) -> Style:
    """Style of a label alone; for several labels of one figure, `styles` tells them apart."""
    for known in METHODS.values():
        if known.label == label:
            return known
    return styles([label])[label]
