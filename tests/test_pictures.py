"""Pictures of a run: pooled as torch pools, found by set and id, hashed, and one line where they cannot be had."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictured import SHAPE, TASKS, coco, features_of, save_pictures

from dora_lab.io.errors import LoadError
from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Spec
from dora_lab.tasks import sources
from dora_lab.tasks.pictures import gather_pictures, pooled


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("data"))


def spec(**changes: Any) -> Spec:
    return Spec(
        experiment="tiny", tier="mini", seed=0, model=Model(name="tiny", family="vl_bart"),
        data=Data(name="vl_adapter", tasks=TASKS, feature_shape=SHAPE, **changes),
        method=Method(name="ft"),
        optim=Optim(learning_rate=1e-3, warmup_steps=0, batch_size=4, micro_batch_size=4, epochs=1.0,
                    task_batch_sizes=tuple(f"{task}=4" for task in TASKS)),
        probe=None, evaluation=Evaluation(),
    )  # fmt: skip


@pytest.mark.parametrize(("grid", "side"), [(7, 6), (7, 7), (7, 3), (5, 2), (6, 4), (1, 1)])
def test_pooling_is_torchs(grid: int, side: int) -> None:
    found_RF = np.random.default_rng(0).standard_normal((grid * grid, 5)).astype(np.float16)
    cells = torch.from_numpy(found_RF.astype(np.float32)).view(grid, grid, 5).permute(2, 0, 1)
    theirs = torch.nn.AdaptiveMaxPool2d(side)(cells).flatten(1).T.numpy()
    assert np.array_equal(pooled(found_RF, side), theirs)


def test_pooling_needs_a_square() -> None:
    for regions, side in ((48, 6), (49, 8)):
        with pytest.raises(LoadError, match=rf"data\.visual_tokens = {side * side}: {regions} regions are no square"):
            pooled(np.zeros((regions, 5), np.float16), side)


def test_pictures_are_found_by_set_and_id(root: Path) -> None:
    keys = [("VG", "train-00003"), ("COCO", coco("test", 5)), ("VG", "train-00001"), ("COCO", coco("val", 0))]
    found = gather_pictures(root, keys, SHAPE)
    for key in keys:
        assert np.array_equal(found.of([key])[0], features_of(key[1]))
    assert np.array_equal(found.of(keys[:2]), np.stack([features_of(key) for _, key in keys[:2]]))
    less = gather_pictures(root, keys[::-1], SHAPE, 4)
    assert less.of(keys).shape == (4, 4, SHAPE[1])
    assert np.array_equal(less.of(keys[:1])[0], pooled(features_of("train-00003"), 2))
    assert less.sha256 == found.sha256 != gather_pictures(root, keys[:3], SHAPE).sha256


def test_a_spec_says_which_items_and_pictures(root: Path) -> None:
    items = sources.items(spec(), root)
    assert items.counts() == {
        "train": {"vqa": 16, "gqa": 16, "nlvr2": 8, "coco_caption": 32},
        "validation": {},
        "test": {"vqa": 8, "gqa": 8, "nlvr2": 8, "coco_caption": 8},
    }
    assert items.pictures is not None and len(items.pictures.places) == 16 + 8 + 16 + 8 + 12 + 12
    for pool in (items.train, items.test):
        for item in (item for found in pool.values() for item in found):
            assert items.pictures.of(item["pictures"]).shape == (len(item["pictures"]), *SHAPE)
    told = {(source["task"], source["split"]): source for source in items.sources}
    assert told["gqa", "train"] | {"sha256": ""} == {
        "task": "gqa", "split": "train", "items": 16, "duplicates": 0, "used": 16, "sha256": "",
        "published": None, "published_verified": None, "agrees": None,
    }  # fmt: skip
    assert told["vqa", "test"]["asked_in_training"] == 0
    held = sources.items(spec(validation_items=8, train_items=20, test_items=3), root).counts()
    assert held["train"] == {"vqa": 5, "gqa": 5, "nlvr2": 5, "coco_caption": 5}
    assert held["validation"] == {"vqa": 2, "gqa": 2, "nlvr2": 2, "coco_caption": 2} and held["test"]["gqa"] == 3
    assert len(sources.items(spec(validation_items=8), root).train["gqa"]) == 8  # not what is validated on


def test_identity_is_that_of_the_annotations(root: Path, tmp_path: Path) -> None:
    data = spec().data
    first = sources.data_identity(data, data.name, root)
    assert len(first["sha256"]) == 64
    other = save_pictures(tmp_path)
    assert sources.data_identity(data, data.name, other) == first
    (other / "GQA" / "valid.json").write_text("[]")
    assert sources.data_identity(data, data.name, other) != first
    hub = sources.data_identity(spec(revision="a" * 40).data, data.name, None)
    assert hub == {"revision": "a" * 40, "sha256": None}


def test_what_cannot_be_had_is_said_in_one_line(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, folder, words in (
        ({"sha256": "b" * 64}, root, "the spec asks for bbbbbbbbbbbb"),
        ({"features_sha256": "c" * 64}, root, r"have the hash .*, data\.features_sha256 is cccccccccccc"),
        ({}, None, "revision None is no commit"),
    ):
        with pytest.raises(LoadError, match=words) as caught:
            sources.items(spec(**changes), folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(LoadError, match=r"no annotations \(vqa/\*\.json, "):
        sources.data_identity(spec().data, "vl_adapter", tmp_path)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 0, 1000))
    with pytest.raises(LoadError, match=r"features of 2 pictures take 0\.0 GB.*set TMPDIR"):
        gather_pictures(root, [("VG", "train-00003"), ("VG", "train-00001"), ("VG", "train-00001")], (900, 5))
