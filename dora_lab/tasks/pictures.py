"""The features of all pictures that a run needs, by set and id: read once, kept in a file that is mapped. No torch.

Of several processes the first one reads, the others map its file.

Shape suffixes: N pictures, R regions, F numbers of a region.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dora_lab import distributed
from dora_lab.io.errors import LoadError
from dora_lab.tasks.features import gather

if TYPE_CHECKING:
    import numpy as np

Key = tuple[str, str]  # set, id


@dataclass(frozen=True)
class Pictures:
    """Features in float16, and the hash of what was read (over set, id and numbers of every picture, by name)."""

    features_NRF: np.ndarray
    places: dict[Key, int]
    sha256: str

    def of(self, keys: Collection[Key]) -> np.ndarray:
        """(pictures, regions, width) of one item's pictures, in their order."""
        return self.features_NRF[[self.places[key] for key in keys]]


def gather_pictures(root: Path, keys: Collection[Key], shape: tuple[int, int], tokens: int | None = None) -> Pictures:
    """The features (regions, width) of pictures in a folder of `features`, with `tokens` regions each where given.

    They go to a temporary file (in TMPDIR), 147 kB a picture at 36 x 2048: what does not fit into memory is read again
    from there. Raises LoadError as `gather` does, and where there is no room for them. Under torchrun all processes
    call it; one on another machine than the first, or with another TMPDIR, reads for itself.
    """
    if distributed.size() == 1:
        with tempfile.NamedTemporaryFile() as file:  # stays while it is mapped
            return _gathered(Path(file.name), root, keys, shape, tokens)
    with tempfile.NamedTemporaryFile() as file:
        mine, problem = None, None
        if distributed.first():
            try:
                mine = _gathered(Path(file.name), root, keys, shape, tokens)
            except LoadError as error:
                problem = error
        known = None if mine is None else (mine.places, mine.sha256)
        name, known, problem = distributed.share((file.name, known, problem))
        if problem is not None:
            raise problem
        if mine is None and known is not None and Path(name).is_file():
            mine = Pictures(_mapped(Path(name), "r", _size(keys, shape, tokens)), *known)
        distributed.barrier()  # it is mapped everywhere before its name is gone
        return mine or _gathered(Path(file.name), root, keys, shape, tokens)


def _size(keys: Collection[Key], shape: tuple[int, int], tokens: int | None) -> tuple[int, int, int]:
    return len({*keys}), tokens or shape[0], shape[1]


def _mapped(file: Path, mode: Literal["r", "w+"], size: tuple[int, int, int]) -> np.ndarray:
    import numpy as np

    return np.memmap(file, np.float16, mode, shape=size)


def _gathered(file: Path, root: Path, keys: Collection[Key], shape: tuple[int, int], tokens: int | None) -> Pictures:
    """All of them read into the file."""
    import numpy as np

    side, whole = None if tokens is None else math.isqrt(tokens), _size(keys, shape, tokens)
    size, free = 2 * math.prod(whole), shutil.disk_usage(file.parent).free
    if size > 0.95 * free:
        raise LoadError(
            f"{file.parent}: features of {whole[0]:,} pictures take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free; set TMPDIR to a folder with more room, or data.train_items to fewer"
        )
    features_NRF = _mapped(file, "w+", whole)
    places: dict[Key, int] = {}
    digests: dict[Key, bytes] = {}
    for name in sorted({name for name, _ in keys}):
        for key, found_RF in gather(root, name, {key for where, key in keys if where == name}, shape):
            digests[name, key] = hashlib.sha256(np.ascontiguousarray(found_RF).tobytes()).digest()
            places[name, key] = len(places)
            features_NRF[places[name, key]] = found_RF if side is None else pooled(found_RF, side)
    content = hashlib.sha256()
    for name, key in sorted(digests):
        content.update(f"{name}\0{key}\0".encode() + digests[name, key])
    return Pictures(features_NRF, places, content.hexdigest())


def pooled(features: np.ndarray, side: int) -> np.ndarray:
    """(n x n, F) -> (side x side, F): the largest of each cell of a coarser grid, as torch's AdaptiveMaxPool2d.

    Raises LoadError for regions that are no square grid of at least that side.
    """
    import numpy as np

    regions, width = features.shape
    grid = math.isqrt(regions)
    if grid * grid != regions or side > grid:
        raise LoadError(f"data.visual_tokens = {side * side}: {regions} regions are no square grid of at least that")
    cells = features.reshape(grid, grid, width)
    cuts = [slice(k * grid // side, -(-(k + 1) * grid // side)) for k in range(side)]
    return np.stack([cells[rows, columns].max(axis=(0, 1)) for rows in cuts for columns in cuts])
