"""Items and outputs looked at before they are scored: an error names the file, the item and the field."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dora_lab.metrics.vqa import ANNOTATORS

Item = Mapping[str, Any]
ROTATION = 1_000_000  # MMBench: the k-th rotation of the options of question i is row i + k * 10^6


class ScoreError(ValueError):
    """Outputs or items that cannot be scored; says where, which item and field, and what to do."""


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _options(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 1 and all(_text(key) and _text(text) for key, text in value.items())


# of a field: whether a value will do, and what is expected
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "answer": (_text, "a text"),
    "answers": (lambda value: _texts(value) and len(value) == ANNOTATORS, f"a list of {ANNOTATORS} annotators' texts"),
    "references": (_texts, "a list of one text or more"),
    "labels": (lambda value: _texts(value) and len(value) > 1, "a list of two texts or more"),
    "statement": (_text, "a text"),
    "category": (_text, "a text"),
    "letters": (lambda value: _text(value) and len(value) > 1 and "ABCDE".startswith(value), "AB, ABC, ABCD or ABCDE"),
    "image": (lambda value: isinstance(value, bool), "true or false"),
    "options": (_options, "two or more texts by letter"),
    "index": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a whole number"),
}
# of a metric: the answers that an item of it may have
_ANSWERS: dict[str, Callable[[Item], Sequence[str]]] = {
    "nlvr2": lambda item: ("true", "false"),
    "labelled": lambda item: item["labels"],
    "pope_released": lambda item: ("yes", "no"),
    "pope_strict": lambda item: ("yes", "no"),
    "science_qa": lambda item: list(item["letters"]),
    "mmbench": lambda item: list(item["options"]),
}


def check(metric: str, fields: Sequence[str], items: Sequence[Item], outputs: Mapping[str, Any], where: str) -> None:
    """Raise ScoreError if these items cannot be scored by `metric`, which needs `fields`; see `score`."""
    _check_ids(items, outputs, where)
    for item in items:
        at = f"{where}, item {item['id']}"
        for field in fields:
            fits, expected = _FIELDS[field]
            if not fits(item.get(field)):
                raise ScoreError(f"{at}, field '{field}': expected {expected}, got {item.get(field)!r:.80}; correct it")
        if metric in _ANSWERS and item["answer"] not in (allowed := _ANSWERS[metric](item)):
            raise ScoreError(
                f"{at}, field 'answer': {item['answer']!r:.80} is none of {', '.join(allowed)}; correct it"
            )
        _check_output(metric, outputs[item["id"]], at)
    if metric == "mmbench":
        _check_rotations(items, where)


def _check_ids(items: Sequence[Item], outputs: Mapping[str, Any], where: str) -> None:
    if not items:
        raise ScoreError(f"{where}: no items to score; fetch it again")
    ids: dict[str, int] = {}
    for number, item in enumerate(items):
        name = item.get("id")
        if not isinstance(name, str) or not name:
            raise ScoreError(f"{where}, item {number}, field 'id': expected a text, got {name!r:.80}; correct it")
        if name in ids:
            raise ScoreError(
                f"{where}, item {number}, field 'id': '{name}' is item {ids[name]}, too; remove one of them"
            )
        ids[name] = number
        if name not in outputs:
            raise ScoreError(f"{where}, item {name}: has no output; answer every item, or leave it out of the file")
    if unknown := [name for name in outputs if name not in ids]:
        raise ScoreError(
            f"{where}: has no item {unknown[0]!r:.80}, but there is an output for it; give its own outputs"
        )


def _check_output(metric: str, output: Any, at: str) -> None:
    if metric != "nlvr2":
        if not isinstance(output, str):
            raise ScoreError(f"{at}: its output is {output!r:.80}, expected a text (an empty one is an answer, too)")
        return
    logits = output if isinstance(output, Mapping) else {}
    numbers = [logits.get(name) for name in ("true", "false")]
    if not all(isinstance(value, float) and math.isfinite(value) for value in numbers):
        raise ScoreError(f"{at}: its output is {output!r:.80}, expected finite logits of 'true' and 'false'")


def _check_rotations(items: Sequence[Item], where: str) -> None:
    """Each question is there with as many rotations as it has options: fewer make it easier in silence."""
    rows = Counter(item["index"] for item in items)
    for item in items:
        first, k = item["index"] % ROTATION, len(item["options"])
        expected = {first + turn * ROTATION for turn in range(k)}
        if item["index"] not in expected or any(rows[row] != 1 for row in expected):
            raise ScoreError(
                f"{where}, item {item['id']}, field 'index': question {first} has {k} options, so it needs the rows "
                f"{first} + 0 to {k - 1} times {ROTATION}, each once; fetch the file again"
            )
