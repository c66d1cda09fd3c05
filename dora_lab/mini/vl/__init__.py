"""The embedded default for pictures: scenes, four families about them, their features, and a text base (BART).

A world beside that of `dora_lab.mini`. Like it, it knows nothing of the lab; readers of VL-Adapter's files read what
`write` makes. Nothing here is needed where the real data is.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from dora_lab.mini.vl import families
from dora_lab.mini.vl.cells import SHAPE, add, features, write
from dora_lab.mini.vl.draw import draw
from dora_lab.mini.vl.families import ceiling, floor, items, shown

__all__ = ["SHAPE", "add", "ceiling", "draw", "features", "floor", "folder", "items", "shown", "world_sha256", "write"]


def folder() -> Path:
    """The text base's folder: config, bf16 safetensors, tokenizer, and the record of how it was made."""
    return Path(__file__).parent / "base"


@cache
def world_sha256(tested: str = "test") -> str:
    """SHA-256 of all annotations and of the features of every picture that they name: the identity of the data."""
    digest = hashlib.sha256(json.dumps(families.files(tested), sort_keys=True).encode())
    for name, keys in families.pictures(tested).items():
        for key in keys:
            digest.update(f"\x1f{name}/{key}".encode())
            digest.update(features(shown(name, key), key).tobytes())
    return digest.hexdigest()
