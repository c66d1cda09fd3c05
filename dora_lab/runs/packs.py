"""Packed runs: some fifty finished runs in one Parquet file, byte for byte the files of their folders.

`results/runs/<experiment>/part-0001.parquet`, ... have a row per file of a run (run, file, content, numbers) and are
never added to; `index.jsonl` beside them, a line per run, holds the SHA-256 of its record, and of its streams where the
record, an early one, does not. So a chain leads from a line that a reader of the repository's history can see to the
record, and from the record to its streams; each hash lies in one place, for it cannot be compressed. A run is read by
the path that its folder would have: nobody but this room knows that there is none.

What base64 holds of a content (see `item_values`) lies beside it as bytes, even and odd places apart: of a float16 the
upper byte says little more than its size, and compresses; in base64 no byte stands alone. A part is a fifth smaller. A
stream whose lines differ in nothing but their values lies by columns (see `columns`).
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from dora_lab.io.atomic import replacing, write_text
from dora_lab.io.files import hash_bytes, parse_json
from dora_lab.runs.columns import by_column, by_line
from dora_lab.runs.errors import StoreError

SIZE = 50  # runs of a part
INDEX = "index.jsonl"
FILES = ("record.json", "metrics.jsonl", "probe.jsonl", "timing.jsonl", "eval.jsonl")
_RUN = re.compile(r"[0-9a-f]{12}")
_BASE64 = re.compile(rb'"((?![01]+")(?:[A-Za-z0-9+/]{4}){17,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?)"')
_CUT = re.compile(rb'"\x00(\d+)"')  # JSON has no byte 0: what is left where so many bytes were
Files = Mapping[str, bytes]


def read(path: Path, name: str) -> bytes | None:
    """One file of the run at `path`, from its folder or, where no record is there, from a part; None if there is none.

    Raises StoreError for a part or index that is not what it was.
    """
    file = Path(path) / name
    if file.is_file():
        return file.read_bytes()
    return None if file.with_name("record.json").is_file() else packed(Path(path)).get(name)


def packed(path: Path) -> Files:
    """The files of the packed run that belongs at `path`; none if it is in no part of its experiment."""
    for part in _parts(path.parent):
        try:
            runs = _contents(part)
        except StoreError:
            if path.name in index(path.parent):
                raise
            continue  # the run may be in a part that is whole
        if path.name in runs:
            return runs[path.name]
    return {}


def packed_runs(experiment: Path, wrong: Container[Path] = ()) -> Iterator[Path]:
    """Where the packed runs of an experiment's folder would lie, in the order of the parts that are not `wrong`."""
    for part in _parts(experiment):
        yield from (experiment / run for run in _contents(part)) if part not in wrong else ()


def faults(experiment: Path) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong) of the parts and the index of an experiment's folder."""
    seen: dict[str, Path] = {}
    whole = True
    for part in _parts(experiment):
        try:
            runs = _contents(part)
        except StoreError as error:
            whole = False
            yield part, str(error)
            continue
        for run in runs:
            if run in seen:
                yield part, f"{part}: run {run} is in {seen[run].name} too; restore both parts"
            seen.setdefault(run, part)
            if _differs(experiment / run, runs[run]):
                folder = experiment / run
                yield folder, f"{folder}: differs from the packed run of that name; move the folder out of runs/"
    try:
        lost = [run for run in index(experiment) if run not in seen] if whole else []
    except StoreError as error:
        yield experiment / INDEX, str(error)
        return
    if lost:
        what = f"run {lost[0]} is" if len(lost) == 1 else f"run {lost[0]} and {len(lost) - 1} more are"
        yield experiment / INDEX, f"{experiment / INDEX}: {what} in no part; restore the parts"


def _differs(folder: Path, files: Files) -> bool:
    there = {name: folder / name for name in FILES if (folder / name).is_file()}
    # a run is read from its folder as soon as its record is there: what is missing then would be read as nothing. Of
    # runs that were packed the record is removed first
    missing = "record.json" in there and {name for name, content in files.items() if content} - {*there}
    return bool(missing) or any(files.get(name) != file.read_bytes() for name, file in there.items())


