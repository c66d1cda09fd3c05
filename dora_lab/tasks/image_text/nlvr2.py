"""NLVR2: whether a statement is true of two pictures."""

from __future__ import annotations

from pathlib import Path

from dora_lab.tasks.annotations import Item, Row, find, read_rows, unique
from dora_lab.tasks.task import Task

FILES = {"published_train": "train", "train": "train", "validation": "valid", "test": "test"}
ANSWERS = ("false", "true")  # by the file's label


def read(root: Path, split: str) -> list[Item]:
    """The statements of a split, each with its pair of pictures."""
    rows = read_rows(find(root, f"nlvr/{FILES[split]}.json"))
    return unique([_item(row) for row in rows], rows)


def _item(row: Row) -> Item:
    label = row.values.get("label")
    if isinstance(label, bool) or label not in (0, 1):
        raise row.refuse("label", "0 or 1")
    first, *others = row.text("identifier").split("-")
    if len(others) != 3:
        raise row.refuse("identifier", "four parts with - between them")
    answer = ANSWERS[label]
    return {
        "id": row.text("uid"),
        "pictures": (("nlvr", row.text("img0")), ("nlvr", row.text("img1"))),
        "text": row.text("sent"),
        "targets": {answer: 1.0},
        "best": [answer],
        "answer": answer,
        # one statement has several pairs of pictures, which the third part numbers: without it (consistency)
        "statement": "-".join((first, others[0], others[2])),
    }


TASK = Task(name="nlvr2", column="NLVR2", prompt="nlvr: ", chance=1 / 2, metrics=("nlvr2",), read=read)
