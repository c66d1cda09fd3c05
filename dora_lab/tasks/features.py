"""Frozen features of pictures by id, from VL-Adapter's data as it is hosted or as it was released. Imports no torch.

Two layouts of one set ("COCO", "VG", "GQA", "nlvr"), told apart by what is there:

- the hub's, `ylsung/VL-Adapter-datasets` at a pinned commit: ``features/<set>/data_clip_RN101_att/*.parquet``, columns
  ``id`` and ``features``, a fixed-size list (regions, width) of float16 (VL_adapter, pull request 22);
- the released tree: ``<set>/clip_features/data_clip_RN101_att/<id>.h5`` with the data set ``<id>/features``.

A shard of the hub's is one row group of 4,096 pictures, which can only be decoded from its beginning. Features are
therefore gathered: all that a run needs, in one pass over the shards, in the order of the files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.io.files import inside
from dora_lab.io.hub import snapshot

if TYPE_CHECKING:
    import numpy as np

HUB = "ylsung/VL-Adapter-datasets"
SETS = ("COCO", "VG", "GQA", "nlvr")
VARIANT = "data_clip_RN101_att"  # CLIP RN101, a 7 x 7 grid before its attention pooling
SHAPE = (49, 2048)  # regions, width
ROWS = 64  # decoded at a time


def hub_folder(revision: str | None, sets: Collection[str] = SETS) -> Path:
    """The hub's folder at a commit, from its cache or fetched, with the annotations and the features of some sets."""
    files = ["annotations/*", *(f"features/{name}/{VARIANT}/*.parquet" for name in sets)]
    return snapshot(HUB, revision, "dataset", files, "name it", "give a folder in one of the two layouts")


def gather(
    root: Path, name: str, ids: Collection[str], shape: tuple[int, int] = SHAPE
) -> Iterator[tuple[str, np.ndarray]]:
    """(id, features (regions, width) in float16) of every id that is asked for, once, in the order of the files.

    Raises LoadError, naming file and id: before anything is decoded for an id that is not there, one that is there
    twice and a file that is broken or of another form; when it comes to them for numbers that are missing, not finite
    or of another shape.
    """
    shards = sorted((Path(root) / "features" / name / VARIANT).glob("*.parquet"))
    tree = Path(root) / name / "clip_features" / VARIANT
    if shards:
        found = _from_shards(shards, set(ids), shape)
    elif tree.is_dir():
        found = _from_tree(tree, sorted(set(ids)), shape)
    else:
        raise LoadError(
            f"{root}: neither features/{name}/{VARIANT}/*.parquet (the hub's layout) nor "
            f"{name}/clip_features/{VARIANT} (the released one) is in it; fetch {HUB}, or give the folder that has one"
        )
    return (_checked(*one, shape) for one in found)


def _from_shards(shards: list[Path], ids: set[str], shape: tuple[int, int]) -> Iterator[tuple[Path, str, Any]]:
    places: dict[str, tuple[Path, int]] = {}
    for shard in shards:
        for row, key in enumerate(_ids(shard, shape)):
            if key in ids and key in places:
                raise LoadError(f"{shard}: '{key}' is in {places[key][0].name} already; fetch both again")
            if key in ids:
                places[key] = (shard, row)
    _refuse_missing(ids - places.keys(), shards[0].parent)
    wanted: dict[Path, dict[int, str]] = defaultdict(dict)
    for key, (shard, row) in places.items():
        wanted[shard][row] = key
    return (one for shard in shards if shard in wanted for one in _rows(shard, wanted[shard], shape))


def _ids(shard: Path, shape: tuple[int, int]) -> list[str]:
    """The ids of a shard, whose columns are what they should be; its features are not decoded."""
    import pyarrow as pa

    with _Opened(shard) as file:
        told = {field.name: field.type for field in file.schema_arrow}
        wanted = pa.list_(pa.list_(pa.float16(), shape[1]), shape[0])
        if told.get("id") not in (pa.string(), pa.large_string()) or told.get("features") != wanted:
            columns = ", ".join(f"{name}: {kind}" for name, kind in told.items())
            raise LoadError(f"{shard}: expected the columns id: string and features: {wanted}, found {columns}")
        return file.read(columns=["id"]).column("id").to_pylist()


def _rows(shard: Path, wanted: dict[int, str], shape: tuple[int, int]) -> Iterator[tuple[Path, str, Any]]:
    last = max(wanted)
    with _Opened(shard) as file:
        start = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=["features"]):
            for row in range(batch.num_rows):
                if (key := wanted.get(start + row)) is not None:
                    cell = batch.column("features")[row : row + 1]
                    numbers = cell.flatten().flatten()
                    missing = cell.null_count or cell.flatten().null_count or numbers.null_count
                    yield shard, key, None if missing else numbers.to_numpy(zero_copy_only=False)
            start += batch.num_rows
            if start > last:
                return


class _Opened:
    """A parquet file for a while; whatever goes wrong in it becomes one line."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard

    def __enter__(self) -> Any:
        import pyarrow.parquet as pq

        try:
            self.file = pq.ParquetFile(self.shard)
        except Exception as error:
            raise self._line(error) from None
        return self.file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, LoadError):
            raise self._line(error) from None

    def _line(self, error: Exception) -> LoadError:
        reason = (str(error).splitlines() or [""])[0]
        return LoadError(
            f"{self.shard}: not a whole parquet file ({type(error).__name__}: {reason:.200}); fetch it again"
        )


def _from_tree(tree: Path, ids: list[str], shape: tuple[int, int]) -> Iterator[tuple[Path, str, Any]]:
    try:
        import h5py
    except ImportError:
        raise LoadError(
            f"{tree}: h5 files are read with h5py, which is not here: pip install 'dora-lab[vision]'"
        ) from None
    try:
        files = {key: inside(tree, f"{key}.h5", tree) for key in ids}
    except CheckpointError as error:
        raise LoadError(str(error)) from None
    _refuse_missing({key for key, file in files.items() if not file.is_file()}, tree)

    def read() -> Iterator[tuple[Path, str, Any]]:
        for key, file in files.items():
            try:
                with h5py.File(file, "r") as opened:
                    held: Any = opened[f"{key}/features"]
                    numbers = held[()]
            except (OSError, KeyError, RuntimeError) as error:
                reason = (str(error).splitlines() or [""])[0]
                raise LoadError(f"{file}: '{key}/features' cannot be read ({reason:.200}); restore it again") from None
            yield file, key, numbers

    return read()


def _refuse_missing(missing: set[str], where: Path) -> None:
    if missing:
        raise LoadError(
            f"{where}: {len(missing)} of the pictures asked for are not there, the first is '{min(missing)}'; fetch "
            "the shards that are missing, or give the folder that the annotations belong to"
        )


def _checked(file: Path, key: str, numbers: Any, shape: tuple[int, int]) -> tuple[str, np.ndarray]:
    import numpy as np

    if numbers is None:
        raise LoadError(f"{file}: the features of '{key}' are missing; fetch it again")
    found = np.asarray(numbers)
    if found.dtype != np.float16 or found.size != shape[0] * shape[1] or found.shape not in (shape, (found.size,)):
        raise LoadError(
            f"{file}: the features of '{key}' are {found.shape} in {found.dtype}, expected {shape} in float16"
        )
    if not np.isfinite(found).all():
        raise LoadError(f"{file}: the features of '{key}' hold numbers that are not finite; fetch it again")
    return key, found.reshape(shape)