def mark(path: Path) -> tuple[object, ...]:
    """What changes when the parts or the index of the experiment do that the run at `path` is of."""
    files = [*_parts(path.parent), path.parent / INDEX]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())


@cache
def schema() -> Any:
    """The columns of a part, a pyarrow schema; pyarrow takes longer to import than most commands to run."""
    import pyarrow as pa

    return pa.schema(
        [
            ("run", pa.string()), ("file", pa.string()), ("content", pa.large_binary()),
            ("numbers", pa.large_binary()),  # null: content is whole
        ]
    )  # fmt: skip


def write(experiment: Path, runs: Sequence[tuple[str, Files, str]]) -> list[Path]:
    """Pack runs (id, files, when hashed) into new parts and the index of an experiment's folder; returns the parts.

    The caller holds the folder's lock: two that number parts and write the index at once lose runs of one another.
    Raises StoreError, before anything is written, for parts or an index that are not what they were (a run that is in
    none of them could be taken for packed), and for a content that a part does not give back.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for _, what in faults(experiment):
        raise StoreError(what)
    lines = [*index(experiment).values()]
    numbers = [int(part.stem.removeprefix("part-")) for part in _parts(experiment)]
    made: list[Path] = []
    for start in range(0, len(runs), SIZE):
        some = runs[start : start + SIZE]
        numbers.append(max(numbers, default=0) + 1)
        part = experiment / f"part-{numbers[-1]:04d}.parquet"
        contents = {(run, name): content for run, files, _ in some for name, content in files.items()}
        rows = [(*where, *_apart(content)) for where, content in contents.items()]
        table = pa.table(list(zip(*rows, strict=True)), schema())
        # brotli: a tenth smaller than zstd; statistics would be the smallest and the largest content, each twice
        how = {"compression": "brotli", "compression_level": 11, "write_statistics": False, "use_dictionary": False}
        with replacing(part) as temporary:
            pq.write_table(table, temporary, **how)
            _require_back(temporary, contents)
        made.append(part)
        lines += [_line(run, files, hashed) for run, files, hashed in some]
        write_text(experiment / INDEX, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    return made


def _require_back(part: Path, contents: Mapping[tuple[str, str], bytes]) -> None:
    """Raise StoreError if a part does not give back what was put into it: folders are removed on its word."""
    import pyarrow.parquet as pq

    for row in pq.read_table(part, schema=schema()).to_pylist():
        run, name = row["run"], row["file"]
        try:
            same = _together(row["content"], row["numbers"]) == contents[run, name]
        except (ValueError, TypeError, struct.error):
            same = False
        if not same:
            raise StoreError(f"run {run}: {name} cannot be packed (it is no JSON); move the run out of runs/")


def _apart(content: bytes) -> tuple[bytes, bytes | None]:
    """The columns content and numbers of a file's content."""
    if set(content) & {*range(6)}:  # no JSON: these bytes say how a content lies in a part
        return content, None
    found: list[bytes] = []

    def cut(text: re.Match[bytes]) -> bytes:
        found.append(base64.b64decode(text[1]))
        return b'"\x00%d"' % len(found[-1])

    rest, numbers = _BASE64.sub(cut, by_column(content)), b"".join(found)
    parts = rest, numbers[::2] + numbers[1::2] if numbers else None
    return parts if _together(*parts) == content else (content, None)  # base64 that ends in stray bits: kept whole


def _together(content: bytes, numbers: bytes | None) -> bytes:
    """What `_apart` was given."""
    if content.startswith(b"\x01"):  # a part from before the decimals: base64 was cut out of the lines
        content = by_line(content)
    if numbers is not None:
        content = _put(content, numbers)
    return by_line(content) if content.startswith(b"\x05") else content


def _put(content: bytes, numbers: bytes) -> bytes:
    joined = bytearray(len(numbers))
    middle = (len(numbers) + 1) // 2
    joined[::2], joined[1::2] = numbers[:middle], numbers[middle:]
    place = 0

    def put(mark: re.Match[bytes]) -> bytes:
        nonlocal place
        place += int(mark[1])
        return b'"%b"' % base64.b64encode(joined[place - int(mark[1]) : place])

    return _CUT.sub(put, content)


