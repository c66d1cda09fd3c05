"""Scenes as frozen features, in the layout of VL-Adapter's hosted data (see `dora_lab.tasks.features`, which reads it).

A picture is a grid of 6 x 6 cells. A cell's feature is a fixed random projection of what covers it (colour, shape,
size), of where it is (row, column) and noise of its own; in 64 numbers of float16. All of it is made from SHAKE-128 and
exact sums, so that the files are the same to the bit wherever they are made.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np

from dora_lab.mini.vl import families
from dora_lab.mini.vl.scenes import COLOURS, SHAPES, SIZES, Scene

SIDE, WIDTH = 6, 64  # cells, numbers of one
SHAPE = (SIDE * SIDE, WIDTH)  # regions, width
NOISE = 0.5  # standard deviation; that of a part of the projection is 1
VARIANT = "data_clip_RN101_att"  # the folder's name in the layout


def normal(key: str, rows: int) -> np.ndarray:
    """(rows, WIDTH) near-normal numbers of variance 1, a function of the key: sums of four bytes, in float32."""
    drawn = np.frombuffer(hashlib.shake_128(key.encode()).digest(rows * WIDTH * 4), np.uint8)
    sums = drawn.reshape(rows, WIDTH, 4).sum(2, dtype=np.int32) - 510
    return (sums / np.sqrt(4 * (256**2 - 1) / 12)).astype(np.float32)


@cache
def projection() -> dict[str, np.ndarray]:
    """The part of a feature that each word, row and column stands for, (WIDTH,) each."""
    names = [*COLOURS, *SHAPES, *SIZES, *(f"{axis}{k}" for axis in ("row", "column") for k in range(SIDE))]
    return dict(zip(names, normal("projection", len(names)), strict=True))


def features(things: Scene, key: str) -> np.ndarray:
    """(regions, WIDTH) in float16: what the picture `key` of these things looks like; regions row by row."""
    part = projection()
    grid = np.empty((SIDE, SIDE, WIDTH), np.float32)
    for row in range(SIDE):
        for column in range(SIDE):
            grid[row, column] = part[f"row{row}"] + part[f"column{column}"]
    for thing in things:
        for cell in thing.cells():
            grid[cell] += part[thing.colour] + part[thing.shape] + part[thing.size]
    noise = np.float32(NOISE) * normal(f"noise/{key}", SIDE * SIDE)
    return (grid.reshape(SHAPE) + noise).astype(np.float16)


def write(root: Path, tested: str = "test", blind: bool = False) -> Path:
    """A folder in the hub's layout: annotations, and features of every picture that they name.

    Args:
        tested: whose items the test files hold: "test", or "novel" (see `families`).
        blind: features all zero: what is left is what the questions give away.
    """
    _write_annotations(root, tested)
    for name, keys in families.pictures(tested).items():
        _write_shard(root / "features" / name / VARIANT / "part-00000.parquet", keys, name, blind)
    return root


def add(root: Path, tested: str, blind: bool = False) -> None:
    """To a folder that `write` made: annotations with other tested items, in `root / tested`, and what pictures they
    show beside those that are there, as a second shard of each set."""
    _write_annotations(root / tested, tested)
    there = families.pictures()
    for name, keys in families.pictures(tested).items():
        if new := sorted({*keys} - {*there[name]}):
            _write_shard(root / "features" / name / VARIANT / "part-00001.parquet", new, name, blind)


def _write_annotations(root: Path, tested: str) -> None:
    for name, rows in families.files(tested).items():
        file = root / "annotations" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows), encoding="utf-8")


def _write_shard(file: Path, keys: list[str], name: str, blind: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features_NRF = np.stack([features(families.shown(name, key), key) for key in keys]) * np.float16(not blind)
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = pa.array(features_NRF.ravel())
    regions = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, WIDTH), SHAPE[0])
    pq.write_table(pa.table({"id": pa.array(keys), "features": regions}), file)
