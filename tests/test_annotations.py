"""Annotations of the four tasks about pictures: what is read of them, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictured import TASKS, annotations, coco, save_pictures

from dora_lab.metrics import score
from dora_lab.tasks import ItemError, load_task
from dora_lab.tasks.features import SETS, gather


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("data"))


def read(root: Path, task: str, split: str) -> list[dict[str, Any]]:
    reader = load_task(task).read
    assert reader is not None
    return reader(root, split)


def test_numbers_of_items(root: Path) -> None:
    counts = {task: [len(read(root, task, split)) for split in ("published_train", "train", "validation", "test")]
              for task in TASKS}  # fmt: skip
    assert counts == {
        "vqa": [16, 16, 6, 8],  # restval belongs to the training items
        "gqa": [16, 8, 8, 8],  # as released, "valid" is trained on
        "nlvr2": [8, 8, 8, 8],
        "coco_caption": [32, 32, 6, 8],  # one a caption, one a picture
    }


def test_what_an_item_is(root: Path) -> None:
    (first, *_, last) = read(root, "vqa", "test")
    assert first["pictures"] == (("COCO", coco("test", 0)),) and first["text"] == "what colour?"
    assert first["targets"] == {"red": 1.0, "dark red": 0.3} and first["best"] == ["red"]
    assert first["answers"] == ["red"] * 8 + ["dark red"] * 2
    assert last["targets"] == {} and last["best"] == ["blue"]  # what most people said
    assert "answers" not in read(root, "vqa", "train")[0]
    gqa = read(root, "gqa", "test")[1]
    assert (gqa["pictures"], gqa["answer"], gqa["best"]) == ((("GQA", "testdev-00001"),), "no", ["no"])
    assert read(root, "gqa", "train")[0]["pictures"] == (("VG", "train-00000"),)
    one, two = read(root, "nlvr2", "test")[2:4]
    assert one["pictures"] == (("nlvr", "test-img0-00002"), ("nlvr", "test-img1-00002"))
    assert one["statement"] == two["statement"] == "test-1-0" and one["id"] != two["id"]
    assert one["targets"] == {"true": 1.0}
    caption = read(root, "coco_caption", "train")[1]
    assert (caption["id"], caption["targets"]) == (f"{coco('train', 0)}#1", {"a red ring here.": 1.0})
    described = read(root, "coco_caption", "test")[0]
    assert described["references"] == ["a red thing here.", "a red ring here."] and described["targets"] == {}


@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_take_the_items_as_they_are_read(task: str, root: Path) -> None:
    items = read(root, task, "test")
    for metric in load_task(task).metrics:
        said = {
            item["id"]: {"true": 1.0, "false": 0.0} if metric == "nlvr2" else (item["best"] or [""])[0]
            for item in items
        }
        found = score(metric, items, said, "here")
        mean = sum(found.values) / len(found.values)
        assert mean == {"nlvr2": 0.5}.get(metric, 1.0) or (metric == "cider_d" and mean > 5)


def test_every_picture_has_features(root: Path) -> None:
    wanted = {pair for task in TASKS for split in ("train", "validation", "test")
              for item in read(root, task, split) for pair in item["pictures"]}  # fmt: skip
    for name in SETS:
        ids = {key for where, key in wanted if where == name}
        assert {key for key, _ in gather(root, name, ids, (9, 5))} == ids != set()


def test_files_below_annotations_are_found(root: Path, tmp_path: Path) -> None:
    for name, rows in annotations({name: [] for name in SETS}).items():
        file = tmp_path / "annotations" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    for task in TASKS:
        assert read(tmp_path, task, "test") == read(root, task, "test")


def changed(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        rows = json.loads((root / file).read_text())
        (root / file).write_text(json.dumps(change(rows) or rows))

    return harm


def put(place: int, field: str, value: Any) -> Callable[[Any], None]:
    return lambda rows: rows[place].__setitem__(field, value)


BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no file": ("nlvr2", lambda r: (r / "nlvr/test.json").unlink(), r"nlvr/test\.json does not exist .*data\.tasks"),
    "cut short": (
        "gqa",
        lambda r: (r / "GQA/testdev.json").write_text((r / "GQA/testdev.json").read_text()[:200]),
        r"GQA/testdev\.json: broken or truncated JSON at line 1, column",
    ),
    "no list": ("gqa", changed("GQA/testdev.json", lambda rows: {"a": rows}), "testdev.json: expected a list of obj"),
    "no images": (
        "coco_caption",
        changed("COCO/dataset_coco.json", lambda rows: {"image": rows["images"]}),
        r"dataset_coco\.json: expected an object whose 'images' is a list",
    ),
    "a field is missing": (
        "gqa",
        changed("GQA/testdev.json", lambda rows: rows[3].pop("sent") and None),
        r"testdev\.json, item 3, field 'sent': expected a text, it is missing",
    ),
    "two answers": (
        "gqa",
        changed("GQA/testdev.json", put(2, "label", {"a": 1.0, "b": 0.5})),
        r"testdev\.json, item 2, field 'label': expected one answer",
    ),
    "a score out of range": (
        "vqa",
        changed("vqa/karpathy_test.json", put(2, "label", {"a": 1.5})),
        r"karpathy_test\.json, item 2, field 'label': expected answers with scores in \[0, 1\], got",
    ),
    "an answer with no score": (
        "vqa",
        changed("vqa/karpathy_test.json", put(2, "label", {"a": None})),
        r"item 2, field 'label': expected answers with scores",
    ),
    "half a character": ("vqa", changed("vqa/karpathy_test.json", put(1, "sent", "\ud800")), "item 1, field 'sent'"),
    "an id twice": (
        "vqa",
        changed("vqa/karpathy_test.json", lambda rows: rows.append(rows[0])),
        r"karpathy_test\.json, item 8: its id '\d+' is that of .*karpathy_test\.json, item 0; remove one",
    ),
    "no annotation": (
        "vqa",
        changed("vqa/v2_mscoco_val2014_annotations.json", lambda rows: rows["annotations"].pop() and None),
        r"karpathy_test\.json, item 7: its question is in none of vqa/v2_mscoco_val2014_annotations\.json, vqa/v2_m",
    ),
    "a label": ("nlvr2", changed("nlvr/test.json", put(0, "label", 2)), r"item 0, field 'label': expected 0 or 1, got"),
    "an identifier": ("nlvr2", changed("nlvr/test.json", put(0, "identifier", "a-b")), "expected four parts"),
    "a split": (
        "coco_caption",
        changed("COCO/dataset_coco.json", lambda rows: put(5, "split", "x")(rows["images"])),
        r"dataset_coco\.json, item 5, field 'split': expected one of train, restval, val, test, got 'x'",
    ),
    "no sentences": (
        "coco_caption",
        changed("COCO/dataset_coco.json", lambda rows: put(-1, "sentences", [])(rows["images"])),
        r"item 29, field 'sentences': expected a list of objects",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_said_in_one_line(kind: str, tmp_path: Path) -> None:
    save_pictures(tmp_path)
    task, harm, words = BROKEN[kind]
    harm(tmp_path)
    with pytest.raises(ItemError, match=words) as caught:
        read(tmp_path, task, "test")
    assert "\n" not in str(caught.value)
