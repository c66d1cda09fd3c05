"""Captions of COCO in Karpathy's split: one training item a caption, one scored item a picture."""

from __future__ import annotations

from pathlib import Path

from dora_lab.tasks.annotations import Item, Row, find, read_rows, unique
from dora_lab.tasks.items import ItemError
from dora_lab.tasks.task import Task

FILE = "COCO/dataset_coco.json"
PARTS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def read(root: Path, split: str) -> list[Item]:
    """The captions to be learnt, or the pictures to be described with all their captions as references."""
    file, split = find(root, FILE), split.removeprefix("published_")
    rows = [row for row in read_rows(file, "images") if _part(row) == split]
    if not rows:
        raise ItemError(f"{file}: none of its images is of {split}; fetch it again")
    pairs = [(item, row) for row in rows for item in (_learnt(row) if split == "train" else [_scored(row)])]
    return unique([item for item, _ in pairs], [row for _, row in pairs])


def _part(row: Row) -> str:
    part = row.values.get("split")
    if not isinstance(part, str) or part not in PARTS:
        raise row.refuse("split", f"one of {', '.join(PARTS)}")
    return PARTS[part]


def _learnt(row: Row) -> list[Item]:
    return [
        {"id": f"{_picture(row)}#{number}", "pictures": (("COCO", _picture(row)),), "text": ""}
        | {"targets": {caption: 1.0}, "best": [caption]}
        for number, caption in enumerate(_captions(row))
    ]


def _scored(row: Row) -> Item:
    captions = _captions(row)
    return {
        "id": _picture(row),
        "pictures": (("COCO", _picture(row)),),
        "text": "",
        "targets": {},
        "best": captions,
        "references": captions,
    }


def _picture(row: Row) -> str:
    return row.text("filename").split(".")[0]


def _captions(row: Row) -> list[str]:
    return [sentence.text("raw").strip() for sentence in row.rows("sentences")]


TASK = Task(name="coco_caption", column="COCO-Cap", prompt="caption: ", metrics=("cider_d",), read=read)
