"""What a task is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("instruction", "input", "output", "answer")  # of an item in the LLM-Adapters format, all text
RESPONSE = "### Response:"  # heading of the answer in both templates
# the instructions of LLM-Adapters end in the labels that are allowed, e.g. "Answer format: answer1/answer2/answer3"
ANSWER_FORMAT = "Answer format:"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its names, its labels and how an answer is read from generated text (protocol of LLM-Adapters)."""

    name: str  # folder name in the LLM-Adapters layout; the name in specs and records
    column: str  # heading in tables, the paper's where it has one
    position: int | None = None  # column number in the paper's table 1, from 0; None: not in that table
    labels: tuple[str, ...] = ()  # every answer that an item may have; (): any text
    chance: float | None = None  # accuracy of guessing on an ordinary item, in (0, 1); None: not known
    builtin: str | None = None  # name of lm-eval's own task on the same data set
    # of tasks about pictures (see `annotations`), which are not in the LLM-Adapters layout
    metrics: tuple[str, ...] = ()  # rules of `dora_lab.metrics`; tables print the first. None: a server scores
    prompt: str = ""  # what says the task, before the text
    released_prompt: str | None = None  # that of the published code, where it is another
    behind: bool = False  # the published code puts it behind the text
    # (folder, split) to items; splits are train, validation, test, and published_train where nothing is held out
    read: Callable[[Path, str], list[dict[str, Any]]] | None = None
    headline: str | None = None  # of what the first of `metrics` says, the number that tables print; None: its first
    released_items: int | None = None  # test items of the released files, where they are known here

    @property
    def folder(self) -> str:
        """Folder of the task's files in the LLM-Adapters layout."""
        return self.name

    @property
    def pattern(self) -> str:
        """Regular expression whose first match, case-sensitive, is the parsed answer."""
        return "|".join(self.labels)

    def parse(self, output: str) -> str | None:
        """The label that a generated text answers with: the first match of `pattern`, or None if there is none.

        As released, only what follows the last "### Response:" counts: a model may go on and write a prompt of its own.
        """
        found = re.search(self.pattern, answer_part(output))
        return found.group() if found else None

    def first_label(self, text: str) -> str | None:
        """The label that a text which is still being written says first; None before it has one.

        `parse` finds the same unless a heading "### Response:" follows it: as released, what stands behind the last one
        counts.
        """
        found = re.search(self.pattern, text) if self.labels else None
        return found and found.group()

    def word(self, template: str) -> str:
        """What says the task before an item's text (tasks about pictures): nothing with template "bare"."""
        if template == "bare":
            return ""
        return self.prompt if self.released_prompt is None or template != "published" else self.released_prompt

    def asked(self, template: str, text: str) -> str:
        """What is read of an item (tasks about pictures): its text, and before it, or as published behind it, `word`.

        Behind it there is a blank between them, with template "bare" a blank alone.
        """
        word = self.word(template)
        return f"{text} {word}" if self.behind and template != "clean" else word + text

    def options(self, item: dict[str, Any]) -> tuple[str, ...]:
        """The labels offered by this item (a few ARC items have 3 or 5), from the end of its instruction.

        Blanks around them and a full stop after them do not matter. An instruction without the words "Answer format:"
        offers what an ordinary item does; raises ValueError where two or more different labels do not follow them.
        """
        _, found, end = item["instruction"].rpartition(ANSWER_FORMAT)
        if not found:
            return self._usual
        offered = tuple(label.strip() for label in end.strip().removesuffix(".").split("/"))
        if len(offered) < 2 or len(set(offered)) < len(offered) or not set(offered) <= set(self.labels):
            raise ValueError(
                f"'{ANSWER_FORMAT}' is followed by {end.strip()!r:.80}, expected labels of {self.name} "
                f"({', '.join(self.labels)}) with / between them"
            )
        return offered

    @property
    def _usual(self) -> tuple[str, ...]:
        """The labels of an ordinary item: the first 1 / chance of them."""
        return self.labels if self.chance is None else self.labels[: round(1 / self.chance)]


def answer_part(output: str) -> str:
    """The part of a generated text that is looked at for an answer."""
    return output.rpartition(RESPONSE)[2]
