"""What identifies the inputs of a spec on this machine: hashes and commits, known without loading torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_lab.models.base import adapter_identity, model_identity
from dora_lab.spec import Spec
from dora_lab.tasks.sources import data_identity


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
