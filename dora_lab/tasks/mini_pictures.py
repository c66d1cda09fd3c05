"""Sources "mini_vl" and "mini_vl_blind": the embedded world of pictures as a folder that `vl_adapter` reads.

The folder is in the layout in which VL-Adapter's data is hosted, and has in `novel` the annotations of the items about
combinations that no other split shows. It is made once for each version of the world and lies in the user's cache
(50 MB, six seconds). In "mini_vl_blind" all features are zero: what questions alone give away.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path

from dora_lab import house
from dora_lab.io.errors import LoadError
from dora_lab.io.files import hash_files
from dora_lab.mini import vl

SOURCES = {"mini_vl": False, "mini_vl_blind": True}  # name: blind
WORLD = ("scenes", "questions", "families", "cells")  # modules of `mini.vl` that the files are made by
SEAL = "sha256"  # a file of the folder: the hash of all others


def folder(name: str) -> Path:
    """The folder of a source, written if it is not there whole.

    Processes that write it at the same time make the same bytes, and one of them keeps its own. Raises LoadError where
    there is no room or no right to write.
    """
    place = house.cache() / "data" / f"{name}-{_version()}"
    if _whole(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            new = vl.write(Path(made) / name, blind=SOURCES[name])
            vl.add(new, "novel", blind=SOURCES[name])
            (new / SEAL).write_text(_hash(new))
            if place.exists() and not _whole(place):  # damaged since
                shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(FileExistsError):
                _move(new, place)
    except OSError as error:
        raise LoadError(
            f"{place}: the world of pictures cannot be written there ({error.strerror}); set XDG_CACHE_HOME to a "
            "folder with 50 MB of room"
        ) from None
    return place


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


@cache
def _version() -> str:
    """12 hex digits of the code that makes the files."""
    content = hashlib.sha256()
    for module in WORLD:
        content.update((Path(vl.__file__).parent / f"{module}.py").read_bytes())
    return content.hexdigest()[:12]
