"""Source "value": VALUE's video-text tasks (Li et al. 2021, arXiv 2106.04632) as VL-Adapter read them. No torch.

A folder as VALUE's release (VALUE-Leaderboard/DataRelease), VL-Adapter's ``datasets`` or the ``video`` in it:
``ann/<task>/<task>_<split>.jsonl``, ``ann/<set>_subtitles.jsonl`` and the features of `tasks.frames`. The labels of its
test items are nobody's but its server's, which is shut: what is scored are its validation items, by tasks whose names
say so ("tvqa_val"); nothing is chosen by them, `data.validation_items` are held out of the training items, and with
them all that ask the same about the same clip. Held-out questions can be scored, captions (an item each) cannot.

The embedded world of clips is a folder in the same layout (see `mini_clips`), whose validation items are of clips of
their own: both tasks can be scored by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dora_lab.io.errors import LoadError
from dora_lab.io.files import hash_files, no_folder
from dora_lab.spec import Data
from dora_lab.tasks import family, load_task, mini_clips
from dora_lab.tasks.annotations import Item
from dora_lab.tasks.pictures import Pictures, gather_clips
from dora_lab.tasks.vl_adapter import describe, expected, shown

__all__ = ["NAME", "NAMES", "apart", "describe", "folder", "hash_annotations", "identity", "pictures", "read"]

NAME = "value"
NAMES = (NAME, *mini_clips.SOURCES)


def read(split: str, data: Data, data_dir: Path | None) -> dict[str, list[Item]]:
    """The items of "train" or "test" (of the embedded world "validation", too) by task, those of tasks that have any.

    Raises LoadError for a task that is not VALUE's and for another folder than `data.sha256` says, ItemError for files
    that cannot be used.
    """
    root = _root(data, data_dir)
    if data.sha256 is not None and (found := hash_annotations(root)) != data.sha256:
        raise LoadError(f"{root}: content hash {found[:12]}..., the spec asks for {data.sha256[:12]}...")
    if split == "validation":  # its files are those of the items that are asked
        root, split = root / split, "test"
    pools = {}
    for task in map(load_task, data.tasks):
        if task.read is None or task not in family("video_text"):
            known = ", ".join(task.name for task in family("video_text"))
            raise LoadError(f"data.tasks: '{task.name}' is not in source '{NAME}', whose tasks are {known}")
        if items := task.read(root, split):
            pools[task.name] = items
    return pools


def apart(learnt: list[Item], held: Iterable[Item]) -> list[Item]:
    """The training items that show and ask nothing that is held out: captions of a clip are items of their own."""
    asked = {(item["pictures"], item["text"]) for item in held}
    return [item for item in learnt if (item["pictures"], item["text"]) not in asked]


def pictures(pools: Iterable[Mapping[str, list[Item]]], data: Data, data_dir: Path | None) -> Pictures:
    """The features of every clip that these items show; LoadError for others than `data.features_sha256` says."""
    shape = (data.feature_shape[0], data.feature_shape[1])
    return expected(gather_clips(_root(data, data_dir), shown(pools), shape), data)


def identity(data: Data, data_dir: Path | None) -> dict[str, Any]:
    """What identifies annotations and subtitles as they are on this machine now (features: `Pictures.sha256`)."""
    return {"revision": None, "sha256": hash_annotations(_root(data, data_dir))}


def hash_annotations(root: Path) -> str:
    """SHA-256 (64 hex digits) of the files of annotations and subtitles of a folder: their names and contents."""
    found = {file.relative_to(root).as_posix(): file for file in sorted((Path(root) / "ann").glob("**/*.jsonl"))}
    if not found:
        raise LoadError(f"{root}: no annotations (ann/**/*.jsonl); give VALUE's release")
    return hash_files(found)


def _root(data: Data, data_dir: Path | None) -> Path:
    return mini_clips.folder(data.name) if data.name in mini_clips.SOURCES else folder(data_dir)


def folder(data_dir: Path | None) -> Path:
    """The folder that holds ``ann`` and ``vis_features``."""
    if data_dir is None:
        raise LoadError(f"data '{NAME}' is a local folder, VALUE's release: give it with --data-dir")
    if not Path(data_dir).is_dir():
        raise LoadError(no_folder(Path(data_dir)))
    below = Path(data_dir) / "video"
    return below if below.is_dir() else Path(data_dir)
