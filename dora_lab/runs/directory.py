"""The run directory: written by one process at a time, read back without torch (standard library only).

Layout, under a results folder `root`: ``runs/<experiment>/<spec_id>/`` with ``record.json`` (what the run was and how
it ended), the append-only streams ``metrics.jsonl``, ``probe.jsonl``, ``timing.jsonl``, ``eval.jsonl``, and
``samples/``, ``checkpoints/``, ``adapter/``. A missing value is null: NaN and infinity are refused on the way in.
Wall time has a stream of its own, so that the others are the same, byte for byte, however often a run was cut short.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dora_lab.io.atomic import fsync, write_text
from dora_lab.io.files import hash_bytes
from dora_lab.runs import kept, packs
from dora_lab.runs.errors import OUTSIDE, LockedError, StoreError
from dora_lab.runs.lock import Lock, acquire
from dora_lab.runs.record import ENDINGS, SCHEMA, read_record, run_path, spec_of
from dora_lab.runs.streams import STREAMS, content, repair
from dora_lab.spec import Spec, did_you_mean, spec_id, to_dict

OWN_FIELDS = ("schema", "spec", "spec_id", "status", "error", "notes")  # of record.json, written by RunDir alone

log = logging.getLogger(__name__)


class RunDir:
    """One run directory, locked and open for writing; use ``with RunDir.open(root, spec) as run``.

    Leaving the block without `finish` marks the run: `interrupted` (Ctrl-C, a full disk, nothing said, anything at all
    once its training is done), `failed` (any other exception, whose text becomes the error). A complete run is never
    written to: check `complete` after opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self._lock: Lock | None = None
        self._record: dict[str, Any] = {}

    @classmethod
    def open(cls, root: Path, spec: Spec) -> RunDir:
        """Lock, repair and open the directory of `spec` under the results folder `root`, creating it at need.

        A new run's status is `running`, and so again is that of an interrupted run, which goes on, and of a failed one,
        which starts from nothing; `complete` stays. Raises LockedError if another process holds it, StoreError if its
        record is of another spec or is damaged, the run is packed (a part is never written to), or the folder cannot be
        written.
        """
        run = cls(run_path(root, spec))
        if not (run.path / "record.json").is_file() and packs.packed(run.path):
            raise StoreError(f"{run.path} is packed, of inputs that have changed since; choose another --results")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._lock, note = acquire(run.path / "lock")
            run._start(spec, note)
        except OSError as error:
            run.close()
            raise StoreError(f"{run.path} cannot be written: {error.strerror}; choose another --results") from None
        except BaseException:
            run.close()
            raise
        return run

    def _start(self, spec: Spec, note: str | None) -> None:
        wanted = {"schema": SCHEMA, "spec": to_dict(spec), "spec_id": spec_id(spec), "status": "running", "error": None}
        if (self.path / "record.json").exists():
            self._record = read_record(self.path)
            if spec_of(self._record) != spec:
                raise StoreError(f"{self.path / 'record.json'} is of another spec; move that directory away")
        if self.complete:
            return
        for left in self.path.glob(".*.tmp"):  # of a process that was killed while replacing a file
            left.unlink()
        if self._record.get("status") == "failed":
            self._wipe()
        notes = [*self._record.get("notes", []), *([note] if note else [])]
        notes += [repaired for name in STREAMS if (repaired := repair(self.path / f"{name}.jsonl"))]
        for text in notes[len(self._record.get("notes", [])) :]:
            log.warning("%s: %s", self.path, text)
        self._record = {**self._record, **wanted, "notes": notes}
        _write_json(self.path / "record.json", self._record)

    def restart(self, reason: str) -> None:
        """Drop all that the run has so far (another package version made it, say) and start from nothing.

        A crash in between leaves a failed run, which starts from nothing as well.
        """
        self._refuse_if_lost()
        kept = {name: self._record[name] for name in ("schema", "spec", "spec_id")}
        self._record = {**kept, "status": "failed", "error": f"starting anew: {reason}", "notes": [reason]}
        _write_json(self.path / "record.json", self._record)
        self._wipe()
        self._record = {**self._record, "status": "running", "error": None}
        _write_json(self.path / "record.json", self._record)

    def _wipe(self) -> None:
        for name in STREAMS:
            (self.path / f"{name}.jsonl").unlink(missing_ok=True)
        for folder in (self.checkpoints, self.samples, self.adapter):
            shutil.rmtree(folder, ignore_errors=True)
        self._record = {name: value for name, value in self._record.items() if name in OWN_FIELDS}

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self.status == "running":
                if kind is None:
                    self.finish("interrupted", "the run was left unfinished")
                else:
                    words = f"{kind.__name__}: {error}" if str(error) else kind.__name__
                    # on a full disk `running` without a lock says as much; a lock that was lost forbids to say it
                    with contextlib.suppress(OSError, LockedError):
                        kept = issubclass(kind, OUTSIDE) or self._record.get("trained")
                        self.finish("interrupted" if kept else "failed", words)
        finally:
            self.close()

    @property
    def status(self) -> str:
        """running, complete, failed or interrupted."""
        return str(self._record["status"])

    @property
    def complete(self) -> bool:
        """Whether the run has ended well; then nothing more can be written."""
        return self._record.get("status") == "complete"

    def append(self, stream: str, row: dict[str, Any]) -> None:
        """Add one row to ``<stream>.jsonl`` (metrics, probe, timing or eval), flushed to the operating system.

        Raises StoreError for NaN, infinity or a value that JSON does not know, naming the field; OSError where it
        cannot be written: then the stream is as it was before.
        """
        file = self._writable(stream)
        text = _dumps(row, str(file))
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a", encoding="utf-8") as out:
                out.write(text + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(file, size)
            raise

    def marks(self) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of each stream as it is now, brought to the disk first: what a checkpoint belongs to."""
        found = {}
        for name in STREAMS:
            file = self.path / f"{name}.jsonl"
            if file.exists():
                fsync(file)
            rows = content(self.path, name)
            found[name] = {"bytes": len(rows), "sha256": hash_bytes(rows)}
        return found

    def strayed(self, marks: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The first stream that does not begin with what `marks` saw (rows were lost or changed), or None."""
        for name, mark in marks.items():
            if hash_bytes(content(self.path, name)[: mark["bytes"]]) != mark["sha256"]:
                return name
        return None

    def cut(self, stream: str, size: int = 0) -> None:
        """Keep the first `size` bytes of a stream, a mark's: what came after it is about to be done again."""
        file = self._writable(stream)
        if file.exists() and file.stat().st_size > size:
            os.truncate(file, size)

    def note(self, text: str) -> None:
        """Add a line to the record's notes: what a reader should know of how the run went."""
        self._refuse_if_closed()
        log.warning("%s: %s", self.path, text)
        self._record = {**self._record, "notes": [*self._record.get("notes", []), text]}
        _write_json(self.path / "record.json", self._record)

    def record(self, **values: Any) -> None:
        """Merge fields into record.json, atomically; a dict is merged into the dict that is there, key by key.

        Raises StoreError for a field that is the run directory's own (status, spec, ...) and as `append` does.
        """
        if own := [name for name in values if name in OWN_FIELDS]:
            raise StoreError(f"{self.path}: record fields {own} are written by the run directory; use finish()")
        self._refuse_if_closed()
        merged = dict(self._record)
        for name, value in values.items():
            old = merged.get(name)
            merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        _write_json(self.path / "record.json", merged)
        self._record = merged

    def mark_trained(self, done: bool) -> None:
        """Say whether the last training step is in a checkpoint. Then no error fails the run any more: a failed run
        starts from nothing, an interrupted one goes on. The record of a complete run has no such field, `trained`.
        """
        if done != self._record.get("trained", False):
            self.record(trained=done)

    def finish(self, status: str, error: str | None = None) -> None:
        """End the run as complete, failed or interrupted; a failure needs its error text, a success has none.

        The record of a complete run holds the `marks` of its streams and the hashes of the files that it keeps beside
        them (`kept`), so that a change of any of them later is seen.
        """
        if status not in ENDINGS:
            raise StoreError(f"{self.path}: unknown status '{status}'; {did_you_mean(status, ENDINGS)}")
        if (status == "failed" and not error) or (status == "complete" and error):
            raise StoreError(
                f"{self.path}: status '{status}' with error {error!r}; a failure, and only it, has an error"
            )
        self._refuse_if_closed()
        marks = self.marks()  # rows reach the disk before the record says that they are whole
        more = {}
        if status == "complete":
            more = {"streams": marks, "files": kept.hashes(self.path)}
            self._record.pop("trained", None)
        # the name of a file in an error may hold half a character, which no reader takes
        said = None if error is None else error.encode("utf-8", "backslashreplace").decode("utf-8")
        self._record = {**self._record, **more, "status": status, "error": said}
        _write_json(self.path / "record.json", self._record)

    def close(self) -> None:
        """Give the lock back; the directory stays as it is."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _refuse_if_lost(self) -> None:
        if self._lock is None:
            raise StoreError(f"{self.path} is closed; open it again to write")
        self._lock.require()

    def _refuse_if_closed(self) -> None:
        self._refuse_if_lost()
        if self.complete:
            raise StoreError(f"{self.path} is complete and is not written to; remove it to run it again")

    def _writable(self, stream: str) -> Path:
        if stream not in STREAMS:
            raise StoreError(f"{self.path}: unknown stream '{stream}'; {did_you_mean(stream, STREAMS)}")
        self._refuse_if_closed()
        return self.path / f"{stream}.jsonl"


class Follower(RunDir):
    """A run directory as the further processes of one distributed run have it: read, never written.

    The first process holds the lock and writes everything once.
    """

    @classmethod
    def open(cls, root: Path, spec: Spec) -> Follower:
        """The directory of `spec`; nothing is locked or created."""
        run = cls(run_path(root, spec))
        run._record = {"status": "running"}
        return run

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        pass

    def append(self, stream: str, row: dict[str, Any]) -> None:
        """Nothing: the first process writes it."""

    def cut(self, stream: str, size: int = 0) -> None:
        """Nothing: the first process does it."""

    def note(self, text: str) -> None:
        """Nothing: the first process writes it."""

    def record(self, **values: Any) -> None:
        """Nothing: the first process writes it."""

    def finish(self, status: str, error: str | None = None) -> None:
        """Nothing: the first process does it."""


def _dumps(row: Any, where: str) -> str:
    """One line of JSON; StoreError names the field that JSON cannot hold."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        name, value = _culprit(row, "") or ("?", row)
        raise StoreError(
            f"{where}: field '{name}' = {value!r} is no JSON value; write None where there is none"
        ) from None


def _culprit(value: Any, path: str) -> tuple[str, Any] | None:
    if isinstance(value, dict):
        inner = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        inner = ((f"{path}[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, float):
        return None if math.isfinite(value) else (path, value)
    else:
        return None if value is None or isinstance(value, str | int | bool) else (path, value)
    return next((found for name, item in inner if (found := _culprit(item, name))), None)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    _dumps(value, str(file))
    write_text(file, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
