"""TVC and YC2C: what happens in a clip (TVC: in a span of it); one training item a caption, one scored item a clip.

The released code scores a caption a time, each against itself alone; VALUE's evaluator, and this one, a clip against
all of its captions.
"""

from __future__ import annotations

from pathlib import Path

from dora_lab.tasks.annotations import Item, Row, read_lines, unique
from dora_lab.tasks.subtitles import ENDING, read_subtitles, span
from dora_lab.tasks.task import Task


def _rows(root: Path, task: str, part: str) -> list[Row]:
    return read_lines(Path(root) / "ann" / task / f"{task}_{part}_release.jsonl")


def _texts(root: Path, rows: list[Row], clips: str, spans: bool) -> list[str]:
    said = read_subtitles(root, clips)
    return [f"{said.of(row)} {span(row)}" if spans else said.of(row) for row in rows]


def _learnt(row: Row, clips: str, text: str) -> list[Item]:
    return [
        {"id": f"{row.name('clip_id')}#{number}", "pictures": ((clips, row.text("vid_name")),), "text": text}
        | {"targets": {caption: 1.0}, "best": [caption]}
        for number, caption in enumerate(_captions(row))
    ]


def _scored(row: Row, clips: str, text: str) -> Item:
    captions = [caption.strip() for caption in _captions(row)]
    return {
        "id": row.name("clip_id"),
        "pictures": ((clips, row.text("vid_name")),),
        "text": text,
        "targets": {},
        "best": captions,
        "references": captions,
    }


def _captions(row: Row) -> list[str]:
    return [told.text("desc") for told in row.rows("descs")]


def _tasks(name: str, column: str, clips: str, spans: bool) -> tuple[Task, Task]:
    def learnt(root: Path, split: str) -> list[Item]:
        if split != "train":
            return []
        rows = _rows(root, name, "train")
        texts = _texts(root, rows, clips, spans)
        pairs = [(item, row) for row, text in zip(rows, texts, strict=True) for item in _learnt(row, clips, text)]
        return unique([item for item, _ in pairs], [row for _, row in pairs])

    def asked(root: Path, split: str) -> list[Item]:
        if split != "test":
            return []
        rows = _rows(root, name, "val")
        texts = _texts(root, rows, clips, spans)
        return unique([_scored(row, clips, text) for row, text in zip(rows, texts, strict=True)], rows)

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
