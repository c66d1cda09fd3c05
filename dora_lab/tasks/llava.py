"""Source "llava_v1_5": the conversations and benchmarks of LLaVA-1.5, a folder as its ``playground/data``; and sources
that are written here in the same layout (see `mini_llava` and `easy_vqa`). No torch.

In it lie ``llava_v1_5_mix665k.json``, the folders of images that it names, and ``eval/`` (see
`visual_instruction.benchmarks`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dora_lab.io.errors import LoadError
from dora_lab.io.files import hash_files, no_folder
from dora_lab.spec import Data
from dora_lab.tasks import easy_vqa, family, load_task, mini_llava, vl_adapter
from dora_lab.tasks.conversations import Item, read_conversations
from dora_lab.tasks.items import ItemError
from dora_lab.tasks.visual_instruction.benchmarks import FILES, right_answer

NAME = "llava_v1_5"
WRITTEN = {**dict.fromkeys(mini_llava.SOURCES, mini_llava), easy_vqa.NAME: easy_vqa}  # by name, who writes its folder
NAMES = (NAME, *WRITTEN)
MIX = "llava_v1_5_mix665k.json"
Pools = Mapping[str, list[Item]]


def read(split: str, data: Data, data_dir: Path | None) -> dict[str, list[Item]]:
    """All items of a split: the conversations with an image and without ("train"), or the benchmarks by name ("test";
    of sources that are written here "validation", too).

    Raises LoadError without a folder, for a task that is no benchmark of LLaVA's and for another folder than
    `data.sha256` says; ItemError for files that cannot be used.
    """
    root = folder(data, data_dir)
    if data.sha256 is not None and (found := identity(data, data_dir)["sha256"]) != data.sha256:
        raise LoadError(f"{root}: content hash {found[:12]}..., the spec asks for {data.sha256[:12]}...")
    if split == "train":
        return read_conversations(root / MIX, root)
    pools = {}
    for task in map(load_task, data.tasks):
        if task.read is None or task not in family("visual_instruction"):
            raise LoadError(f"data.tasks: '{task.name}' is not in source '{data.name}'; {', '.join(FILES)} are")
        if split == "test":
            pools[task.name] = task.read(benchmarks(root), "test")
        else:  # their loss may be asked for, too
            found = task.read(root / split, "test")
            pools[task.name] = [item | {"turns": [(item["text"], right_answer(item))]} for item in found]
    return pools


def benchmarks(root: Path) -> Path:
    """The folder of the benchmarks."""
    return Path(root) / "eval"


def identity(data: Data, data_dir: Path | None) -> dict[str, Any]:
    """What identifies conversations and questions as they are on this machine now (images: `images`)."""
    if data.name in WRITTEN:
        return {"revision": None, "sha256": WRITTEN[data.name].sha256(data.name)}
    return {"revision": None, "sha256": hash_files_of(folder(data, data_dir))}


def images(pools: Iterable[Pools], root: Path) -> dict[str, Any]:
    """Number, bytes and a hash of the image files that items show, the hash over their names and sizes alone.

    Their contents are hundreds of gigabytes; images that are in a file of questions are of that file's hash. Raises
    ItemError for one that is cut short: a run would meet it after days, and could not go on with a whole one.
    """
    shown = {item["image"]: item["where"] for pool in pools for items in pool.values() for item in items}
    for image, where in shown.items():
        _refuse_cut(image, where)
    sizes = {
        file.relative_to(root).as_posix(): file.stat().st_size for file in shown if isinstance(file, Path)
    }  # fmt: skip
    names = "".join(f"{name}\0{sizes[name]}\n" for name in sorted(sizes))
    return {"files": len(sizes), "bytes": sum(sizes.values()), "sha256": hashlib.sha256(names.encode()).hexdigest()}


ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")  # of a JPEG, of a PNG


def _refuse_cut(image: Path | bytes | None, where: str) -> None:
    """Only a file that does not end as one should is opened: of half a million every other takes one short read."""
    if image is None:
        return
    try:
        with io.BytesIO(image) if isinstance(image, bytes) else image.open("rb") as file:
            file.seek(-min(64, file.seek(0, io.SEEK_END)), io.SEEK_END)
            tail = file.read()
            if any(end in tail for end in ENDS):
                return
            from PIL import Image

            file.seek(0)
            with Image.open(file) as opened:
                opened.load()
    except Exception as error:  # of any kind: every format has its own
        name = "its image" if isinstance(image, bytes) else str(image)
        raise ItemError(
            f"{where}: {name} is no whole image ({type(error).__name__}: {error!s:.200}); fetch it again"
        ) from None


def describe(task: str, split: str, items: list[Item]) -> dict[str, Any]:
    """One split for the record, as `vl_adapter.describe` has it; of an image its name, or the hash of its bytes."""

    def told(image: Path | bytes | None) -> str | None:
        return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image and image.name

    plain = [{**item, "image": told(item["image"]), "where": ""} for item in items]
    return vl_adapter.describe(task, split, plain)


def questions(item: Item) -> list[tuple[str | None, str]]:
    """(file of the image, question) of everything that an item asks."""
    name = item["image"].name if isinstance(item["image"], Path) else None
    return [(name, text) for text in ([item["text"]] if "text" in item else [text for text, _ in item["turns"]])]


def tasks_in(root: Path) -> list[str]:
    """The benchmarks whose files are all in a folder; raises LoadError where there are none."""
    hash_files_of(root)
    found = [name for name, files in FILES.items() if all((benchmarks(root) / file).is_file() for file in files)]
    if not found:
        raise LoadError(
            f"{benchmarks(root)}: the files of none of {', '.join(FILES)} are all there; fetch LLaVA's eval.zip"
        )
    return found


def hash_files_of(root: Path) -> str:
    """SHA-256 of the conversations and of every benchmark's files that are there: their names and contents."""
    if not root.is_dir():
        raise LoadError(no_folder(root))
    names = [f"eval/{name}" for files in FILES.values() for name in files]
    found = {name: root / name for name in (MIX, *names) if (root / name).is_file()}
    if not found:
        raise LoadError(f"{root}: neither {MIX} nor the files of a benchmark in eval/; give LLaVA's playground/data")
    return hash_files(found)


def folder(data: Data, data_dir: Path | None) -> Path:
    """The folder of a source."""
    if data.name in WRITTEN:
        return WRITTEN[data.name].folder(data.name)
    if data_dir is None:
        raise LoadError(f"data '{NAME}' is a local folder, LLaVA's playground/data: give it with --data-dir")
    return Path(data_dir)
