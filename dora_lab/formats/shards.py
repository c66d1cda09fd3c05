"""A saved model as its tensors, read from safetensors files row by row: nothing larger than asked for is in memory.

Single files and sharded ones with their index; every file that is not what it should be is refused in one line that
names it and says what to do. Files are read, not mapped: pages of a map count as this process's memory, a map of a
model larger than the memory limit fails, and a file that is cut while mapped ends the process.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import (
    INDEX,
    SINGLE,
    header,
    index,
    parse_json,
    refuse_what_is_no_weights,
    sha256,
    weight_files,
)  # fmt: skip

PICKLES = "pytorch_model*.bin"
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Place:
    """Where a tensor is."""

    file: Path
    dtype: str  # as safetensors writes it: "BF16", "F32", "I8", ...
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def width(self) -> int:
        """Numbers of a row: of all dimensions but the first."""
        return math.prod(self.shape[1:])


class Shards:
    """The tensors of a model folder by name; a file is opened when it is first read.

    allow_pickle: read ``pytorch_model*.bin`` where there is no safetensors file (``weights_only``; whole, in memory).

    Raises CheckpointError for a folder without weights, a broken file, an index that names a missing file or one that
    is outside its folder.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.folder = Path(folder)
        self._open: dict[Path, BinaryIO] = {}
        self._raw = torch.empty(0, dtype=torch.uint8)  # bytes of the block read last
        self._whole: dict[str, Tensor] = {}  # of pickles
        self._places: dict[str, Place] = {}
        if not (files := weight_files(self.folder)):
            self._pickles(allow_pickle)
        elif files == [self.folder / SINGLE]:
            self._places = read_header(files[0])
        else:
            self._places = self._of_shards()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Names in natural order: layer 2 before layer 10."""
        return iter(sorted(self._places, key=_natural))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """Type of a tensor as safetensors writes it: "BF16", "F32", "I8", ..."""
        return self._places[name].dtype

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._places[name].file

    def files(self) -> list[Path]:
        """Every file that holds a tensor."""
        return sorted({place.file for place in self._places.values()})

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, in its own type, its memory its own."""
        place = self._places[name]
        return self._read(name, 0, math.prod(place.shape)).clone().view(place.shape)

    def raw(self, name: str, count: int = 2**18) -> Iterator[Tensor]:
        """All numbers of a tensor in its own type, in order, some at a time; each valid until the next is asked for."""
        whole = math.prod(self._places[name].shape)
        for first in range(0, whole, count):
            yield self._read(name, first, min(count, whole - first))

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Read rows of a tensor, each as wide as `out`'s, from `start` on, into `out` (rows, width), in its type."""
        place = self._places[name]
        if place.dtype not in FLOATS:
            raise CheckpointError(
                f"{place.file}: '{name}' is {place.dtype}, not floating point: quantised weights have to be "
                "dequantised first (load the model and save it in a float type)"
            )
        out.copy_(self._read(name, start * out.shape[1], out.numel()).view(out.shape))

    def _read(self, name: str, first: int, count: int) -> Tensor:
        """Some numbers of a tensor, in its own type; valid until the next call."""
        place = self._places[name]
        if name in self._whole:
            return self._whole[name].reshape(-1)[first : first + count]
        dtype = TYPES[place.dtype]
        size = count * dtype.itemsize
        if self._raw.numel() < size:
            self._raw = torch.empty(size, dtype=torch.uint8)
        try:
            if place.file not in self._open:
                self._open[place.file] = place.file.open("rb", buffering=0)
            handle = self._open[place.file]
            handle.seek(place.start + first * dtype.itemsize)
            view, done = self._raw.numpy()[:size], 0
            while done < size and (got := handle.readinto(view[done:])):  # type: ignore[attr-defined]
                done += got
        except OSError as error:
            raise CheckpointError(f"{place.file}: '{name}' cannot be read: {error}") from None
        if done < size:
            raise CheckpointError(f"{place.file}: ends within '{name}'; fetch it again")
        return self._raw[:size].view(dtype)

    def _of_shards(self) -> dict[str, Place]:
        places: dict[str, Place] = {}
        by_file: dict[str, list[str]] = {}
        for name, file in index(self.folder).items():
            by_file.setdefault(file, []).append(name)
        for file, wanted in sorted(by_file.items()):
            try:
                there = read_header(self.folder / file)
            except OSError as error:
                raise CheckpointError(f"{self.folder / file}: cannot be read: {error.strerror}") from None
            if lost := sorted(name for name in wanted if name not in there):
                raise CheckpointError(f"{self.folder / file}: '{lost[0]}' should be in it and is not; fetch it again")
            if twice := sorted(places.keys() & there):
                other = places[twice[0]].file.name
                raise CheckpointError(f"{self.folder / file}: '{twice[0]}' is in {other}, too; save the model again")
            places |= there  # also what the index does not name: transformers reads whole shards
        return places

    def _pickles(self, allowed: bool) -> None:
        found = sorted(self.folder.glob(PICKLES))
        if not found:
            raise CheckpointError(f"{self.folder}: neither {SINGLE} nor {INDEX} in it; give the folder of a model")
        if not allowed:
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({found[0].name}), which can run code when they are read; "
                "convert them to safetensors, or allow it with --allow-pickle"
            )
        for file in found:
            self._whole |= read_pickle(file)
            named = {dtype: name for name, dtype in TYPES.items()}
            for name, tensor in self._whole.items():
                self._places.setdefault(name, Place(file, named.get(tensor.dtype, "?"), tuple(tensor.shape), 0))


def read_header(file: Path) -> dict[str, Place]:
    """Where the tensors of a safetensors file are; CheckpointError unless the file is whole, see `files.header`."""
    described = header(file)
    with file.open("rb") as handle:
        data = 8 + int.from_bytes(handle.read(8), "little")
        table = parse_json(handle.read(data - 8))
    starts = {name: data + table[name]["data_offsets"][0] for name in described}
    return {name: Place(file, dtype, shape, starts[name]) for name, (dtype, shape) in described.items()}


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, without running code (``weights_only``)."""
    refuse_what_is_no_weights(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise CheckpointError(f"{file}: not a file of plain tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{file}: not a table of tensors")
    return {str(name): tensor for name, tensor in loaded.items()}


def refuse_changed(file: Path, digest: str | None = None) -> None:
    """Raise CheckpointError unless the SHA-256 of a file is `digest`, or the name it has in the hub's cache."""
    blob = file.resolve().name
    if digest is None and not re.fullmatch(r"[0-9a-f]{64}", blob):
        raise CheckpointError(f"{file}: cannot be verified: no manifest, nor the hub's cache, says what its hash is")
    if sha256(file) != (digest or blob):
        raise CheckpointError(f"{file}: changed since it was saved (its SHA-256 is another); fetch it again")


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
