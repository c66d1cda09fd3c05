"""Items in the LLM-Adapters format: a JSON list of objects with the fields `FIELDS`, all text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_lab.io.files import parse_json
from dora_lab.tasks.task import FIELDS, Task

HALF = re.compile("[\ud800-\udfff]")


class ItemError(ValueError):
    """Data that cannot be used; says which file, item and field, and what to do."""


class UnreadableError(ItemError, OSError):
    """A file that was there when a run began and cannot be read now: a run cannot help it, see `runs.errors`."""


def read_items(file: Path, task: Task | None) -> list[dict[str, Any]]:
    """The checked items of one JSON file; `task` None (a mixed training file) leaves the labels unchecked.

    Raises ItemError for a missing, empty or truncated file, a missing field or an answer that is not a label.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ItemError(f"{file} does not exist; fetch it or leave its task out") from None
    except OSError as error:
        raise ItemError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ItemError(f"{file}: not UTF-8 at byte {error.start}; convert or fetch it again") from None
    if not text.strip():
        raise ItemError(f"{file} is empty; fetch it again")
    try:
        items = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            what = "another JSON value follows the first (a line each, perhaps)"
            raise ItemError(f"{file}, line {error.lineno}: {what}; make one list of all items") from None
        where = f"line {error.lineno}, column {error.colno}, after {text.count(chr(34) + 'answer' + chr(34))} answers"
        raise ItemError(f"{file}: broken or truncated JSON at {where} ({error.msg}); fetch it again") from None
    except ValueError as error:
        raise ItemError(f"{file}: {error}; correct it or fetch it again") from None
    check_items(items, task, str(file))
    return items


def check_items(items: Any, task: Task | None, where: str) -> None:
    """Raise ItemError naming `where`, the item (counted from 0) and the field, if any item cannot be used."""
    if not isinstance(items, list) or not items:
        kind = "an empty list" if items == [] else f"a JSON {type(items).__name__}"
        raise ItemError(f"{where}: {kind}, expected a list of items with the fields {', '.join(FIELDS)}")
    for number, item in enumerate(items):
        _check_item(item, task, lambda field, number=number: f"{where}, item {number}, field '{field}'")


def _check_item(item: Any, task: Task | None, at: Callable[[str], str]) -> None:
    if not isinstance(item, dict):
        raise ItemError(f"{at('*')}: expected an object, got {type(item).__name__}")
    for field in FIELDS:
        if field not in item:
            raise ItemError(f"{at(field)}: missing; an item has {', '.join(FIELDS)}")
        if not isinstance(item[field], str):
            raise ItemError(f"{at(field)}: expected text, got {item[field]!r}")
        if half := HALF.search(item[field]):  # JSON can say it, UTF-8 and so a tokenizer cannot
            what = f"half a character ({half.group()!r}) at place {half.start()}"
            raise ItemError(f"{at(field)}: {what}; correct it or fetch the file again")
        needed = field != "input" and (task is not None or field != "answer")  # training reads the output alone
        if needed and not item[field].strip():
            raise ItemError(f"{at(field)}: empty; fill it or remove the item")
    if item["input"]:
        raise ItemError(f"{at('input')}: must be empty, both templates have no place for it; got {item['input']!r:.80}")
    if task is None:
        return
    if item["answer"] not in task.labels:
        raise ItemError(f"{at('answer')}: '{item['answer']}' is not a label of {task.name}: {', '.join(task.labels)}")
    try:
        options = task.options(item)
    except ValueError as error:
        raise ItemError(f"{at('instruction')}: {error}; correct it or leave the item out") from None
    if item["answer"] not in options:
        offered = "/".join(options)
        raise ItemError(f"{at('answer')}: '{item['answer']}' is not among the answers that the item offers, {offered}")
    if task.parse(item["output"]) != item["answer"]:
        raise ItemError(f"{at('output')}: '{item['output']:.80}' does not say the answer '{item['answer']}'")
