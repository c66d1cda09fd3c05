"""The streams of a run as they are read back, row by row, each with the fields that readers need."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dora_lab.io.files import hash_bytes, parse_whole
from dora_lab.runs import packs
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import read_record
from dora_lab.spec import did_you_mean

STREAMS = ("metrics", "probe", "timing", "eval")
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
REQUIRED_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {  # what a reader needs of a row
    "metrics": {"step": (int,)},
    "probe": {"step": (int,), "module": (str,), "kind": (str,), "delta_m": _NUMBER, "delta_d": _NUMBER},
    "eval": {"task": (str,), "protocol": (str,), "metric": (str,), "value": _MAYBE, "n": (int,)},
}
OPTIONAL_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {  # of these types where they are there
    "metrics": dict.fromkeys(("tokens", "loss", "eval_loss", "learning_rate", "grad_norm", "seconds"), _MAYBE),
    "probe": {**dict.fromkeys(("layer", "fraction", "relative_change"), _MAYBE), "axis": (str, type(None))},
    "eval": {
        **dict.fromkeys(("stderr", "n_unparsed", "n_shortened", "n_questions_cut", "chance", "majority"), _MAYBE),
        **dict.fromkeys(("correct", "prompt_sha256"), (str, type(None))),
    },
}


def read_stream(path: Path, name: str) -> list[dict[str, Any]]:
    """All rows of one stream of the run directory `path`, [] if it was never written.

    A last line without its newline is a write in progress (or a torn one) and is left out; any other line that is not
    a JSON object raises StoreError with file and line.
    """
    if name not in STREAMS:
        raise StoreError(f"{path}: unknown stream '{name}'; {did_you_mean(name, STREAMS)}")
    file = Path(path) / f"{name}.jsonl"
    rows = []
    whole, _, _ = content(path, name).rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            row = parse_whole(line)
        except ValueError as error:
            raise StoreError(f"{file}, line {number}: {error}; restore the file or run again") from None
        if not isinstance(row, dict):
            raise StoreError(f"{file}, line {number}: not a JSON object; restore the file or run again")
        rows.append(row)
    return rows


def content(path: Path, name: str) -> bytes:
    """One stream of the run directory `path` as it lies there; empty if it was never written."""
    return packs.read(Path(path), f"{name}.jsonl") or b""


def read_rows(path: Path, name: str) -> list[dict[str, Any]]:
    """`read_stream`, and every row has the fields that tables and figures read, of their types.

    Raises StoreError naming file, line and field; for eval also where `correct` and `value` contradict each other, and
    for a stream that has changed since the run was finished.
    """
    rows = read_stream(path, name)
    file = Path(path) / f"{name}.jsonl"
    record = packs.read(Path(path), "record.json")
    wanted = None if record is None else _hashes(Path(path), record)[name]
    if wanted not in (None, hash_bytes(content(path, name))):
        raise StoreError(f"{file}: is not what it was when the run was finished; restore the file or run again")
    for number, row in enumerate(rows, start=1):
        where = f"{file}, line {number}"
        optional = {field: kinds for field, kinds in OPTIONAL_FIELDS.get(name, {}).items() if field in row}
        for field, kinds in (REQUIRED_FIELDS.get(name, {}) | optional).items():
            value = row.get(field, row)  # a field that is not there has no value of any of these types
            if not isinstance(value, kinds) or isinstance(value, bool):
                value = row.get(field)
                raise StoreError(f"{where}: field '{field}' = {value!r:.60}; restore the file or run again")
        if name == "eval" and row["metric"] == "accuracy" and not 0 <= (row["value"] or 0) <= 1:
            raise StoreError(f"{where}: accuracy {row['value']} is no share of 1; restore the file or run again")
        if name == "eval" and row["metric"] == "accuracy" and isinstance(text := row.get("correct"), str):
            value, n = row["value"], row["n"]
            if len(text) != n or set(text) - {"0", "1"} or value is None or abs(text.count("1") - value * n) > 1e-6 * n:
                raise StoreError(
                    f"{where}: value {value} of n {n} is not what its {len(text)} answers say; restore the file"
                )
    return rows


@lru_cache(maxsize=4096)  # a record is asked for each of its streams, by each table
def _hashes(path: Path, _content: bytes) -> dict[str, str | None]:
    """`stream_hash` of every stream, of the record with that content."""
    record = read_record(path)
    return {name: stream_hash(record, name) for name in STREAMS}


def stream_hash(record: Mapping[str, Any], name: str) -> str | None:
    """SHA-256 that a stream had when the run was finished; None where the record does not say."""
    marks = record.get("streams")
    mark = marks.get(name) if isinstance(marks, dict) else None
    return mark.get("sha256") if isinstance(mark, dict) else None


def repair(file: Path) -> str | None:
    """Make the last line whole or remove it, if a crash tore it; a note on what was done, or None."""
    if not file.exists():
        return None
    content = file.read_bytes()
    whole, newline, tail = content.rpartition(b"\n")
    if not tail:
        return None
    try:
        complete = isinstance(json.loads(tail), dict)
    except ValueError:
        complete = False
    if complete:
        with file.open("ab") as out:
            out.write(b"\n")
        return None
    os.truncate(file, len(whole) + len(newline))
    return f"{file.name}: a torn last line of {len(tail)} bytes was removed"
