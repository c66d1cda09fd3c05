"""The image-text tasks asked about things of a colour and shape that no training picture shows: the embedded world's.

They have test items alone, which lie in a folder of their own below the others (see `tasks.mini_pictures`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dora_lab.tasks.annotations import Item
from dora_lab.tasks.task import Task

ENDING = "_novel"  # of the names of these tasks


def novel(task: Task) -> Task:
    """The task on the items of split `novel`."""
    read = task.read
    assert read is not None

    def tested(root: Path, split: str) -> list[Item]:
        return read(root / "novel", split) if split == "test" else []

    return replace(task, name=task.name + ENDING, column=f"{task.column}, novel", read=tested)
