"""The one door to finished runs: what lies under a results folder, which of it is a run, and why the rest is none.

Tables, figures, verdicts and comparisons take their runs from here and nowhere else, so that what one of them leaves
out, all leave out.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dora_lab.runs import kept, packs
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import misplaced, read_record
from dora_lab.runs.streams import STREAMS, read_rows

Run = tuple[Path, dict[str, Any]]  # run directory, record


class LeftOut(NamedTuple):
    """A folder that is no run, or one that cannot be trusted, and why."""

    path: Path
    why: str


class Survey(NamedTuple):
    """The runs under a results folder, sorted by path, and the folders that were left out."""

    runs: list[Run]
    left_out: list[LeftOut]


def survey(root: Path, experiment: str | None = None, tier: str | None = None) -> Survey:
    """Every run under the results folder `root`, however it ended; of one experiment or tier if named.

    A folder is left out, with the reason, if `verified` refuses it. Raises nothing for what lies there.
    """
    found = Survey([], [])
    for folder in sorted((Path(root) / "runs").glob(experiment or "*")):
        wrong = dict(packs.faults(folder))
        found.left_out.extend(LeftOut(path, why) for path, why in wrong.items())
        for path in sorted(_paths(folder, wrong) - wrong.keys()):
            try:
                # streams of other tiers need not be read
                if tier is None or tier == read_record(path)["spec"]["tier"]:
                    found.runs.append((path, verified(path)))
            except (StoreError, OSError) as error:
                found.left_out.append(LeftOut(path, str(error)))
    return found


def _paths(folder: Path, wrong: Container[Path]) -> set[Path]:
    """Where the runs of an experiment's folder lie or would lie, those of a part that is wrong left out."""
    unpacked = {file.parent for file in folder.glob("*/record.json")}
    return unpacked | set(packs.packed_runs(folder, wrong))


def verified(path: Path, *folders: str) -> dict[str, Any]:
    """The record of the run directory `path`, which lies where its spec says; a complete run's streams are whole.

    folders: of `kept.FOLDERS`, those that the caller reads besides.
    Raises StoreError for a copy under another name or in another experiment's folder, which would count as one more
    seed, for a record that cannot be read, and for a stream of a complete run, or a file in `folders`, that is damaged
    or has changed.
    """
    record = read_record(path)
    if right := misplaced(path, record):
        raise StoreError(f"{path} is no run: its record is of {right}; move it out of runs/, or rename it to that")
    if record["status"] == "complete":
        path = Path(path)
        _whole(path, (*(_seen(path / name) for name in packs.FILES), packs.mark(path)))
        for file, why in kept.changed(path, record, folders):
            raise StoreError(f"{file}: {why}")
    return record


def is_run(path: Path) -> bool:
    """Whether `path` lies where its record says; also for a record that cannot be read, whose reader says so."""
    try:
        return not misplaced(path, read_record(path))
    except StoreError:
        return packs.read(Path(path), "record.json") is not None


@lru_cache(maxsize=4096)
def _whole(path: Path, _files: tuple[Any, ...]) -> None:
    """Read every stream once: a report surveys the same runs for each of its tables and figures."""
    for name in STREAMS:
        read_rows(path, name)


def _seen(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None if there is none."""
    try:
        state = file.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def iter_runs(root: Path, experiment: str | None = None, tier: str | None = None) -> Iterator[Run]:
    """(run directory, record) of every run of `survey`, for those who need not say what was left out."""
    yield from survey(root, experiment, tier).runs
