"""TVQA and How2QA: a question about a span of a clip, five or four answers; the right one's label is generated.

By tasks whose names say so ("tvqa_cloze") its words are, of the question alone, without a list of answers (see
`tasks.cloze`): for a model that has not learnt what a list and a label are.
"""

from __future__ import annotations

from pathlib import Path

from dora_lab.tasks.annotations import Item, Row, read_lines, unique
from dora_lab.tasks.subtitles import ENDING, Subtitles, read_subtitles, span
from dora_lab.tasks.task import Task

FILES = {
    ("tvqa", "train"): "tvqa_train",
    ("tvqa", "val"): "tvqa_val",
    ("how2qa", "train"): "how2qa_train_release",
    ("how2qa", "val"): "how2qa_val_release",
}


CLOZE = "_cloze"  # of the names of tasks that are asked without labels


def _items(root: Path, task: str, part: str, clips: str, answers: int, cloze: bool) -> list[Item]:
    rows = read_lines(Path(root) / "ann" / task / f"{FILES[task, part]}.jsonl")
    said = read_subtitles(root, clips)
    return unique([_item(row, clips, said, answers, cloze) for row in rows], rows)


def _item(row: Row, clips: str, said: Subtitles, answers: int, cloze: bool) -> Item:
    labels = [f"a{number}" for number in range(answers)]
    number = row.values.get("answer_idx")
    if type(number) is not int or number not in range(answers):
        raise row.refuse("answer_idx", f"a whole number from 0 to {answers - 1}")
    texts = [row.any_text(label).strip(". ") for label in labels]
    choices = " [Choices] " + " ".join(f"{label}: {text}." for label, text in zip(labels, texts, strict=True))
    question = f"{said.of(row)} [Q] {row.text('q').strip()}"
    read = texts if cloze else labels
    answer = read[number]
    if not answer:
        raise row.refuse(labels[number], "words, as it is the right answer")
    return {
        "id": row.name("qid"),
        "pictures": ((clips, row.text("vid_name")),),
        "text": f"{question} {span(row)}{'' if cloze else choices}",
        "question": question,
        "targets": {answer: 1.0},
        "best": [answer],
        "answer": answer,
        "labels": read,
    }


def _tasks(name: str, column: str, clips: str, answers: int, cloze: bool = False) -> tuple[Task, Task]:
    def learnt(root: Path, split: str) -> list[Item]:
        return _items(root, name, "train", clips, answers, cloze) if split == "train" else []

    def asked(root: Path, split: str) -> list[Item]:
        return _items(root, name, "val", clips, answers, cloze) if split == "test" else []

    one, two = (
        Task(
            name=f"{name}{CLOZE * cloze}{ending}",
            column=column + ending.replace("_", " "),
            prompt=f"{name}: ",
            behind=True,
            chance=None if cloze else 1 / answers,
            metrics=("labelled",),
            read=read,
        )
        for ending, read in (("", learnt), (ENDING, asked))
    )
    return one, two


TASKS = (
    *_tasks("tvqa", "TVQA", "tv", 5),
    *_tasks("how2qa", "How2QA", "how2", 4),
    *_tasks("tvqa", "TVQA cloze", "tv", 5, cloze=True),
)
