"""Hashes of files that are read, so that a record can say what they were (standard library only)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path


def hash_files(files: Mapping[str, Path]) -> str:
    """SHA-256 (64 hex digits) over names and contents; the names are the keys, so where the files lie is no matter."""
    whole = hashlib.sha256()
    for name, file in files.items():
        state = file.stat()
        whole.update(f"{name}\0{_sha256(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Hash of one file; `size` and `changed` (time of change) only tell the cache when it has to be read again."""
    content = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()
