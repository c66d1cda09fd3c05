"""Rows of the stream eval, one task by one protocol at a time: those that are there are kept, the others made."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from dora_lab.io.atomic import write_text
from dora_lab.runs.directory import RunDir
from dora_lab.runs.streams import read_stream

Progress = Callable[[int, int], None]  # batches done, batches in all (estimated)
Tick = Callable[[], None]  # called after every batch
Sample = dict[str, Any]


class Stopped(KeyboardInterrupt):
    """The evaluation was asked to stop; rows of whole tasks are kept, and the next call goes on after them."""


class Asked(Protocol):
    """One row of the record to be: a task by a protocol."""

    @property
    def identity(self) -> dict[str, Any]:
        """Fields of the row that say what was asked: protocol, task, n, prompt_sha256."""
        ...

    def batches(self, size: int) -> int:
        """Forward passes in all, at so many items each (estimated)."""
        ...


Part = TypeVar("Part", bound=Asked)


def through(
    parts: Sequence[Part],
    score: Callable[[Part, Tick], tuple[dict[str, Any], list[Sample]]],
    run: RunDir,
    size: int,
    stop: threading.Event | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """The rows of all parts, each appended to the stream eval of `run` with its samples as soon as it is whole.

    score: a part's row, and a sample of each item for re-grading; size: items of a batch. Rows that are there already,
    of the same questions, are kept. Raises Stopped if `stop` is set.
    """
    rows = _kept(run, parts)
    batches = [part.batches(size) for part in parts]
    for place, part in list(enumerate(parts))[len(rows) :]:
        begun = itertools.count(1 + sum(batches[:place]))

        def tick(begun: itertools.count[int] = begun, most: int = sum(batches[: place + 1])) -> None:
            if stop is not None and stop.is_set():
                raise Stopped("stopped while evaluating")
            if progress:
                progress(min(next(begun), most), sum(batches))

        row, samples = score(part, tick)
        _write_samples(run, row, samples)
        run.append("eval", row)
        rows.append(row)
    return rows


def _kept(run: RunDir, parts: Sequence[Asked]) -> list[dict[str, Any]]:
    """Rows of an evaluation that was cut short: those of the first parts; none if any is of other questions."""
    rows = read_stream(run.path, "eval")
    fits = len(rows) <= len(parts) and all(
        row.get(name) == value for row, part in zip(rows, parts, strict=False) for name, value in part.identity.items()
    )
    if not fits:
        run.cut("eval")
    return rows if fits else []


def _write_samples(run: RunDir, row: dict[str, Any], samples: list[Sample]) -> None:
    run.samples.mkdir(parents=True, exist_ok=True)
    file = run.samples / f"{row['task']}.{row['protocol']}.jsonl"
    write_text(file, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
