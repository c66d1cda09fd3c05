"""The embedded default: a closed world, its eight commonsense task families, its tokenizer and its pretrained base.

It knows nothing of the lab; `tasks` and `models` use it as one source of items and of bases among others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dora_lab.mini.families import FAMILIES, items

__all__ = ["FAMILIES", "folder", "items", "world_sha256"]


def folder() -> Path:
    """The base model's folder: config, bf16 safetensors, tokenizer, and the record of how it was made."""
    return Path(__file__).parent / "base"


def world_sha256() -> str:
    """SHA-256 of all items of all families and splits: the identity of the embedded data."""
    digest = hashlib.sha256()
    for task in FAMILIES:
        for split in ("train", "validation", "test"):
            for item in items(task, split):
                digest.update("\x1f".join((task, split, item["instruction"], item["answer"])).encode())
    return digest.hexdigest()
