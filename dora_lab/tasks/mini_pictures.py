"""Sources "mini_vl" and "mini_vl_blind": the embedded world of pictures as a folder that `vl_adapter` reads.

The folder is in the layout in which VL-Adapter's data is hosted, and has in `novel` the annotations of the items about
combinations that no other split shows. It is made once for each version of the world and lies in the user's cache
(50 MB, six seconds). In "mini_vl_blind" all features are zero: what questions alone give away.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dora_lab.mini import vl
from dora_lab.tasks.written import version_of, written

SOURCES = {"mini_vl": False, "mini_vl_blind": True}  # name: blind
WORLD = ("scenes", "questions", "families", "cells")  # modules of `mini.vl` that the files are made by


def folder(name: str) -> Path:
    """The folder of a source, written if it is not there whole (`written`)."""

    def make(new: Path) -> None:
        vl.write(new, blind=SOURCES[name])
        vl.add(new, "novel", blind=SOURCES[name])

    return written(name, _version(), make, megabytes=50)


@cache
def _version() -> str:
    return version_of(Path(vl.__file__).parent / f"{module}.py" for module in WORLD)
