"""Training, validation and test items for a spec. Imports no torch.

Sources: "mini" and "mini2" (the embedded world, asked about in two ways); "llm_adapters", a folder in the layout of
that repository (``<task>/train.json`` and ``<task>/test.json``, or these below ``dataset/``); "commonsense_170k"
(training items only), the file
``commonsense_170k.json`` of such a folder (in it or in ``ft-training_set/``), else the hub's copy at `data.revision`;
"vl_adapter", items about pictures with their features, and "mini_vl" and "mini_vl_blind", an embedded world of them
(see `vl_adapter`); "value", items about clips with features of their frames, and "mini_clips" and "mini_clips_blind",
an embedded world of them (see `value`); "llava_v1_5", conversations and benchmarks about images, and "mini_llava" and
"mini_llava_blind", an embedded world of them, and "easy_vqa", a package's (see `llava`).
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from dora_lab import mini
from dora_lab.io.errors import LoadError
from dora_lab.io.files import hash_files, no_folder
from dora_lab.io.hub import snapshot
from dora_lab.spec import Data, Spec, did_you_mean
from dora_lab.tasks import Task, all_tasks, check_items, llava, load_task, mini_clips, read_items, value, vl_adapter
from dora_lab.tasks.cloze import as_cloze
from dora_lab.tasks.commonsense.released_files import MIX, describe
from dora_lab.tasks.pictures import Pictures

Item = dict[str, Any]
Pools = dict[str, list[Item]]  # items by task
# sources whose tasks are theirs alone
OWN = {
    **dict.fromkeys(vl_adapter.NAMES, vl_adapter), **dict.fromkeys(value.NAMES, value),
    **dict.fromkeys(llava.NAMES, llava),
}  # fmt: skip
SOURCES = (*mini.WORLDS, "llm_adapters", MIX, *OWN)
HUB_MIX = "zwhe99/commonsense_170k"  # the copy that public code loads
HUB_FILES = ("*.json", "*.parquet")
DATA_SEED = 42  # of the split and the subset: the same items for every run seed, as in the released code
INSTEAD = (
    "clone https://github.com/AGI-Edgerunners/LLM-Adapters (commit 8166572, read for this lab) and give its folder, "
    "which holds ft-training_set/commonsense_170k.json and dataset/<task>/test.json, with --data-dir"
)


@dataclass(frozen=True)
class Items:
    """The items of a run, per task name; a source without a split has no key for it."""

    train: Pools = field(default_factory=dict)
    validation: Pools = field(default_factory=dict)
    test: Pools = field(default_factory=dict)
    sources: tuple[dict[str, Any], ...] = ()  # every file that was read, as `describe` has it; none for "mini"
    pictures: Pictures | None = None  # features that the items show; None: they show none
    images: dict[str, Any] | None = None  # files that the items show, see `llava.images`
    home: Path | None = None  # folder of benchmarks whose answers go to servers

    def split(self, name: str) -> Pools:
        """The items of "train", "validation" or "test"."""
        return cast(Pools, getattr(self, name))

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of items per split and task, for the record."""
        pools = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: {task: len(items) for task, items in pool.items()} for name, pool in pools.items()}


