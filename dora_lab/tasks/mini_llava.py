"""Sources "mini_llava" and "mini_llava_blind": the embedded world of pictures and conversations as LLaVA's
`playground/data`, which `tasks.llava` reads; in `validation` lie benchmarks beside those of `eval`.

The folder is made once for each version of the world and lies in the user's cache (60 MB, seconds). In
"mini_llava_blind" all pictures are grey: what questions alone give away.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dora_lab.mini import llava
from dora_lab.tasks.written import SEAL, version_of, written

SOURCES = {"mini_llava": False, "mini_llava_blind": True}  # name: blind
OURS, THEIRS = ("__init__", "views", "talk", "corpus", "draw", "families"), ("scenes", "questions", "families")


def folder(name: str) -> Path:
    """The folder of a source, written if it is not there whole (`written`)."""
    return written(name, _version(), lambda new: llava.write(new, blind=SOURCES[name]), megabytes=60)


def sha256(name: str) -> str:
    """The hash of all files of a source, pictures among them."""
    return (folder(name) / SEAL).read_text()


@cache
def _version() -> str:
    """Of all modules that the files are made by."""
    home = Path(llava.__file__).parent
    ours = [home / f"{module}.py" for module in OURS]
    return version_of([*ours, *(home.parent / "vl" / f"{module}.py" for module in THEIRS)])
