"""Checkpoints of a training run: each a folder that is whole or not there, and that says what it is of (no torch).

A checkpoint is filled under a temporary name; its manifest holds a hash of every file, what the run was made of (spec,
inputs, items, number of processes) and how long the run's streams were; all of it is brought to the disk and renamed
last. Before it is resumed it is verified whole. A broken one is moved to ``quarantine/``, named by its fault, and an
older one is used; a whole one of something else is refused, with what differs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_lab.io.atomic import fsync, of_disk, write_text
from dora_lab.io.files import hash_bytes, sha256
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import ResumeError

FORMAT = 2  # of the manifest
MANIFEST = "manifest.json"
KEPT = 2  # an older one is there if the newest turns out to be damaged
QUARANTINE = "quarantine"
PARTIAL = ".partial"


class SaveError(OSError):
    """A checkpoint could not be written; the one before it stays."""


class Checkpoints:
    """The checkpoints of one run, in its ``checkpoints/`` as ``checkpoint-<step>``.

    of: what the run is made of, a JSON value with text keys; a checkpoint of anything else is refused.
    """

    def __init__(self, run: RunDir, of: Mapping[str, Any]) -> None:
        self.run, self.folder = run, run.checkpoints
        self.of: dict[str, Any] = json.loads(json.dumps(of))

    @property
    def partial(self) -> Path:
        """Where a checkpoint is filled, under its own name."""
        return self.folder / PARTIAL

    def all(self) -> list[Path]:
        """Those that are there, whole or not, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=step_of)

    @contextlib.contextmanager
    def writing(self, step: int, room: int, beside: list[Path]) -> Iterator[Path]:
        """A folder to be filled with the checkpoint of `step`, which it becomes when the block ends.

        room: bytes that it will take at most; beside: files in ``checkpoints/`` that it needs to be resumed.
        Raises SaveError where the disk has less room or a file cannot be written; what was begun is removed.
        """
        begun = self.partial / f"checkpoint-{step}"
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            begun.mkdir(parents=True)
            free = shutil.disk_usage(self.folder).free
            if free < room:
                raise OSError(errno.ENOSPC, f"{room / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
            yield begun
            self._seal(begun, step, beside)
        except Exception as error:
            shutil.rmtree(self.partial, ignore_errors=True)
            if not of_disk(error):
                raise
            last = [folder.name for folder in self.all()]
            raise SaveError(
                f"{self.folder / begun.name} could not be written ({error}); "
                + (f"{last[-1]} stays, " if last else "there is none before it, ")
                + "make room on the disk and run again"
            ) from error

    def _seal(self, begun: Path, step: int, beside: list[Path]) -> None:
        manifest = {
            "format": FORMAT,
            "spec_id": self.run.path.name,
            "step": step,
            "of": self.of,
            "streams": self.run.marks(),
            "files": {file.name: sha256(file) for file in sorted(begun.iterdir())},
            "beside": {file.name: sha256(file) for file in sorted(beside)},
        }
        for file in [*begun.iterdir(), *beside]:
            fsync(file)
        write_text(begun / MANIFEST, json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=1))
        target = self.folder / begun.name
        if target.exists():  # only if somebody put it there: resuming takes the newest, or moves it away
            self._quarantine(target, "replaced")
        os.replace(begun, target)
        fsync(self.folder)
        for old in self.all()[:-KEPT]:
            shutil.rmtree(old)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; broken ones are moved to quarantine, with a note in the record.

        Raises ResumeError, naming each field, if the newest whole one is of something else.
        """
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in reversed(self.all()):
            manifest, fault = read_manifest(folder)
            if manifest is not None and (stream := self.run.strayed(manifest["streams"])):
                fault = f"{stream}.jsonl-changed"
            if fault is None and manifest is not None:
                self._refuse_foreign(folder, manifest["of"])
                return folder
            moved = self._quarantine(folder, fault or "broken")
            self.run.note(f"{folder.name} is broken ({fault}), moved to {moved.relative_to(self.run.path)}")
        return None

    def _refuse_foreign(self, folder: Path, of: Mapping[str, Any]) -> None:
        if differing := differences(of, self.of):
            raise ResumeError(
                f"{folder} is of something else: {'; '.join(differing)}. Put back what it was made of, or remove "
                f"{self.run.path} to start anew"
            )

    def _quarantine(self, folder: Path, fault: str) -> Path:
        name = f"{folder.name}.{fault}"
        place = self.folder / QUARANTINE
        place.mkdir(exist_ok=True)
        again = sum(1 for other in place.iterdir() if other.name == name or other.name.startswith(f"{name}."))
        moved = place / (f"{name}.{again + 1}" if again else name)
        os.replace(folder, moved)
        fsync(self.folder)
        return moved


def step_of(checkpoint: Path) -> int:
    """The optimiser step of a checkpoint, from its name."""
    return int(checkpoint.name.split("-")[1])


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(manifest, None) of a whole checkpoint; (None, fault) of a broken one, the fault as a part of a file name."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "no-manifest"
    except (OSError, ValueError):
        return None, "manifest-unreadable"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None, "manifest-of-another-format"
    if manifest.get("sha256") != _own_hash({name: value for name, value in manifest.items() if name != "sha256"}):
        return None, "manifest-changed"
    there = {file.name for file in folder.iterdir()} - {MANIFEST}
    if unknown := sorted(there - manifest["files"].keys()):
        return None, f"{_plain(unknown[0])}-unknown"
    for part, wanted in (("", manifest["files"]), ("..", manifest["beside"])):
        for name, content in wanted.items():
            file = folder / part / name
            if not file.is_file():
                return None, f"{_plain(name)}-missing"
            if sha256(file) != content:
                return None, f"{_plain(name)}-changed"
    return manifest, None


def differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two JSON values differ, a line each: dotted path, the old value and the new."""
    lines = []
    for name in sorted(then.keys() | now.keys()):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} was {json.dumps(old)}, is {json.dumps(new)}")
    return lines


def clear(folder: Path) -> None:
    """Remove the checkpoints of a run that is complete; what is in quarantine stays to be looked at."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.is_dir() and path.name != QUARANTINE:
            shutil.rmtree(path, ignore_errors=True)
        elif not path.is_dir():
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hash_bytes(json.dumps(manifest, sort_keys=True).encode())


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)[:80]
