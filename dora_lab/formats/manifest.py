"""The manifest that ties an adapter to its base: ``dora_lab.json``, written last, so a folder with one is whole.

It holds the fingerprint of the base, that of every adapted matrix, the hash of every file, and the versions that wrote
them. Files of other tools have none: their base is then not checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import verify

MANIFEST = "dora_lab.json"
SAMPLES = 4096  # numbers of each tensor that take part in a fingerprint


def fingerprint(tensors: Iterable[tuple[str, Tensor]], through: torch.dtype = torch.float32) -> str:
    """SHA-256 (64 hex digits) over the names, shapes and samples of tensors, whether loaded wide or in bfloat16.

    through: a type that the samples are rounded to first: what a float32 base gives through float16 is what it gives
    when it is loaded in float16, which by rounding twice is another than its own.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda one: one[0]):
        _add(whole, f"{name} {tuple(tensor.shape)}", iter([tensor]), tensor.numel(), through)
    return whole.hexdigest()


def digest(shape: tuple[int, ...], blocks: Iterator[Tensor]) -> str:
    """SHA-256 of one tensor given as blocks of its rows, in order: of its shape and samples."""
    whole, count = hashlib.sha256(), 1
    for size in shape:
        count *= size
    _add(whole, f"{tuple(shape)}", blocks, count)
    return whole.hexdigest()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of an adapter's folder (or of the folder of its file), its files verified; None if it has none.

    Raises CheckpointError for one that is none, names a file outside its folder, or whose files have changed since.
    """
    file = (path if path.is_dir() else path.parent) / MANIFEST
    if not file.is_file():
        return None
    manifest = verify(file)
    try:
        base = dict(manifest["base"])
        tensors = dict(base.get("tensors") or {})
        if not all(isinstance(text, str) for text in (*tensors.values(), base["fingerprint"])):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file}: names no base; save the adapter again, or delete it to go unchecked") from None
    return {**manifest, "base": {**base, "tensors": tensors}}


def _add(whole: Any, title: str, blocks: Iterator[Tensor], count: int, through: torch.dtype = torch.float32) -> None:
    """Up to 4,096 evenly spaced numbers, rounded to bfloat16."""
    whole.update(f"{title}\n".encode())
    step, taken, place = max(1, count // SAMPLES), 0, 0
    for block in blocks:
        flat = block.detach().reshape(-1)
        some = flat[-place % step :: step][: SAMPLES - taken].to("cpu", through).to(torch.bfloat16)
        whole.update(some.contiguous().view(torch.uint8).numpy().tobytes())
        taken, place = taken + some.numel(), place + flat.numel()