def index(experiment: Path) -> dict[str, dict[str, object]]:
    """The lines of an experiment's index by run: run, its files' hashes, and when they were made.

    Raises StoreError, with file and line, for one that is damaged or names a run twice.
    """
    file = experiment / INDEX
    found: dict[str, dict[str, object]] = {}
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), start=1):
        try:
            row = parse_json(line)
            run, files = row["run"], row["files"]
            if not _RUN.fullmatch(run) or run in found or not isinstance(files, dict) or {*files} - {*FILES}:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{file}, line {number}: damaged, or of a run that was before; restore the file") from None
        found[run] = row
    return found


def _line(run: str, files: Files, hashed: str) -> dict[str, object]:
    told = _told(files["record.json"], run)
    hashes = {name: hash_bytes(content) for name, content in files.items() if name not in told}
    return {"run": run, "hashed": hashed, "files": hashes}


def _told(record: bytes, where: object) -> dict[str, str]:
    """SHA-256 of the streams, by file, that a record tells; empty streams have no file."""
    try:
        marks = parse_json(record).get("streams") or {}
        return {f"{name}.jsonl": mark["sha256"] for name, mark in marks.items() if mark["bytes"]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{where}: a record's hashes cannot be read ({error}); restore the file") from None


def _parts(experiment: Path) -> list[Path]:
    return sorted(experiment.glob("part-[0-9][0-9][0-9][0-9].parquet"))


def _contents(part: Path) -> dict[str, dict[str, bytes]]:
    if not part.is_file():  # a folder, or a link to nothing
        raise StoreError(f"{part}: is no file; restore it")
    state, beside = part.stat(), part.parent / INDEX
    then = (beside.stat().st_size, beside.stat().st_mtime_ns) if beside.is_file() else None
    return _read(part, (state.st_size, state.st_mtime_ns), then)


@lru_cache(maxsize=256)
def _read(part: Path, _state: object, _index: object) -> dict[str, dict[str, bytes]]:
    """run -> file -> content, every content what the index or the record says; of a part as it is now."""
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(part, schema=schema()).to_pylist()
    except Exception as error:  # pyarrow's own, of many kinds
        first = str(error).splitlines()[0] if str(error) else ""
        raise StoreError(f"{part}: cannot be read ({type(error).__name__}: {first:.120}); restore the file") from None
    known, found = index(part.parent), {}
    for row in rows:
        run, name, content = row["run"], row["file"], row["content"]
        try:
            content = _together(content, row["numbers"]) if isinstance(content, bytes) else content
        except (ValueError, TypeError, struct.error):
            raise StoreError(
                f"{part}: {name!r:.20} of run {run!r:.20} cannot be put together; restore the file"
            ) from None
        if not isinstance(content, bytes) or name not in FILES or not _RUN.fullmatch(run or ""):
            raise StoreError(f"{part}: a row of {run!r:.20}, {name!r:.20} is none of a run's files; restore the file")
        if run not in known:
            raise StoreError(
                f"{part}: run {run} is not in {INDEX}; restore both files, or, where its folder is there (packing was "
                "interrupted), delete the part"
            )
        if name in found.setdefault(run, {}):
            raise StoreError(f"{part}: run {run} is in it twice; restore the file")
        found[run][name] = content
    for run, files in found.items():
        wanted: dict[str, str] = dict(known[run]["files"])  # type: ignore[call-overload]
        for name in FILES:  # the record first: what it tells is as good as its own hash
            if name not in files and name in wanted:
                raise StoreError(f"{part}: {name} of run {run} is missing; restore the file")
            if name in files and hash_bytes(files[name]) != wanted.get(name):
                raise StoreError(f"{part}: {name} of run {run} is not what {INDEX} or its record says; restore both")
            if name == "record.json":
                wanted = _told(files[name], part) | wanted
    return found
