"""Template "cloze": the question alone is asked, its answer is the text of an option; no labels, no list of options.

A small model cannot yet read a label out of a list, but it can tell a likely text from an unlikely one. The field calls
this the cloze formulation, beside the multiple-choice one that LLM-Adapters' items are written in.
"""

from __future__ import annotations

from typing import Any

from dora_lab.tasks.items import ItemError
from dora_lab.tasks.task import ANSWER_FORMAT, Task

Item = dict[str, Any]


def as_cloze(task: Task, items: list[Item]) -> list[Item]:
    """The items with the question as `instruction`, the right text as `output`, and the `texts` of all `options`.

    An instruction of LLM-Adapters is "Please ...: question", its options each behind its label and a colon
    ("Answer1: "), and the labels. Where the labels are the answers themselves (true/false), there is no list.
    Items that offer one text twice are left out: no text tells their options apart (8 of 30,000 released ones).
    Raises ItemError, naming the item, where no text is found behind a label.
    """
    found = [_as_cloze(task, item, f"{task.name}, item {number}") for number, item in enumerate(items)]
    return [item for item in found if len(set(item["texts"])) == len(item["texts"])]


def _as_cloze(task: Task, item: Item, where: str) -> Item:
    labels = task.options(item)
    _, colon, asked = item["instruction"].rpartition(ANSWER_FORMAT)[0].partition(": ")
    texts = list(labels)
    if colon and labels[0][-1].isdigit():
        # from the last label back: a question may itself say "Answer1:", an option seldom does
        for place, label in reversed(list(enumerate(labels))):
            asked, found, text = asked.rpartition(f"{label.capitalize()}:")
            texts[place] = text.strip()
            if not found or not texts[place]:
                raise ItemError(f"{where}: no text behind '{label.capitalize()}:' in its instruction; leave it out")
    if not asked.strip():
        raise ItemError(f"{where}: no question behind ': ' in its instruction; leave it out")
    right = texts[labels.index(item["answer"])]
    return item | {"instruction": asked.strip(), "output": f" {right}", "options": list(labels), "texts": texts}
