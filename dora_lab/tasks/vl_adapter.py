"""Items about pictures from VL-Adapter's data: "vl_adapter", a folder in one of its layouts or the hub's, and the
embedded worlds of pictures, which are folders in the same layout (see `mini_pictures`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dora_lab.io.errors import LoadError
from dora_lab.io.files import hash_files
from dora_lab.spec import Data
from dora_lab.tasks import family, load_task, mini_pictures
from dora_lab.tasks.annotations import Item
from dora_lab.tasks.features import hub_folder
from dora_lab.tasks.pictures import Key, Pictures, gather_pictures

NAME = "vl_adapter"
NAMES = (NAME, *mini_pictures.SOURCES)
FOLDERS = ("vqa", "GQA", "nlvr", "COCO")  # of annotations


def read(split: str, data: Data, data_dir: Path | None) -> dict[str, list[Item]]:
    """All items of a split by task; "train" of the real data is the published one's where nothing is held out.

    Raises LoadError for a task that is about no pictures and for another folder than `data.sha256` says, ItemError for
    annotations that cannot be used.
    """
    root = _folder(data, data_dir)
    local = data_dir is not None or data.name != NAME
    if local and data.sha256 is not None and (found := hash_annotations(root)) != data.sha256:
        raise LoadError(f"{root}: content hash {found[:12]}..., the spec asks for {data.sha256[:12]}...")
    whole = split == "train" and not data.validation_items and data.name == NAME
    pools, ours = {}, (*family("image_text"), *family("image_text_novel"))
    for task in map(load_task, data.tasks):
        if task.read is None or task not in ours:
            raise LoadError(f"data.tasks: '{task.name}' is not in source '{NAME}', whose tasks are about pictures")
        if found := task.read(root, "published_train" if whole else split):  # what is only asked has no others
            pools[task.name] = found
    return pools


def pictures(pools: Iterable[Mapping[str, list[Item]]], data: Data, data_dir: Path | None) -> Pictures:
    """The features of every picture that these items show; LoadError for others than `data.features_sha256` says."""
    keys = shown(pools)
    shape = (data.feature_shape[0], data.feature_shape[1])
    return expected(gather_pictures(_folder(data, data_dir), keys, shape, data.visual_tokens), data)


def shown(pools: Iterable[Mapping[str, list[Item]]]) -> set[Key]:
    """Set and id of everything that items show."""
    return {key for pool in pools for items in pool.values() for item in items for key in item["pictures"]}


def expected(found: Pictures, data: Data) -> Pictures:
    """The features, if they are those that `data.features_sha256` says; else LoadError."""
    if data.features_sha256 not in (None, found.sha256):
        raise LoadError(
            f"the features that are read have the hash {found.sha256[:12]}..., data.features_sha256 is "
            f"{data.features_sha256:.12}...; give the folder that it is of"
        )
    return found


def identity(data: Data, data_dir: Path | None) -> dict[str, Any]:
    """What identifies the annotations as they are on this machine now (features: `Pictures.sha256`)."""
    if data.name == NAME and data_dir is None:
        return {"revision": data.revision, "sha256": None}  # a hub commit is its own hash
    return {"revision": None, "sha256": hash_annotations(_folder(data, data_dir))}


def hash_annotations(root: Path) -> str:
    """SHA-256 (64 hex digits) of the annotation files of a folder: their names and contents."""
    found = {
        f"{name}/{file.name}": file
        for below in (Path(root), Path(root) / "annotations")
        for name in FOLDERS
        for file in sorted((below / name).glob("*.json"))
    }
    if not found:
        raise LoadError(f"{root}: no annotations ({'/*.json, '.join(FOLDERS)}/*.json); give VL-Adapter's datasets")
    return hash_files(found)


def describe(task: str, split: str, items: list[Item]) -> dict[str, Any]:
    """One split for the record, with the fields of `released_files.describe`; what was published is not known here."""
    content = hashlib.sha256()
    for item in items:
        content.update(json.dumps(item, ensure_ascii=True, sort_keys=True).encode("ascii") + b"\n")
    known = dict.fromkeys(("published", "published_verified", "agrees"))
    return {"task": task, "split": split, "items": len(items), "duplicates": 0, "sha256": content.hexdigest(), **known}


def _folder(data: Data, data_dir: Path | None) -> Path:
    if data.name in mini_pictures.SOURCES:
        return mini_pictures.folder(data.name)
    return Path(data_dir) if data_dir is not None else hub_folder(data.revision)