def items(spec: Spec, data_dir: Path | None = None) -> Items:
    """The training, validation and test items of `spec`; `data_dir` is the folder of the source "llm_adapters".

    Raises LoadError for an unknown source or a folder whose content is not what `data.sha256` says, ItemError for data
    that cannot be used.
    """
    data = spec.data
    # protocol builtin brings its items along; of the items that were trained on, no others are asked
    own = spec.evaluation.protocols != ("builtin",) and spec.evaluation.split != "train"
    tests = _read(data.eval_name or data.name, "test", data, data_dir) if own else {}
    test = {task: found[: data.test_items] for task, found in _formed(tests, data).items()}
    pools: Pools = {}
    train: Pools = {}
    validation: Pools = {}
    if spec.optim is not None or spec.evaluation.split != "test":
        pools = _read(data.name, "train", data, data_dir)
        train, validation = _split(_formed(pools, data), data, data_dir)
        train = _relabelled(train, data) if data.label_noise else train
        if spec.optim is not None and not train:
            raise LoadError(f"data '{data.name}' has no training items for the tasks {', '.join(data.tasks)}")
    if spec.evaluation.split == "validation" and not validation:
        raise LoadError("evaluation.split is validation but data.validation_items is 0; set it")
    if own and spec.evaluation.split == "test" and not test:
        raise LoadError(f"data '{data.eval_name or data.name}' has no test items for the tasks {', '.join(data.tasks)}")
    sources: list[dict[str, Any]] = []
    if (data.eval_name or data.name) not in mini.WORLDS:
        asked = {question for pool in pools.values() for item in pool for question in _questions(item)}
        for task, found in tests.items():
            again = sum(_questions(item)[0] in asked for item in found) if pools else None
            told = {"used": len(test[task]), "asked_in_training": again}
            sources.append(_described(data, task, "test", found) | told)
    if data.name not in mini.WORLDS:
        for task, pool in pools.items():
            used = len(train.get(task, ())) + len(validation.get(task, ()))
            sources.append(_described(data, task, "train", pool) | {"used": used})
    found = Items(train=train, validation=validation, test=test, sources=tuple(sources))
    every = (train, validation, test)
    if data.name in (*vl_adapter.NAMES, *value.NAMES):
        return replace(found, pictures=OWN[data.name].pictures(every, data, data_dir))
    if data.name in llava.NAMES:
        root = llava.folder(data, data_dir)
        return replace(found, images=llava.images(every, root), home=llava.benchmarks(root))
    return found


def _questions(item: Item) -> list[Any]:
    if "instruction" in item:
        return [item["instruction"]]
    return [(item["pictures"], item["text"])] if "pictures" in item else llava.questions(item)


def _described(data: Data, task: str, split: str, items: list[Item]) -> dict[str, Any]:
    return (OWN[data.name].describe if data.name in OWN else describe)(task, split, items)


def hash_data(folder: Path) -> str:
    """SHA-256 (64 hex digits) of the data files of a folder in the LLM-Adapters layout: their names and contents."""
    if not Path(folder).is_dir():
        raise LoadError(no_folder(folder))
    found = _files(folder)
    if not found:
        wanted = ", ".join(task.folder for task in _asked())
        raise LoadError(f"{folder} has no <task>/train.json or <task>/test.json; tasks: {wanted}")
    return hash_files(found)


def tasks_in(folder: Path) -> list[str]:
    """Names of the tasks whose ``test.json`` is in a folder of the LLM-Adapters layout, in the paper's order."""
    found = _files(folder)
    return [task.name for task in _asked() if f"{task.folder}/test.json" in found]


def items_to_train(data: Data, data_dir: Path) -> int | None:
    """How many items a folder has to train on, those for validation among them; None where they come from elsewhere."""
    if data.name == MIX and _mix_file(data_dir) is None:
        return None
    return sum(map(len, _read(data.name, "train", data, data_dir).values()))


def data_identity(data: Data, source: str, data_dir: Path | None) -> dict[str, Any]:
    """What identifies a source as it is on this machine now: the hash of a local one, the commit of the hub's."""
    if source in mini.WORLDS:
        return {"revision": None, "sha256": mini.world_sha256(source)}
    if source in OWN:
        return OWN[source].identity(data, data_dir)
    local = source == "llm_adapters"
    if data_dir is not None and (local or _mix_file(data_dir) is not None):
        return {"revision": None, "sha256": hash_data(data_dir)}
    # a hub commit is its own hash
    return {"revision": None, "sha256": data.sha256} if local else {"revision": data.revision, "sha256": None}


def _files(folder: Path) -> dict[str, Path]:
    """The data files of a folder in the LLM-Adapters layout, by their names in it."""
    root = _tasks_folder(folder)
    names = [f"{task.folder}/{split}.json" for task in _asked() for split in ("train", "test")]
    found = {name: root / name for name in names if (root / name).exists()}
    mix = _mix_file(folder)
    return found | ({mix.name: mix} if mix else {})


