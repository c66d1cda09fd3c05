"""What a run keeps beside its record and streams, samples and adapter: hashed when it is finished, held to it later.

Records travel without them (packed, committed), so a folder that is not there at all was left behind; in one that is
there, every file that the record names is what it was, or the run is not trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import inside, sha256

FOLDERS = ("samples", "adapter")
MEND = "restore the file, or remove the run's folder and run it again"


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file in the `FOLDERS` of the run directory `path`, by "folder/name"."""
    return {
        file.relative_to(path).as_posix(): sha256(file)
        for folder in FOLDERS
        for file in sorted((path / folder).glob("*"))
        if file.is_file()
    }


def changed(path: Path, record: Mapping[str, Any], folders: tuple[str, ...] = FOLDERS) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong) of what a complete run's record names in `folders` and is missing there or another.

    Nothing for a record that names none: those of early versions, and of a run that did not end well.
    """
    for name, wanted in (record.get("files") or {}).items():
        folder, _, below = name.partition("/")
        if folder not in folders or not (path / folder).is_dir():
            continue
        try:
            file = inside(path / folder, below, path / "record.json")
            if not file.is_file():
                yield file, f"is missing; {MEND}"
            elif sha256(file) != wanted:
                yield file, f"is not what it was when the run was finished; {MEND}"
        except (CheckpointError, OSError) as error:
            yield path / folder, f"cannot be compared with the record ({error}); {MEND}"
