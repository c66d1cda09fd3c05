"""The embedded default: a closed world, eight commonsense task families about it, a tokenizer and a pretrained base.

Two sources ask about the same world: `mini`, frozen with every record made from it, and `mini2`, which is harder.

It knows nothing of the lab; `tasks` and `models` use it as one source of items and of bases among others.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from dora_lab.mini.families import FAMILIES
from dora_lab.mini.worlds import WORLDS, items

__all__ = ["FAMILIES", "WORLDS", "folder", "items", "world_sha256"]


def folder() -> Path:
    """The base model's folder: config, bf16 safetensors, tokenizer, and the record of how it was made."""
    return Path(__file__).parent / "base"


@cache
def world_sha256(source: str = "mini") -> str:
    """SHA-256 of all items of all families and splits of a source: the identity of embedded data."""
    digest = hashlib.sha256()
    for task in WORLDS[source].FAMILIES:
        for split in ("train", "validation", "test"):
            for item in items(task, split, source):
                said = [item[field] for field in ("instruction", "answer", "fact") if field in item]
                digest.update("\x1f".join((task, split, *said)).encode())
    return digest.hexdigest()
