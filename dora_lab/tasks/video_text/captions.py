"""TVC and YC2C: what happens in a clip (TVC: in a span of it); one training item a caption, one scored item a clip.

The released code validates on an item a caption, each against itself alone; VALUE's evaluator, and this one, scores a
clip against all of its captions.
"""

from __future__ import annotations

from pathlib import Path

from dora_lab.tasks.annotations import Item, Row, read_lines, unique
from dora_lab.tasks.subtitles import ENDING, Subtitles, read_subtitles, span
from dora_lab.tasks.task import Task


def _shown(root: Path, task: str, part: str, clips: str, spans: bool) -> list[tuple[Row, Item]]:
    """The rows of a file with what is read of each; without a span nothing of what is said is asked."""
    said = read_subtitles(root, clips)
    return [
        (row, {"id": row.name("clip_id"), "pictures": ((clips, row.text("vid_name")),), **_text(said, row, spans)})
        for row in read_lines(Path(root) / "ann" / task / f"{task}_{part}_release.jsonl")
    ]


def _text(said: Subtitles, row: Row, spans: bool) -> Item:
    return {"text": f"{said.of(row)} {span(row)}"} if spans else {"text": said.of(row), "question": ""}


def _learnt(row: Row, shown: Item) -> list[Item]:
    return [
        shown | {"id": f"{shown['id']}#{number}", "targets": {caption: 1.0}, "best": [caption]}
        for number, caption in enumerate(_captions(row))
    ]


def _scored(row: Row, shown: Item) -> Item:
    captions = [caption.strip() for caption in _captions(row)]
    return shown | {"targets": {}, "best": captions, "references": captions}


def _captions(row: Row) -> list[str]:
    return [told.text("desc") for told in row.rows("descs")]


def _tasks(name: str, column: str, clips: str, spans: bool) -> tuple[Task, Task]:
    def learnt(root: Path, split: str) -> list[Item]:
        rows = _shown(root, name, "train", clips, spans) if split == "train" else []
        pairs = [(item, row) for row, shown in rows for item in _learnt(row, shown)]
        return unique([item for item, _ in pairs], [row for _, row in pairs])

    def asked(root: Path, split: str) -> list[Item]:
        rows = _shown(root, name, "val", clips, spans) if split == "test" else []
        return unique([_scored(row, shown) for row, shown in rows], [row for row, _ in rows])

    one, two = (
        Task(
            name=name + ending,
            column=column + ending.replace("_", " "),
            prompt=f"{name}: ",
            behind=True,
            metrics=("cider_d_ascii", "cider_d"),
            read=read,
        )
        for ending, read in (("", learnt), (ENDING, asked))
    )
    return one, two


TASKS = (*_tasks("tvc", "TVC", "tv", spans=True), *_tasks("yc2c", "YC2C", "yc2", spans=False))
