"""Folders of data that the lab makes itself: once for each version of what they are made by, in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from dora_lab import house
from dora_lab.io.errors import LoadError
from dora_lab.io.files import hash_files

SEAL = "sha256"  # a file of the folder: the hash of all others


def written(name: str, version: str, make: Callable[[Path], object], megabytes: int) -> Path:
    """The folder of a source, made by `make` (which gets the path of a folder to be) if it is not there whole.

    Processes that write it at the same time make the same bytes, and one of them keeps its own. Raises LoadError where
    there is no room or no right to write.
    """
    place = house.cache() / "data" / f"{name}-{version}"
    if _whole(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            new = Path(made) / name
            make(new)
            (new / SEAL).write_text(_hash(new))
            if place.exists() and not _whole(place):  # damaged since
                shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(FileExistsError):
                _move(new, place)
    except OSError as error:
        raise LoadError(
            f"{place}: the embedded world cannot be written there ({error.strerror}); set XDG_CACHE_HOME to a "
            f"folder with {megabytes} MB of room"
        ) from None
    return place


def version_of(modules: Iterable[Path]) -> str:
    """12 hex digits of the code that makes a folder."""
    content = hashlib.sha256()
    for module in modules:
        content.update(module.read_bytes())
    return content.hexdigest()[:12]


def _move(new: Path, place: Path) -> None:
    """Raises FileExistsError where another process was first."""
    try:
        new.rename(place)
    except OSError:
        if _whole(place):
            raise FileExistsError from None
        raise


def _whole(place: Path) -> bool:
    seal = place / SEAL
    return seal.is_file() and seal.read_text() == _hash(place)


def _hash(place: Path) -> str:
    files = sorted(file for file in place.rglob("*.*") if file.is_file())
    return hash_files({file.relative_to(place).as_posix(): file for file in files})
