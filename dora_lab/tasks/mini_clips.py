"""Sources "mini_clips" and "mini_clips_blind": the embedded world of clips as a folder that `value` reads.

The folder is in the layout of VALUE's release, and has in `validation` the annotations of items that rates are chosen
by. It is made once for each version of the world and lies in the user's cache (17 MB, some ten seconds). In
"mini_clips_blind" all features are zero: what questions and subtitles give away.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dora_lab.mini import vl
from dora_lab.mini.vl import clip_families
from dora_lab.tasks.written import version_of, written

SOURCES = {"mini_clips": False, "mini_clips_blind": True}  # name: blind
WORLD = ("scenes", "cells", "clips", "clip_families")  # modules of `mini.vl` that the files are made by


def folder(name: str) -> Path:
    """The folder of a source, written if it is not there whole (`written`)."""
    return written(name, _version(), lambda new: clip_families.write(new, blind=SOURCES[name]), megabytes=40)


@cache
def _version() -> str:
    return version_of(Path(vl.__file__).parent / f"{module}.py" for module in WORLD)
