"""Model, tokenizer and items for a spec, pinned by revision and hash. Torch is only imported to load a model.

Sources of data: "mini" (the embedded world), "llm_adapters" (a local folder in the layout of that repository:
``<task>/train.json`` and ``<task>/test.json``) and "commonsense_170k" (the hub; training items only). Sources of
models: "mini" (the embedded base), a local folder, or a hub id at a pinned commit.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dora_lab import mini
from dora_lab.spec import Data, Model, Spec, did_you_mean
from dora_lab.tasks import ItemError, all_tasks, check_items, load_task, read_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Item = dict[str, Any]
SOURCES = ("mini", "llm_adapters", "commonsense_170k")
HUB_DATA = {"commonsense_170k": "zwhe99/commonsense_170k"}  # source name: hub dataset
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.safetensors*")
DATA_SEED = 42  # of the split and the subset: the same items for every run seed, as in the released code


class LoadError(ValueError):
    """A model or data source that cannot be used; says which and what to do."""


@dataclass(frozen=True)
class Items:
    """The items of a run, per task name; a source without a split has no key for it."""

    train: dict[str, list[Item]] = field(default_factory=dict)
    validation: dict[str, list[Item]] = field(default_factory=dict)
    test: dict[str, list[Item]] = field(default_factory=dict)

    def split(self, name: str) -> dict[str, list[Item]]:
        """The items of "train", "validation" or "test"."""
        return cast("dict[str, list[Item]]", getattr(self, name))

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of items per split and task, for the record."""
        names = ("train", "validation", "test")
        return {name: {task: len(items) for task, items in self.split(name).items()} for name in names}


def items(spec: Spec, data_dir: Path | None = None) -> Items:
    """The training, validation and test items of `spec`; `data_dir` is the folder of the source "llm_adapters".

    Raises LoadError for an unknown source or a folder whose content is not what `data.sha256` says, ItemError for data
    that cannot be used.
    """
    data = spec.data
    tests = _read(data.eval_name or data.name, "test", data, data_dir)
    test = {task: _first(found, data.test_items) for task, found in tests.items()}
    train, validation = {}, {}
    if spec.optim is not None or spec.evaluation.split == "validation":
        train, validation = _split(_read(data.name, "train", data, data_dir), data, data_dir)
        if spec.optim is not None and not train:
            raise LoadError(f"data '{data.name}' has no training items for the tasks {', '.join(data.tasks)}")
    if spec.evaluation.split == "validation" and not validation:
        raise LoadError("evaluation.split is validation but data.validation_items is 0; set it")
    return Items(train=train, validation=validation, test=test)


def hash_data(folder: Path) -> str:
    """SHA-256 (64 hex digits) of the task files of a folder in the LLM-Adapters layout: their names and contents."""
    files = [Path(folder) / task.folder / f"{split}.json" for task in all_tasks() for split in ("train", "test")]
    found = [file for file in files if file.exists()]
    if not found:
        wanted = ", ".join(task.folder for task in all_tasks())
        raise LoadError(f"{folder} has no <task>/train.json or <task>/test.json; tasks: {wanted}")
    return _hash_files(found, Path(folder))


def hash_model(folder: Path) -> str:
    """SHA-256 (64 hex digits) of a saved model: its configuration, tokenizer and safetensors files."""
    found = sorted({file for pattern in MODEL_FILES for file in Path(folder).glob(pattern) if file.is_file()})
    if not any(file.name == "config.json" for file in found):
        raise LoadError(f"{folder} has no config.json; give the folder of a model saved by save_pretrained")
    if not any(file.name.endswith(".safetensors") for file in found):
        raise LoadError(f"{folder} has no *.safetensors; pickled weights (.bin, .pt) are not loaded, convert them")
    return _hash_files(found, Path(folder))


def tasks_in(folder: Path) -> list[str]:
    """Names of the tasks whose ``test.json`` is in a folder of the LLM-Adapters layout, in the paper's order."""
    return [task.name for task in all_tasks() if (Path(folder) / task.folder / "test.json").exists()]


