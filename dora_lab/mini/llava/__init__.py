"""The embedded default for visual instructions: pictures of scenes and signs, conversations and benchmarks about them
in LLaVA's layout, and a LLaVA of a million parameters whose language model has read prose, never a picture.

A world beside those of `dora_lab.mini` and `dora_lab.mini.vl`, of whose scenes and questions it is made. Like them, it
knows nothing of the lab; readers of LLaVA's files read what `write` makes.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from dora_lab.mini.llava import families
from dora_lab.mini.llava.draw import GROUND, SIDE, pixels
from dora_lab.mini.llava.families import ceiling, floor

__all__ = ["FOLDERS", "ceiling", "floor", "folder", "pixels", "world_sha256", "write"]

FOLDERS = {"train": "", "test": "eval", "validation": "validation"}  # of each split


def folder() -> Path:
    """The base's folder: LLaVA's config, float16 safetensors, tokenizer, and the record of how it was made."""
    return Path(__file__).parent / "base"


def write(root: Path, blind: bool = False) -> None:
    """LLaVA's `playground/data`, with the benchmarks of the test split in `eval`, of validation in `validation`.

    Pictures are portable pixmaps, whatever their names end in: every byte is given by the pixels. blind: all of them
    are ground.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "llava_v1_5_mix665k.json").write_text(json.dumps(families.conversations()))
    for split, below in FOLDERS.items():
        home = root / below
        for name, rows in families.benchmarks(split).items() if below else ():
            file = home / name
            file.parent.mkdir(parents=True, exist_ok=True)
            lined = name.startswith("pope/")
            file.write_text("".join(f"{json.dumps(row)}\n" for row in rows) if lined else json.dumps(rows))
        for name, (seen, key, fault) in families.pictures(split).items():
            file = home / name
            file.parent.mkdir(parents=True, exist_ok=True)
            content = bytes(GROUND) * SIDE**2 if blind else pixels(seen.pieces, key, fault).tobytes()
            file.write_bytes(b"P6 %d %d 255\n" % (SIDE, SIDE) + content)


@cache
def world_sha256() -> str:
    """SHA-256 of all conversations, questions and pictures: the identity of the data."""
    every = [families.conversations(), *(families.benchmarks(split) for split in ("test", "validation"))]
    digest = hashlib.sha256(json.dumps(every, sort_keys=True).encode())
    for split in FOLDERS:
        for name, (seen, key, fault) in families.pictures(split).items():
            digest.update(f"\x1f{name}".encode())
            digest.update(pixels(seen.pieces, key, fault).tobytes())
    return digest.hexdigest()
