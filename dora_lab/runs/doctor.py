"""What is wrong with a results folder, a run, or a saved adapter, and how to mend it: `dora-lab doctor`. No torch.

Every look yields findings: (what is wrong where, how to mend it). A run that failed or was interrupted says so in its
record and is no finding; one that says nothing, or other than its files, is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import parse_json
from dora_lab.io.files import verify as verify_files
from dora_lab.io.text import shown
from dora_lab.runs import checkpoints, kept, packs
from dora_lab.runs.errors import StoreError
from dora_lab.runs.lock import holder
from dora_lab.runs.record import read_record, spec_of
from dora_lab.runs.streams import STREAMS, content, read_rows
from dora_lab.runs.survey import survey
from dora_lab.spec import Spec

AGAIN = "run it again: it resumes"
ANEW = kept.MEND
MANIFEST = "dora_lab.json"  # of an adapter or a model that the lab saved
_KEYS = {
    "probe": ("step", "fraction", "module"),
    "eval": ("task", "protocol", "metric"),
}  # of which a row is the only one
_LARGEST = {"cider_d": 10}  # of a metric; all others are shares


class Finding(NamedTuple):
    """One thing that is wrong."""

    where: Path
    what: str
    mend: str


def examine(path: Path) -> Iterator[Finding]:
    """Everything that is wrong in a results folder, a run directory, or a folder with a manifest.

    Raises StoreError for a folder that is none of these.
    """
    path = Path(path)
    if (path / "record.json").exists() or (path.parent.parent.name == "runs" and path.is_dir()):
        yield from _run(path)
    elif (path / "runs").is_dir():
        for folder in sorted((path / "runs").glob("*")):
            yield from _experiment(folder)
        yield from _twins(path)
        yield from _bench(path / "bench")
    elif (path / MANIFEST).is_file():
        yield from _manifest(path)
        yield from _leftovers(path)
    else:
        raise StoreError(f"{path}: neither a results folder (with runs/), nor a run, nor a folder with a manifest")


def _experiment(folder: Path) -> Iterator[Finding]:
    wrong = dict(packs.faults(folder))
    for file, what in wrong.items():
        yield of_error(file, StoreError(what))
    for path in sorted({*folder.glob("*"), *packs.packed_runs(folder, wrong)}):
        if path.is_dir() or not path.exists():
            yield from _run(path)
        elif path.name != packs.INDEX and not path.match("part-*.parquet"):
            yield from _stray(path)


def _twins(results: Path) -> Iterator[Finding]:
    """Runs of different seeds whose losses are alike to the last digit: one of them was given another's name."""
    seen: dict[bytes, tuple[Path, int]] = {}
    for path, record in survey(results).runs:
        losses = content(path, "metrics")
        if record["status"] != "complete" or not losses:
            continue
        first, seed = seen.setdefault(losses, (path, record["spec"]["seed"]))
        if seed != record["spec"]["seed"]:
            what = f"its losses are those of {first.name}, which has another seed, to the last digit"
            yield Finding(path, what, "remove the one whose seed is not its own and run it again")


def _run(path: Path) -> Iterator[Finding]:
    owner = holder(path / "lock")
    held = owner is not None and owner.alive
    try:
        record = read_record(path)
        spec = spec_of(record)
    except StoreError as error:
        yield of_error(path / "record.json", error)
        return
    if owner is not None and not held:  # a complete run is opened by nobody again
        mend = "delete it" if record["status"] == "complete" else AGAIN
        yield Finding(path / "lock", f"left by {shown(owner.name)}, which has ended", mend)
    if (path.parent.name, path.name) != (spec.experiment, record["spec_id"]):
        right = f"{spec.experiment}/{record['spec_id']}"
        there = (path.parents[1] / right).exists()
        mend = "a copy: move it out of runs/, or delete it" if there else f"move the folder to {right}"
        yield Finding(path, f"its record is of the run {right}, so no table or figure counts it", mend)
    status = record["status"]
    if (status == "failed") != bool(record["error"]) and status in ("failed", "complete"):
        yield Finding(path / "record.json", f"status {status} with error {record['error']!r}", ANEW)
    if held:
        return  # its streams and checkpoints are being written
    if status == "running":
        yield Finding(path / "record.json", "status running, and nobody runs it: it was killed", AGAIN)
    yield from _streams(path, spec, record)
    yield from _leftovers(path)
    changed = [of_error(file, StoreError(what)) for file, what in kept.changed(path, record)]
    yield from changed or _manifest(path / "adapter")
    for folder in sorted((path / "checkpoints").glob("checkpoint-*")):
        manifest, fault = checkpoints.read_manifest(folder)
        if fault is not None:
            yield Finding(folder, f"a broken checkpoint ({fault})", f"{AGAIN}, from an older one")
        elif manifest is not None and manifest["spec_id"] != record["spec_id"]:
            yield Finding(folder, f"a checkpoint of another run, {manifest['spec_id']}", "delete it")
    for folder in sorted((path / "checkpoints" / checkpoints.QUARANTINE).glob("*")):
        yield Finding(folder, "a damaged checkpoint that was put aside", "look at it, then delete it")


