"""Model, tokenizer and items for a spec, pinned by revision and hash. Torch is only imported to load a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_lab.load.data import ItemError, Items, data_identity, hash_data, items, tasks_in
from dora_lab.load.hub import LoadError, saved_folder
from dora_lab.load.models import (
    adapter_folder,
    adapter_identity,
    hash_adapter,
    hash_model,
    model_and_tokenizer,
    model_folder,
    model_identity,
    token_policy,
)
from dora_lab.spec import Spec

__all__ = [
    "ItemError",
    "Items",
    "LoadError",
    "adapter_folder",
    "fingerprints",
    "hash_adapter",
    "hash_data",
    "hash_model",
    "items",
    "model_and_tokenizer",
    "model_folder",
    "saved_folder",
    "tasks_in",
    "token_policy",
]


def fingerprints(
    spec: Spec, data_dir: Path | None = None, model_dir: Path | None = None, adapter_dir: Path | None = None
) -> dict[str, Any]:
    """What identifies the inputs as they are on this machine now: hashes of local ones, commits of the hub's.

    Cheap for the embedded inputs, so a complete run can be recognised as one of other inputs without loading torch.
    """
    model, data = spec.model, spec.data
    found = {
        "model": {"name": model.name, **model_identity(model, model_dir)},
        "data": {"name": data.name, **data_identity(data, data.name, data_dir)},
    }
    if data.eval_name:
        found["eval_data"] = {"name": data.eval_name, **data_identity(data, data.eval_name, data_dir)}
    if model.adapter:
        found["adapter"] = {"name": model.adapter, **adapter_identity(model, adapter_dir)}
    return found
