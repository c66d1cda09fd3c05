"""Text for people: of a file, made fit to be shown; of an error, with the near names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

Value = TypeVar("Value")

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_FORMULA = re.compile(r"[\t\r\n]|\s*[-=+@\uff0d\uff1d\uff0b\uff20]")  # of full width, too: some spreadsheets take them
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object) -> str:
    """Text for a terminal: control characters and changes of direction as "\\x1b"; ends of line and tabs stay.

    Whoever names a tensor, a model or a lock file could else move the cursor, set the window's title or hide words.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def no_formula(value: Value) -> Value | str:
    """A text that a spreadsheet would run as a formula, with an apostrophe before it; any other value as it is.

    One number is no formula; several, or a number with anything behind it, may be one ("-1-2").
    """
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Words for an error message: the nearest of `choices` if one is near, and all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + "choices: " + (", ".join(known) or "none")
