"""A bounded sample of the fuzzing campaign, and that it finds what it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults import _fuzz

CASES = 40  # of each target; the campaign, `make torture`, runs thousands


@pytest.mark.parametrize("name", _fuzz.TARGETS)
def test_what_is_read_is_what_was_written_or_is_refused(name: str) -> None:
    ends = _fuzz.run(name, CASES, start=1)
    assert ends.total() >= CASES and ends["refused"], ends


def test_a_reader_that_lets_its_errors_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def loose(file: Path, task: Any) -> Any:
        return json.loads(file.read_text())

    monkeypatch.setattr(_fuzz, "read_items", loose)
    with pytest.raises(Exception):  # noqa: B017  (of any kind: that is the bug)
        _fuzz.run("task files: damaged bytes or fields of items", CASES, start=1)
