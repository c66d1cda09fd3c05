"""Features of pictures in the hub's layout and the released one: read by id to the bit; one line for what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from dora_lab.io.errors import LoadError
from dora_lab.tasks import features
from dora_lab.tasks.features import VARIANT, gather, hub_folder

SHAPE = (4, 6)
IDS = [f"COCO_train2014_{number:012}" for number in range(150)]


def numbers_of(key: str) -> np.ndarray:
    return np.random.default_rng(int(key[-12:])).standard_normal(SHAPE).astype(np.float16)


def table(ids: list[str], rows: Any = None, width: int = SHAPE[1]) -> pa.Table:
    flat = pa.array(np.concatenate([numbers_of(key).ravel() for key in ids]) if rows is None else rows, pa.float16())
    cells = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, width), SHAPE[0])
    return pa.table({"id": pa.array(ids), "features": cells})


def hub(root: Path) -> Path:
    """Three shards as the authors' converter writes them: one row group each, zstd."""
    folder = root / "features" / "COCO" / VARIANT
    folder.mkdir(parents=True)
    for part in range(3):
        some = table(IDS[50 * part : 50 * (part + 1)])
        pq.write_table(some, folder / f"part-{part:05d}.parquet", compression="zstd", compression_level=9)
    return root


def archive(root: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    folder = root / "COCO" / "clip_features" / VARIANT
    folder.mkdir(parents=True)
    for key in IDS[:5]:
        with h5py.File(folder / f"{key}.h5", "w") as file:
            file.create_group(key).create_dataset("features", data=numbers_of(key), dtype="float16")
    return root


@pytest.mark.parametrize("layout", [hub, archive])
def test_features_are_read_by_id_to_the_bit(
    layout: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "ROWS", 16)  # several batches a shard
    asked = [IDS[4], IDS[0], IDS[3], IDS[4]] + ([IDS[149], IDS[98], IDS[50], IDS[49]] if layout is hub else [])
    found = list(gather(layout(tmp_path), "COCO", asked, SHAPE))
    assert [key for key, _ in found] == sorted(set(asked))  # here the order of the files is that of the names
    for key, numbers in found:
        assert numbers.dtype == np.float16 and np.array_equal(numbers, numbers_of(key)), key


def test_a_shard_is_decoded_once_and_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = hub(tmp_path), []
    rows = features._rows
    monkeypatch.setattr(features, "_rows", lambda shard, *rest: seen.append(shard.name) or rows(shard, *rest))
    assert len(list(gather(root, "COCO", [IDS[3], IDS[120], IDS[1]], SHAPE))) == 3
    assert seen == ["part-00000.parquet", "part-00002.parquet"]


def test_what_is_not_there_is_said_before_anything_is_read(tmp_path: Path) -> None:
    root = hub(tmp_path)
    with pytest.raises(LoadError, match=rf"{VARIANT}: 2 of the pictures asked for are not there, the first is 'COCO_t"):
        gather(root, "COCO", [IDS[0], "COCO_test", "VG_1"], SHAPE)
    with pytest.raises(LoadError, match=r"neither features/VG/.*parquet \(the hub's layout\) nor VG/clip_features"):
        gather(root, "VG", [IDS[0]], SHAPE)
    with pytest.raises(LoadError, match="revision None is no commit"):
        hub_folder(None)


def test_the_hubs_folder_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "a" * 40
    hub(tmp_path / "datasets--ylsung--VL-Adapter-datasets" / "snapshots" / commit)
    (found,) = gather(hub_folder(commit), "COCO", [IDS[7]], SHAPE)
    assert found[0] == IDS[7] and np.array_equal(found[1], numbers_of(IDS[7]))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "part-00001.parquet: not a whole parquet file"),
    "damaged": (
        lambda f: f.write_bytes(f.read_bytes()[:300] + b"\xff" * 2000 + f.read_bytes()[2300:]),
        "part-00001.parquet: not a whole parquet file",
    ),
    "another width": (
        lambda f: pq.write_table(table(IDS[50:60], np.zeros(10 * 4 * 5, np.float16), width=5), f),
        "part-00001.parquet: expected the columns id: string and features: fixed_size_list.*found id: string, features",
    ),
    "no ids": (lambda f: pq.write_table(pa.table({"name": ["a"]}), f), "part-00001.parquet: expected the columns id"),
    "an id twice": (
        lambda f: pq.write_table(table([*IDS[50:60], IDS[3]]), f),
        r"part-00001.parquet: 'COCO_train2014_000000000003' is in part-00000.parquet already",
    ),
    "not finite": (
        lambda f: pq.write_table(table(IDS[50:52], np.full(2 * 24, np.inf, np.float16)), f),
        r"part-00001.parquet: the features of 'COCO_train2014_000000000050' hold numbers that are not finite",
    ),
    "a number missing": (
        lambda f: pq.write_table(table(IDS[50:52], pa.array([None] + [1.0] * 47, pa.float16())), f),
        r"part-00001.parquet: the features of 'COCO_train2014_000000000050' are missing",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_shard_is_named(what: str, tmp_path: Path) -> None:
    root = hub(tmp_path)
    change, words = BROKEN[what]
    change(root / "features" / "COCO" / VARIANT / "part-00001.parquet")
    with pytest.raises(LoadError, match=words) as caught:
        list(gather(root, "COCO", [IDS[3], IDS[50]], SHAPE))
    assert "\n" not in str(caught.value)


def test_a_broken_file_of_the_archive_is_named(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    root = archive(tmp_path)
    folder = root / "COCO" / "clip_features" / VARIANT

    def refused(words: str, key: str = IDS[2]) -> None:
        with pytest.raises(LoadError, match=words) as caught:
            list(gather(root, "COCO", [IDS[0], key], SHAPE))
        assert "\n" not in str(caught.value)

    refused("1 of the pictures asked for are not there, the first is 'x'", "x")
    refused("names a file outside its folder", "../x")
    with h5py.File(folder / f"{IDS[2]}.h5", "w") as file:
        file.create_group("other")
    refused(rf"{IDS[2]}.h5: '{IDS[2]}/features' cannot be read")
    with h5py.File(folder / f"{IDS[2]}.h5", "w") as file:
        file[f"{IDS[2]}/features"] = np.zeros((5, 6), np.float16)
    refused(r"the features of .* are \(5, 6\) in float16, expected \(4, 6\) in float16")
    (folder / f"{IDS[2]}.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 90)
    refused("cannot be read")
    (folder / f"{IDS[2]}.h5").write_bytes(b"")
    refused("cannot be read")


def test_without_h5py_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "COCO" / "clip_features" / VARIANT).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(LoadError, match=r"pip install 'dora-lab\[vision\]'"):
        gather(tmp_path, "COCO", [IDS[0]], SHAPE)
