"""VQA v2 in Karpathy's split: a question about a picture of COCO, ten people's short answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dora_lab.tasks.annotations import Item, Row, best, find, read_rows, unique
from dora_lab.tasks.items import ItemError
from dora_lab.tasks.task import Task

FILES = {
    "published_train": "karpathy_train",
    "train": "karpathy_train",
    "validation": "karpathy_val",
    "test": "karpathy_test",
}
ANSWERS = tuple(f"vqa/v2_mscoco_{part}2014_annotations.json" for part in ("val", "train"))  # val has all that is scored


def read(root: Path, split: str) -> list[Item]:
    """The questions of a split; those of validation and test with what the ten people said."""
    rows = read_rows(find(root, f"vqa/{FILES[split]}.json"))
    items = unique([_item(row) for row in rows], rows)
    if split in ("validation", "test"):
        said = _said(root, {item["id"]: row for item, row in zip(items, rows, strict=True)})
        for item in items:
            item["answers"] = said[item["id"]]
            item["best"] = item["best"] or [Counter(filter(None, item["answers"])).most_common(1)[0][0]]
    return items


def _item(row: Row) -> Item:
    targets = row.scores("label")
    return {
        "id": row.name("question_id"),
        "pictures": (("COCO", row.text("img_id")),),
        "text": row.text("sent", "question"),
        "targets": targets,
        "best": best(targets),
    }


def _said(root: Path, rows: dict[str, Row]) -> dict[str, list[str]]:
    """By question, the answers of the ten people."""
    found: dict[str, list[str]] = {}
    for name in ANSWERS:
        if missing := rows.keys() - found.keys():
            found |= dict(_of_file(find(root, name), missing))
    if missing := [row for question, row in rows.items() if question not in found]:
        raise ItemError(f"{missing[0].where}: its question is in none of {', '.join(ANSWERS)}; fetch them again")
    return found


def _of_file(file: Path, wanted: Iterable[str]) -> Iterable[tuple[str, list[str]]]:
    for row in read_rows(file, "annotations"):
        if (question := row.name("question_id")) in wanted:
            yield question, [_answer(row) for row in row.rows("answers")]


def _answer(row: Row) -> str:
    if not isinstance(answer := row.values.get("answer"), str):  # an empty one is an answer, too
        raise row.refuse("answer", "a text")
    return answer


TASK = Task(name="vqa", column="VQAv2", prompt="vqa: ", metrics=("vqa_released", "vqa_both"), read=read)
