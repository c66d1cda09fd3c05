"""The items of the worlds, one source each: always the same, all different, their answers balanced."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from random import Random

from dora_lab.mini import families, families2
from dora_lab.mini.families import Item

WORLDS = {"mini": families, "mini2": families2}  # data source: how it asks


@cache
def _items(task: str, split: str, source: str) -> tuple[Item, ...]:
    asks, wanted = WORLDS[source].FAMILIES, WORLDS[source].COUNTS
    if task not in asks:
        raise ValueError(f"unknown {source} task {task!r}; choose one of {', '.join(asks)}")
    if split not in wanted:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(wanted)}")
    out: dict[str, Item] = {}
    given: Counter[str] = Counter()  # answers are balanced, so that the majority label is worth no more than chance
    drawn = f"{task}/{split}" if source == "mini" else f"{source}/{task}/{split}"
    for i in range(50 * wanted[split]):
        item = asks[task](split, Random(f"{drawn}/{i}"))
        labels = item["instruction"].rsplit(": ", 1)[1].count("/") + 1
        if item["instruction"] in out or given[item["answer"]] >= math.ceil(wanted[split] / labels):
            continue
        out[item["instruction"]] = item
        given[item["answer"]] += 1
        if len(out) == wanted[split]:
            return tuple(out.values())
    raise AssertionError(f"the world is too small for {wanted[split]} {split} items of {task}: {len(out)} found")


def items(task: str, split: str, source: str = "mini") -> list[Item]:
    """The items of one family: `{"instruction", "input", "output", "answer"}`, of `mini2` also `fact` (what it asks).

    Args:
        task: a name in the LLM-Adapters layout, e.g. "boolq", "ARC-Challenge".
        split: "train", "validation" or "test"; how many items each has is the source's `COUNTS`.
        source: a key of `WORLDS`.
    Raises:
        ValueError: for an unknown task or split.
    """
    return [dict(item) for item in _items(task, split, source)]