def _asked() -> list[Task]:
    """The tasks whose items are in the LLM-Adapters format."""
    return [task for task in all_tasks() if task.read is None]


def _tasks_folder(folder: Path) -> Path:
    below = Path(folder) / "dataset"
    return below if below.is_dir() else Path(folder)


def _mix_file(folder: Path) -> Path | None:
    places = (Path(folder) / below / f"{MIX}.json" for below in (".", "ft-training_set", "../ft-training_set"))
    return next((place for place in places if place.is_file()), None)


def _read(source: str, split: str, data: Data, data_dir: Path | None) -> Pools:
    """All items of one split, per task; {} where the source has none."""
    if source in mini.WORLDS:
        found = {name: mini.items(name, cast(Any, split), source) for name in data.tasks}
        for name, given in found.items():
            check_items(given, load_task(name), f"{source} {name} {split}")
        return found
    if source == "llm_adapters":
        return _read_folder(split, data, data_dir)
    if source in OWN:
        return OWN[source].read(split, data, data_dir)
    if source == MIX:
        if split != "train":
            raise LoadError(f"data '{MIX}' has training items only; set data.eval_name to 'llm_adapters'")
        return {MIX: _read_mix(data, data_dir)}
    raise LoadError(f"unknown data source '{source}'; {did_you_mean(source, SOURCES)}")


def _read_folder(split: str, data: Data, data_dir: Path | None) -> Pools:
    if data_dir is None:
        raise LoadError(f"data 'llm_adapters' is a local folder; give it with --data-dir: {INSTEAD}")
    _refuse_other(data, data_dir)
    read = {}
    for task in (load_task(name) for name in data.tasks):
        file = _tasks_folder(data_dir) / task.folder / f"{split}.json"
        if split == "test" or file.exists():  # a task may have no training file; one without a test is an error
            read[task.name] = read_items(file, task)
    return read


def _refuse_other(data: Data, data_dir: Path) -> None:
    found = hash_data(data_dir)
    if data.sha256 is not None and found != data.sha256:
        raise LoadError(f"{data_dir}: content hash {found[:12]}..., the spec asks for {data.sha256[:12]}...")


def _read_mix(data: Data, data_dir: Path | None) -> list[Item]:
    """The training mix: of the folder if it has one, else of the hub."""
    if data_dir is not None and (file := _mix_file(data_dir)) is not None:
        _refuse_other(data, data_dir)
        return read_items(file, None)
    folder = snapshot(HUB_MIX, data.revision, "dataset", HUB_FILES, "--with data.revision=COMMIT", INSTEAD)
    named = [*folder.glob(f"**/{MIX}.json")] or sorted(folder.glob("**/*.json"))
    if len(named) == 1:
        return read_items(named[0], None)
    tables = sorted(folder.glob("**/*.parquet"))
    if named or not tables:
        raise LoadError(f"{folder}: expected one JSON file or parquet files, found {[file.name for file in named]}")
    import pandas as pd

    found = pd.concat([pd.read_parquet(table) for table in tables]).to_dict("records")
    check_items(found, None, str(folder))
    return cast("list[Item]", found)


def _formed(pools: Pools, data: Data) -> Pools:
    """The items in the form that `data.template` asks for."""
    if data.template != "cloze":
        return pools
    if MIX in pools:
        raise LoadError(f"data '{MIX}' does not say of which task an item is; template cloze needs another source")
    return {task: as_cloze(load_task(task), pool) for task, pool in pools.items()}


