"""GQA: a question about a picture, one answer. Pictures of Visual Genome, those of testdev in a set of their own."""

from __future__ import annotations

from pathlib import Path

from dora_lab.tasks.annotations import Item, Row, best, find, read_rows, unique
from dora_lab.tasks.task import Task

# as released, "valid" is trained on and the best checkpoint is looked for on testdev, which is the test, too
FILES = {"published_train": ("train", "valid"), "train": ("train",), "validation": ("valid",), "test": ("testdev",)}


def read(root: Path, split: str) -> list[Item]:
    """The questions of a split."""
    rows = [row for name in FILES[split] for row in read_rows(find(root, f"GQA/{name}.json"))]
    return unique([_item(row, "GQA" if split == "test" else "VG") for row in rows], rows)


def _item(row: Row, pictures: str) -> Item:
    targets = row.scores("label")
    if len(targets) != 1:
        raise row.refuse("label", "one answer with a score above 0")
    (answer,) = targets
    return {
        "id": row.name("question_id"),
        "pictures": ((pictures, row.name("img_id")),),
        "text": row.text("sent"),
        "targets": targets,
        "best": best(targets),
        "answer": answer,
    }


# VL-Adapter's script says "gpa"
TASK = Task(name="gqa", column="GQA", prompt="gqa: ", released_prompt="gpa: ", metrics=("exact", "gqa"), read=read)
