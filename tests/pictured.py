"""A folder in VL-Adapter's layout, made of nothing: annotations of a few pictures, features that say their colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dora_lab.tasks.features import VARIANT

COLOURS = ("red", "blue", "green")
TASKS = ("vqa", "gqa", "nlvr2", "coco_caption")
SHAPE = (9, 5)  # a 3 x 3 grid
SPLITS = {"train": 12, "restval": 4, "val": 6, "test": 8}  # pictures


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def coco(part: str, number: int) -> str:
    return f"COCO_{'train' if part == 'train' else 'val'}2014_{[*SPLITS].index(part)}{number:05}"


def features_of(key: str) -> np.ndarray:
    """(regions, width) of a picture: its colour in the first numbers, noise in the others."""
    found = np.random.default_rng(list(key.encode())).standard_normal(SHAPE)
    found[:, :3] = 4.0 * (np.arange(3) == int(key[-5:]) % 3)
    return found.astype(np.float16)


def save_pictures(root: Path, text: bool = True) -> Path:
    """The folder: features of all sets as the hub has them, and the files of the four tasks."""
    keys: dict[str, list[str]] = {"COCO": [], "VG": [], "GQA": [], "nlvr": []}
    for name, rows in annotations(keys).items():
        if text:
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows), encoding="utf-8")
    for name, ids in keys.items():
        file = root / "features" / name / VARIANT / "part-00000.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        ids = sorted({*ids})
        flat = pa.array(np.concatenate([features_of(key).ravel() for key in ids]), pa.float16())
        cells = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, SHAPE[1]), SHAPE[0])
        pq.write_table(pa.table({"id": pa.array(ids), "features": cells}), file)
    return root


def annotations(keys: dict[str, list[str]]) -> dict[str, Any]:
    """The files by name; every picture that they name is added to its set in `keys`."""

    def seen(name: str, key: str) -> str:
        keys[name].append(key)
        return key

    files: dict[str, Any] = {}
    answers: dict[str, list[Any]] = {"train": [], "val": []}
    for split, parts in (("train", ("train", "restval")), ("val", ("val",)), ("test", ("test",))):
        rows = files[f"vqa/karpathy_{split}.json"] = []
        for part in parts:
            for number in range(SPLITS[part]):
                key, question = seen("COCO", coco(part, number)), len(rows) + 1000 * len(files)
                others = {"red": "dark red"}.get(colour(number), "grey")
                label = {colour(number): 1, others: 0.3}
                rows.append({"question_id": question, "img_id": key, "sent": "what colour?", "label": label})
                said = [colour(number)] * 8 + [others] * 2
                answers["val" if "val2014" in key else "train"].append(
                    {"question_id": question, "answers": [{"answer": text} for text in said]}
                )
        rows[-1]["label"] = {}  # nothing that is often said
    for part, rows in answers.items():
        files[f"vqa/v2_mscoco_{part}2014_annotations.json"] = {"info": {}, "annotations": rows}
    for split, name in (("train", "VG"), ("valid", "VG"), ("testdev", "GQA")):
        files[f"GQA/{split}.json"] = [
            {"question_id": f"{split}{number}", "img_id": seen(name, f"{split}-{number:05}"), "sent": "is it red?"}
            | {"label": {"yes" if colour(number) == "red" else "no": 1.0}}
            for number in range(8)
        ]
    for split in ("train", "valid", "test"):
        files[f"nlvr/{split}.json"] = [
            {
                "identifier": f"{split}-{number // 2}-{number % 2}-0",
                "uid": f"nlvr2_{split}_{number}",
                "img0": seen("nlvr", f"{split}-img0-{number:05}"),
                "img1": seen("nlvr", f"{split}-img1-{number % 4:05}"),
                "sent": "both have one colour",
                "label": int(colour(number) == colour(number % 4)),
            }
            for number in range(8)
        ]
    files["COCO/dataset_coco.json"] = {
        "images": [
            {"filename": f"{seen('COCO', coco(part, number))}.jpg", "split": part}
            | {"sentences": [{"raw": f" a {colour(number)} {thing} here. "} for thing in ("thing", "ring")]}
            for part, count in SPLITS.items()
            for number in range(count)
        ]
    }
    return files
