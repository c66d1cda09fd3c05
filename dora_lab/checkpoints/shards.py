"""A saved model as its tensors, read from safetensors files row by row: nothing larger than asked for is in memory.

Single files and sharded ones with their index; every file that is not what it should be is refused in one line that
names it and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dora_lab.files import MAX_HEADER, CheckpointError, header, inside, parse_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


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
        index = inside(self.folder, INDEX, self.folder)
        if not index.is_file():
            found = [SINGLE] if (self.folder / SINGLE).is_file() else []
            if not found and list(self.folder.glob("pytorch_model*.bin")):
                raise CheckpointError(f"{self.folder}: only pickled weights (.bin), which can run code; convert them")
            if not found:
                raise CheckpointError(f"{self.folder}: neither {SINGLE} nor {INDEX} in it; give the folder of a model")
            return dict.fromkeys(self._keys(SINGLE), SINGLE)
        if (size := index.stat().st_size) > MAX_HEADER:
            raise CheckpointError(f"{index}: {size} bytes are no index of shards; fetch it again")
        try:
            table = parse_json(index.read_bytes())["weight_map"]
            names = {str(key): str(value) for key, value in table.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not an index of shards ({error}); fetch it again") from None
        for file in sorted(set(names.values())):
            inside(self.folder, file, index)
            there = set(self._keys(file))
            if lost := sorted(name for name, where in names.items() if where == file and name not in there):
                raise CheckpointError(f"{self.folder / file}: '{lost[0]}' should be in it and is not; fetch it again")
        return names

    def _keys(self, file: str) -> list[str]:
        path = inside(self.folder, file, self.folder)
        header(path)
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
