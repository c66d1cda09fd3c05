"""Annotations of pictures and clips as their data has them: JSON, read row by row, each row knowing where it stands.

What an item about pictures is, whatever its task: ``id``; ``pictures``, one or two pairs (set, id) of `tasks.features`
(one of `tasks.frames`: a clip is read as a picture whose regions are its frames); ``text``, what is asked;
``targets``, the answers that may be trained on with their scores in [0, 1] (none: nothing to learn); ``best``, the
answers whose likelihood is looked at; ``question``, its text up to where what is asked ends, if that is not the whole
text; and what its task's metrics read (see `metrics.score`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_lab.io.files import parse_json
from dora_lab.tasks.items import HALF, ItemError

Item = dict[str, Any]


def find(root: Path, name: str) -> Path:
    """The annotation file `name` of a folder in one of the two layouts (see `features`): in it, or in annotations/."""
    places = [Path(root) / name, Path(root) / "annotations" / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ItemError(f"{places[0]} does not exist (nor {places[1]}); fetch it, or leave its task out of data.tasks")
    return found


@dataclass(frozen=True)
class Row:
    """One object of a file."""

    values: dict[str, Any]
    where: str  # of the file and in it, for errors

    def refuse(self, field: str, expected: str) -> ItemError:
        """The error that says what is wrong with a field."""
        found = f"got {self.values[field]!r:.80}" if field in self.values else "it is missing"
        return ItemError(f"{self.where}, field '{field}': expected {expected}, {found}; correct it or fetch it again")

    def text(self, *fields: str) -> str:
        """The text, not empty, of the first of these fields that is there."""
        field = next((name for name in fields if name in self.values), fields[0])
        if not (value := self.any_text(field)).strip():
            raise self.refuse(field, "a text")
        return value

    def any_text(self, field: str) -> str:
        """The text of this field, which may be empty."""
        value = self.values.get(field)
        if not isinstance(value, str) or HALF.search(value):
            raise self.refuse(field, "a text")
        return value

    def name(self, field: str) -> str:
        """What identifies something: a text, or a whole number as text."""
        value = self.values.get(field)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text(field)

    def scores(self, field: str) -> dict[str, float]:
        """Answers with their scores, in (0, 1]; those of score 0 are left out."""
        value = self.values.get(field)
        if not isinstance(value, dict):
            raise self.refuse(field, "answers with their scores")
        for answer, score in value.items():
            number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
            if not answer.strip() or HALF.search(answer) or not number or not 0 <= score <= 1:
                raise self.refuse(field, "answers with scores in [0, 1]")
        return {answer: float(score) for answer, score in value.items() if score}

    def rows(self, field: str, empty: bool = False) -> list[Row]:
        """The objects of a list; empty: there may be none."""
        value = self.values.get(field)
        if not isinstance(value, list) or not (value or empty) or not all(isinstance(inner, dict) for inner in value):
            raise self.refuse(field, "a list of objects")
        return [Row(inner, f"{self.where}, {field} {number}") for number, inner in enumerate(value)]


def read_rows(file: Path, field: str | None = None) -> list[Row]:
    """The objects of a file's list, or of the list that its `field` is.

    Raises ItemError for a file that is no JSON, or no list of objects.
    """
    try:
        value = parse_json(file.read_bytes())
    except OSError as error:
        raise ItemError(f"{file} cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ItemError(f"{file}: broken or truncated JSON at {where} ({error.msg}); fetch it again") from None
    except ValueError as error:  # another encoding, a key twice, NaN
        raise ItemError(f"{file}: {error}; correct it or fetch it again") from None
    if field is not None:
        value = value.get(field) if isinstance(value, dict) else None
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        what = "a list" if field is None else f"an object whose '{field}' is a list"
        raise ItemError(f"{file}: expected {what} of objects, not empty; fetch it again")
    return [Row(row, f"{file}, item {number}") for number, row in enumerate(value)]


def read_lines(file: Path) -> list[Row]:
    """The objects of a file that has one a line.

    Raises ItemError for a file that is not there, is empty, or has a line that is no JSON object.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise ItemError(f"{file} does not exist; fetch it, or leave its task out of data.tasks") from None
    except OSError as error:
        raise ItemError(f"{file} cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, start=1):
        where = f"{file}, line {number}"
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            raise ItemError(f"{where}: broken or truncated JSON ({error.msg}); fetch it again") from None
        except ValueError as error:
            raise ItemError(f"{where}: {error}; correct it or fetch it again") from None
        if not isinstance(value, dict):
            raise ItemError(f"{where}: expected an object, got a JSON {type(value).__name__}; fetch it again")
        rows.append(Row(value, where))
    if not rows:
        raise ItemError(f"{file} is empty; fetch it again")
    return rows


def unique(items: list[Item], rows: Sequence[Row]) -> list[Item]:
    """The items of the rows; raises ItemError for an id that two of them have."""
    first: dict[str, str] = {}
    for item, row in zip(items, rows, strict=True):
        if item["id"] in first:
            raise ItemError(f"{row.where}: its id '{item['id']}' is that of {first[item['id']]}; remove one of them")
        first[item["id"]] = row.where
    return items


def best(targets: dict[str, float]) -> list[str]:
    """The answer of the highest score, the first of several; none where there is no answer."""
    return [max(targets, key=targets.__getitem__)] if targets else []
