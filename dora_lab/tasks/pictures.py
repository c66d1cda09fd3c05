"""The features of all pictures or clips that a run needs, by set and id: read once, kept in a mapped file. No torch.

Of several processes the first one reads, the others map its file.

Shape suffixes: N pictures, R regions, F numbers of a region.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dora_lab import distributed
from dora_lab.io.errors import LoadError
from dora_lab.tasks import frames
from dora_lab.tasks.features import gather

if TYPE_CHECKING:
    import numpy as np

Key = tuple[str, str]  # set, id


@dataclass(frozen=True)
class Pictures:
    """Features in float16 (of clips in float32), and the hash of what was read.

    It is over set, id and numbers of every picture, by name, before they are brought to a number of regions.
    """

    features_NRF: np.ndarray
    places: dict[Key, int]
    sha256: str
    real: tuple[int, ...] = ()  # by place, how many of the regions are no padding; (): all are

    def of(self, keys: Collection[Key]) -> np.ndarray:
        """(pictures, regions, width) of one item's pictures, in their order."""
        return self.features_NRF[[self.places[key] for key in keys]]

    def padded(self, keys: Collection[Key]) -> np.ndarray:
        """(pictures, regions), true where a region of one item's pictures is padding."""
        import numpy as np

        regions = self.features_NRF.shape[1]
        real = [self.real[self.places[key]] if self.real else regions for key in keys]
        return np.arange(regions) >= np.array(real)[:, None]


def gather_pictures(root: Path, keys: Collection[Key], shape: tuple[int, int], tokens: int | None = None) -> Pictures:
    """The features (regions, width) of pictures in a folder of `features`, with `tokens` regions each where given.

    They go to a temporary file (in TMPDIR), 147 kB a picture at 36 x 2048: what does not fit into memory is read again
    from there. Raises LoadError as `gather` does, and where there is no room for them. Under torchrun all processes
    call it; one on another machine than the first, or with another TMPDIR, reads for itself.
    """
    side = None if tokens is None else math.isqrt(tokens)
    return _shared(
        _Plan(
            what="pictures",
            keys={*keys},
            size=(len({*keys}), tokens or shape[0], shape[1]),
            dtype="float16",
            read=lambda name, ids: gather(root, name, ids, shape),
            fit=lambda found_RF: found_RF if side is None else pooled(found_RF, side),
        )
    )


def gather_clips(root: Path, keys: Collection[Key], shape: tuple[int, int]) -> Pictures:
    """The features (frames, width) of clips in a folder of `frames`, each brought to that many frames (`resized`).

    As `gather_pictures`, in float32, 131 kB a clip at 64 x 512.
    """
    return _shared(
        _Plan(
            what="clips",
            keys={*keys},
            size=(len({*keys}), *shape),
            dtype="float32",
            read=lambda name, ids: frames.gather(root, name, ids, shape[1]),
            fit=lambda found_NF: frames.resized(found_NF, shape[0]),
        )
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is read, and how it is kept."""

    what: str
    keys: set[Key]
    size: tuple[int, int, int]  # N, R, F
    dtype: str
    read: Callable[[str, Collection[str]], Iterator[tuple[str, np.ndarray]]]  # (set, ids) to features as they lie there
    fit: Callable[[np.ndarray], np.ndarray]  # to (R, F)


def _shared(plan: _Plan) -> Pictures:
    """What the first process reads, in every process."""
    if distributed.size() == 1:
        with tempfile.NamedTemporaryFile() as file:  # stays while it is mapped
            return _gathered(Path(file.name), plan)
    with tempfile.NamedTemporaryFile() as file:
        mine, problem = None, None
        if distributed.first():
            try:
                mine = _gathered(Path(file.name), plan)
            except LoadError as error:
                problem = error
        known = None if mine is None else (mine.places, mine.sha256, mine.real)
        name, known, problem = distributed.share((file.name, known, problem))
        if problem is not None:
            raise problem
        if mine is None and known is not None and Path(name).is_file():
            mine = Pictures(_mapped(Path(name), "r", plan), *known)
        distributed.barrier()  # it is mapped everywhere before its name is gone
        return mine or _gathered(Path(file.name), plan)


def _mapped(file: Path, mode: Literal["r", "w+"], plan: _Plan) -> np.ndarray:
    import numpy as np

    return np.memmap(file, plan.dtype, mode, shape=plan.size)


def _gathered(file: Path, plan: _Plan) -> Pictures:
    """All of them read into the file."""
    import numpy as np

    size, free = np.dtype(plan.dtype).itemsize * math.prod(plan.size), shutil.disk_usage(file.parent).free
    if size > 0.95 * free:
        raise LoadError(
            f"{file.parent}: features of {plan.size[0]:,} {plan.what} take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free; set TMPDIR to a folder with more room, or data.train_items to fewer"
        )
    features_NRF = _mapped(file, "w+", plan)
    places: dict[Key, int] = {}
    real: list[int] = []
    digests: dict[Key, bytes] = {}
    for name in sorted({name for name, _ in plan.keys}):
        for key, found in plan.read(name, {key for where, key in plan.keys if where == name}):
            digests[name, key] = hashlib.sha256(np.ascontiguousarray(found).tobytes()).digest()
            places[name, key] = len(places)
            real.append(min(len(found), plan.size[1]))
            features_NRF[places[name, key]] = plan.fit(found)
    content = hashlib.sha256()
    for name, key in sorted(digests):
        content.update(f"{name}\0{key}\0".encode() + digests[name, key])
    return Pictures(features_NRF, places, content.hexdigest(), tuple(real))


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
