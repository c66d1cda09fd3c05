"""A saved model as its tensors, read from safetensors files row by row: nothing larger than asked for is in memory.

Single files and sharded ones with their index; every file that is not what it should be is refused in one line that
names it and says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A saved model or adapter that cannot be used: names the file, what is wrong and what to do."""


def refuse_what_is_no_weights(file: Path) -> None:
    """Raise CheckpointError for a file that is missing, a git-LFS pointer or a web page."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    with file.open("rb") as handle:
        head = handle.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file}: a git-LFS pointer, not the weights; fetch them with `git lfs pull`")
    if head[:1] == b"<":
        raise CheckpointError(f"{file}: a web page, not weights; the download went wrong, fetch it again")


class Shards:
    """The tensors of a model folder by name, opened once and mapped into memory.

    Raises CheckpointError for a folder without weights, a broken file, an index that names a missing file or one that
    is outside its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self._where = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as safetensors writes it: "BF16", "F32", "I8", ..."""
        return self._slice(name).get_dtype()

    def rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Some rows of a tensor, in its own type. Raises CheckpointError if they hold a number that is not finite."""
        if self.dtype(name) not in FLOATS:
            raise CheckpointError(
                f"{self._file(name)}: '{name}' is {self.dtype(name)}, not floating point: quantised weights have to be "
                "dequantised first (load the model and save it in a float type)"
            )
        found = self._slice(name)[rows] if self.shape(name) else self._handle(name).get_tensor(name)
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{self._file(name)}: '{name}' holds numbers that are not finite; fetch it again")
        return found

    def _index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if not index.is_file():
            found = [SINGLE] if (self.folder / SINGLE).is_file() else []
            if not found and list(self.folder.glob("pytorch_model*.bin")):
                raise CheckpointError(f"{self.folder}: only pickled weights (.bin), which can run code; convert them")
            if not found:
                raise CheckpointError(f"{self.folder}: neither {SINGLE} nor {INDEX} in it; give the folder of a model")
            return dict.fromkeys(self._keys(SINGLE), SINGLE)
        try:
            table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(key): str(value) for key, value in table.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index}: not an index of shards ({error}); fetch it again") from None
        for file in sorted(set(names.values())):
            if Path(file).name != file or "\0" in file:
                raise CheckpointError(f"{index}: names a file outside its folder: '{file}'")
            there = set(self._keys(file))
            if lost := sorted(name for name, where in names.items() if where == file and name not in there):
                raise CheckpointError(f"{self.folder / file}: '{lost[0]}' should be in it and is not; fetch it again")
        return names

    def _keys(self, file: str) -> list[str]:
        path = self.folder / file
        refuse_what_is_no_weights(path)
        try:
            self._open[file] = safe_open(path, "pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
        return list(self._open[file].keys())

    def _file(self, name: str) -> Path:
        return self.folder / self._where[name]

    def _handle(self, name: str) -> Any:
        return self._open[self._where[name]]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)