def fingerprints(spec: Spec, data_dir: Path | None = None, model_dir: Path | None = None) -> dict[str, Any]:
    """What identifies the inputs as they are on this machine now: hashes of local ones, revisions of hub ones.

    Cheap for the embedded inputs, so a complete run can be recognised as one of other inputs without loading torch.
    """
    return {
        "model": {"name": spec.model.name, **_model_identity(spec.model, model_dir)},
        "data": {"name": spec.data.name, **_data_identity(spec.data, spec.data.name, data_dir)},
        **(
            {"eval_data": {"name": spec.data.eval_name, **_data_identity(spec.data, spec.data.eval_name, data_dir)}}
            if spec.data.eval_name
            else {}
        ),
    }


def model_and_tokenizer(spec: Spec, model_dir: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of `spec` in `model.dtype` and its tokenizer, from `model_dir`, the package or the hub.

    The tokenizer pads on the left with its own pad token, else <unk>, else the end-of-sequence token (padding is
    masked everywhere, so which one does not reach a result). Raises LoadError for weights that do not fill the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(spec.model, model_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _prepare_tokenizer(tokenizer, folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, spec.model.dtype),  # transformers' own default is the file's, not float32
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if wrong := {key: report[key] for key in ("missing_keys", "mismatched_keys") if report.get(key)}:
        raise LoadError(f"{folder}: the weights do not fill the model ({wrong}); fetch the model again")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def model_folder(model: Model, model_dir: Path | None = None) -> Path:
    """The local folder of a model: `model_dir`, the package's, or the hub cache (fetched at need, pinned)."""
    if model_dir is not None:
        found = hash_model(model_dir)
        if model.revision is not None and not found.startswith(model.revision):
            raise LoadError(f"{model_dir} has the fingerprint {found[:12]}, the spec asks for {model.revision}")
        return Path(model_dir)
    if model.name == "mini":
        return Path(mini.folder())
    return _hub_folder(model.name, model.revision, "model", [*MODEL_FILES, "*.json", "*.model"])


def saved_folder(name: str) -> Path:
    """The folder of a model or adapter that somebody names: one that is here, or a hub id ("org/name@revision").

    Raises LoadError for what is neither.
    """
    if Path(name).exists():
        return Path(name)
    place, _, revision = name.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", place):
        raise LoadError(f"{name}: no such folder, and no hub id (org/name)")
    return _hub_folder(place, revision or None, "model", [*MODEL_FILES, "*.json", "adapter_model*"])


def _hub_folder(name: str, revision: str | None, kind: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:  # the cache first: a pinned revision that is there needs no network
        return Path(snapshot_download(name, revision=revision, repo_type=kind, local_files_only=True))
    except Exception:
        pass
    try:
        return Path(snapshot_download(name, revision=revision, repo_type=kind, allow_patterns=patterns))
    except Exception as error:
        raise LoadError(
            f"{kind} '{name}' at revision {revision or 'main'} is not in the hub's cache and could not be fetched "
            f"({type(error).__name__}: {error}); check the name, the network and, for a gated one, `hf auth login`, "
            "or give a local folder"
        ) from None


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, where: Path) -> None:
    if tokenizer.eos_token_id is None:
        raise LoadError(f"{where}: the tokenizer has no end-of-sequence token; answers could not end")
    if not tokenizer.is_fast:
        raise LoadError(f"{where}: the tokenizer gives no character offsets; save it in the tokenizer.json format")
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        raise LoadError(f"{where}: the tokenizer ends every text; switch that off (add_eos_token=False) and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # the last token of every prompt stands next to the first one generated


def _read(source: str, split: str, data: Data, data_dir: Path | None) -> dict[str, list[Item]]:
    """All items of one split, per task; {} where the source has none."""
    if source == "mini":
        found = {name: mini.items(name, cast(Any, split)) for name in data.tasks}
        for name, given in found.items():
            check_items(given, load_task(name), f"mini {name} {split}")
        return found
    if source == "llm_adapters":
        return _read_folder(split, data, data_dir)
    if source == "commonsense_170k":
        if split != "train":
            raise LoadError("data 'commonsense_170k' has training items only; set data.eval_name to 'llm_adapters'")
        folder = _hub_folder(HUB_DATA[source], data.revision, "dataset", ["*.json"])
        files = sorted(folder.glob("**/*.json"))
        if len(files) != 1:
            raise LoadError(f"{folder}: expected one JSON file, found {[file.name for file in files]}")
        return {source: read_items(files[0], None)}
    raise LoadError(f"unknown data source '{source}'; {did_you_mean(source, SOURCES)}")


def _read_folder(split: str, data: Data, data_dir: Path | None) -> dict[str, list[Item]]:
    if data_dir is None:
        raise LoadError("data 'llm_adapters' is a local folder; give it with --data-dir")
    found = hash_data(data_dir)
    if data.sha256 is not None and found != data.sha256:
        raise LoadError(f"{data_dir}: content hash {found[:12]}..., the spec asks for {data.sha256[:12]}...")
    read = {}
    for task in (load_task(name) for name in data.tasks):
        file = Path(data_dir) / task.folder / f"{split}.json"
        if split == "test" or file.exists():  # a task may have no training file; one without a test is an error
            read[task.name] = read_items(file, task)
    return read


def _split(
    pools: dict[str, list[Item]], data: Data, data_dir: Path | None
) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    """Training and validation items: the embedded world has its own validation split, others hold items out."""
    pools = {name: _shuffled(pool, name) for name, pool in pools.items()}
    held = _shares({name: len(pool) for name, pool in pools.items()}, data.validation_items)
    if data.name == "mini":
        own = _read("mini", "validation", data, data_dir) if data.validation_items else {}
        held = _shares({name: len(pool) for name, pool in own.items()}, data.validation_items)
        validation = {name: pool[: held[name]] for name, pool in own.items()}
    else:
        validation = {name: pool[: held[name]] for name, pool in pools.items() if held[name]}
        pools = {name: pool[held[name] :] for name, pool in pools.items()}
    wanted = data.train_items if data.train_items is not None else sum(map(len, pools.values()))
    kept = _shares({name: len(pool) for name, pool in pools.items()}, wanted)
    return {name: pool[: kept[name]] for name, pool in pools.items() if kept[name]}, validation


def _shares(sizes: dict[str, int], wanted: int) -> dict[str, int]:
    """How many of `wanted` items each pool gives: evenly, and more from the others where one has too few."""
    if wanted > sum(sizes.values()):
        raise LoadError(f"{wanted} items wanted, {sum(sizes.values())} there: {json.dumps(sizes)}; ask for fewer")
    shares, left = {}, wanted
    for place, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):  # the others make up for small ones
        shares[name] = min(sizes[name], left // (len(sizes) - place))
        left -= shares[name]
    return {name: shares[name] for name in sizes}


def _shuffled(pool: list[Item], name: str) -> list[Item]:
    order = list(range(len(pool)))
    random.Random(f"{DATA_SEED} {name}").shuffle(order)
    return [pool[index] for index in order]


def _first(found: list[Item], count: int | None) -> list[Item]:
    return found if count is None else found[:count]


def _model_identity(model: Model, model_dir: Path | None) -> dict[str, Any]:
    if model_dir is not None or model.name == "mini":
        return {"revision": model.revision, "sha256": hash_model(model_folder(model, model_dir))}
    return {"revision": model.revision, "sha256": None}  # a hub commit is its own fingerprint


def _data_identity(data: Data, source: str, data_dir: Path | None) -> dict[str, Any]:
    if source == "mini":
        return {"revision": None, "sha256": mini.world_sha256()}
    if source == "llm_adapters" and data_dir is not None:
        return {"revision": None, "sha256": hash_data(data_dir)}
    return {"revision": data.revision, "sha256": data.sha256}


def _hash_files(files: Iterable[Path], root: Path) -> str:
    """One hash over names and contents; names relative to `root`, so that where it lies does not matter."""
    whole = hashlib.sha256()
    for file in files:
        state = file.stat()
        content = _sha256(file, state.st_size, state.st_mtime_ns)
        whole.update(f"{file.relative_to(root).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


@cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Hash of one file; `size` and `changed` (time of change) only tell the cache when it has to be read again."""
    content = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()


__all__ = [
    "ItemError",
    "Items",
    "LoadError",
    "fingerprints",
    "hash_data",
    "hash_model",
    "items",
    "model_and_tokenizer",
    "model_folder",
    "saved_folder",
    "tasks_in",
]