def _streams(path: Path, spec: Spec, record: dict[str, Any]) -> Iterator[Finding]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in STREAMS:
        file = path / f"{name}.jsonl"
        if (whole := content(path, name)) and not whole.endswith(b"\n"):
            yield Finding(file, "a torn last line", AGAIN if record["status"] != "complete" else ANEW)
        try:
            rows[name] = read_rows(path, name)
        except StoreError as error:
            yield of_error(file, error)
            continue
        yield from (Finding(file, what, ANEW) for what in _disorder(name, rows[name]))
    if record["status"] != "complete" or len(rows) < len(STREAMS):
        return
    for name, what in _counts(spec, record, rows):
        yield Finding(path / f"{name}.jsonl", what, ANEW)


def _disorder(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows out of order, twice there, or with a number out of its range."""
    steps = [row["step"] for row in rows if "step" in row]
    if late := next((after for before, after in pairwise(steps) if after < before), None):
        yield f"the row of step {late} comes after a later one"
    keys = Counter(
        tuple(str(row.get(key)) for key in _KEYS[name]) if name in _KEYS else (row.get("step"), tuple(row))
        for row in rows
    )
    if twice := [key for key, count in keys.items() if count > 1]:
        yield f"{len(twice)} rows are there twice, the first is {twice[0]}"
    limits = {"delta_d": 2, "delta_m": math.inf, "relative_change": math.inf, "value": 1}
    for field, usual in limits.items():
        for row in rows:
            value, high = row.get(field), _LARGEST.get(str(row.get("metric"))) or usual
            if value is not None and not 0 <= value <= high + 1e-6:
                yield f"{field} = {value} is outside 0 .. {high}"
                break


def _counts(spec: Spec, record: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """(stream, what is wrong) where the rows of a complete run do not fit its spec and record."""
    there = {(row["task"], row["protocol"]) for row in rows["eval"]}
    counts = ((record.get("inputs") or {}).get("items") or {}).get(spec.evaluation.split) or {}
    # a task may have items for tests alone, or be there to be learnt alone; protocol builtin counts none
    tasks = counts or spec.data.tasks
    wanted = {(task, protocol) for task in tasks for protocol in spec.evaluation.protocols}
    if lost := sorted(wanted - there):
        yield "eval", f"{len(lost)} of {len(wanted)} scores are missing, the first is {' '.join(lost[0])}"
    for row in rows["eval"]:
        if row["task"] in counts and row["n"] != counts[row["task"]]:
            yield "eval", f"{row['task']}: n = {row['n']}, the record says {counts[row['task']]} items"
    steps = (record.get("training") or {}).get("steps")
    losses = [row["step"] for row in rows["metrics"] if "loss" in row]
    if steps is not None and (not losses or losses[-1] != steps):
        yield "metrics", f"the last loss is of step {losses[-1] if losses else None}, the run had {steps}"
    if spec.probe is not None:
        per = Counter(row.get("fraction") for row in rows["probe"])
        if set(per) != set(spec.probe.fractions) or len(set(per.values())) > 1:
            yield "probe", f"rows per fraction are {dict(per)}, the spec asks for {list(spec.probe.fractions)}"


def _manifest(folder: Path) -> Iterator[Finding]:
    """A saved adapter or model against its manifest, where it has one."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        verify_files(folder / MANIFEST)
    except CheckpointError as error:
        yield of_error(folder / MANIFEST, error)


def _leftovers(path: Path) -> Iterator[Finding]:
    for file in sorted([*path.glob(".*"), *path.glob("checkpoints/.*"), *path.glob("adapter/.*")]):
        yield Finding(file, "a temporary that was left behind", "delete it")


def _bench(folder: Path) -> Iterator[Finding]:
    for file in sorted(folder.glob("*.jsonl")):
        lines = file.read_bytes().splitlines()
        if twice := [line for line, count in Counter(lines).items() if count > 1]:
            what = f"{len(twice)} measurements are there twice, the first on line {lines.index(twice[0]) + 1}"
            yield Finding(file, what, "delete the second of each: it would count double")
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
            except ValueError as error:
                yield Finding(file, f"line {number}: {error}", "delete that line and measure it again")
                continue
            if not isinstance(row, dict):
                yield Finding(file, f"line {number}: not a JSON object", "delete that line and measure it again")


def _stray(file: Path) -> Iterator[Finding]:
    yield Finding(file, "a file where runs lie", "delete it or move it away")


def of_error(file: Path, error: Exception) -> Finding:
    """What an error says of a file, its last half-sentence being how to mend it."""
    what, semicolon, mend = str(error).removeprefix(f"{file}: ").removeprefix(f"{file}, ").rpartition("; ")
    return Finding(file, what, mend) if semicolon else Finding(file, mend, ANEW)


def report(findings: list[Finding]) -> str:
    """Two lines per finding, for a terminal."""
    lines = [f"{one.where}: {one.what}\n    mend: {one.mend}" for one in findings]
    return "\n".join(
        [*lines, f"{len(findings)} finding{'' if len(findings) == 1 else 's'}" if findings else "nothing is wrong"]
    )