def _split(pools: Pools, data: Data, data_dir: Path | None) -> tuple[Pools, Pools]:
    """Training and validation items: embedded worlds and VL-Adapter's data have their own, others hold items out."""
    if data.holdout == "mixed":
        return _split_mixed(pools, data)
    pools = {name: _shuffled(pool, name) for name, pool in pools.items()}
    if data.name in (*mini.WORLDS, *vl_adapter.NAMES, *mini_clips.SOURCES, *llava.WRITTEN):
        own = _formed(_read(data.name, "validation", data, data_dir), data) if data.validation_items else {}
        held = _shares(own, data.validation_items)
        validation = {name: pool[: held[name]] for name, pool in own.items()}
    else:
        held = _shares(pools, data.validation_items)
        validation = {name: pool[: held[name]] for name, pool in pools.items() if held[name]}
        pools = {name: pool[held[name] :] for name, pool in pools.items()}
        if data.name == value.NAME:
            pools = {name: value.apart(pool, validation.get(name, ())) for name, pool in pools.items()}
    kept = _shares(pools, data.train_items if data.train_items is not None else sum(map(len, pools.values())))
    return {name: pool[: kept[name]] for name, pool in pools.items() if kept[name]}, validation


def _split_mixed(pools: Pools, data: Data) -> tuple[Pools, Pools]:
    """As released: `train_test_split` with seed 42 over all items in file order; the first of the rest are trained.

    With no items held out, fewer than all are drawn from all, too: in file order they would be of the first task alone.
    """
    import datasets

    everything = [(name, item) for name, pool in pools.items() for item in pool]
    wanted = data.validation_items + (data.train_items or 1)
    if wanted > len(everything):
        raise LoadError(f"{wanted} items wanted, {len(everything)} there; ask for fewer")
    train, held = list(range(len(everything))), []
    if not data.validation_items and data.train_items is not None and data.train_items < len(everything):
        train = _shuffled(train, "mixed")
    if data.validation_items:
        rows = datasets.Dataset.from_dict({"row": train})
        both = rows.train_test_split(test_size=data.validation_items, shuffle=True, seed=DATA_SEED)
        train, held = list(both["train"]["row"]), list(both["test"]["row"])

    def by_task(chosen: list[int]) -> Pools:
        found: Pools = {}
        for row in chosen:
            name, item = everything[row]
            found.setdefault(name, []).append(item)
        return found

    return by_task(train[: data.train_items]), by_task(held)


def _relabelled(pools: Pools, data: Data) -> Pools:
    """Training items of which `data.label_noise` have a label that is drawn anew from their options (it may be right).

    Of the first n items of a task n times that share, so that a smaller set's noise is the larger one's.
    """
    if MIX in pools:
        raise LoadError(f"data '{MIX}' does not say what an item's options are; data.label_noise needs another source")

    def due(place: int) -> bool:
        before, after = (math.floor(data.label_noise * number + 1e-9) for number in (place, place + 1))
        return after > before

    return {
        name: [
            _drawn(load_task(name), item, f"{DATA_SEED} {name} {place}") if due(place) else item
            for place, item in enumerate(pool)
        ]
        for name, pool in pools.items()
    }


def _drawn(task: Task, item: Item, key: str) -> Item:
    """The item with a label drawn from its options, each as likely."""
    options = item["options"] if "texts" in item else task.options(item)
    label = random.Random(f"{key} label").choice(options)
    if "texts" in item:  # cloze
        return item | {"answer": label, "output": f" {item['texts'][options.index(label)]}"}
    before, _, after = item["output"].rpartition(item["answer"])
    return item | {"answer": label, "output": before + label + after}


def _shares(pools: Pools, wanted: int) -> dict[str, int]:
    """How many of `wanted` items each pool gives: evenly, and more from the others where one has too few."""
    sizes = {name: len(pool) for name, pool in pools.items()}
    if wanted > sum(sizes.values()):
        raise LoadError(f"{wanted} items wanted, {sum(sizes.values())} there: {json.dumps(sizes)}; ask for fewer")
    shares, left = {}, wanted
    for place, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):  # the others make up for small ones
        shares[name] = min(sizes[name], left // (len(sizes) - place))
        left -= shares[name]
    return {name: shares[name] for name in sizes}


def _shuffled(pool: list[Any], name: str) -> list[Any]:
    order = list(range(len(pool)))
    random.Random(f"{DATA_SEED} {name}").shuffle(order)
    return [pool[index] for index in order]
