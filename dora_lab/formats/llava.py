"""What LLaVA's own code leaves of a training, by the names that the model has in transformers.

A folder of it holds an adapter and, beside it, ``non_lora_trainables.bin`` with the projector (LLaVA c121f04,
`train.py` and `builder.py`). Its language model lies at ``model.layers``, the projector's layers are called 0 and 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dora_lab.formats.neutral import Adapter, refuse_not_finite
from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import inside

BESIDE = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_LAYERS = ("model.layers.", "model.language_model.layers.")
_PROJECTOR = re.compile(
    r"(?:(?:base_model\.model\.)?(?:model\.)*mm_projector\.)?(?P<layer>[02])\.(?P<leaf>weight|bias)"
)
_PLACES = {"0": "linear_1", "2": "linear_2"}


def beside(folder: Path) -> Path | None:
    """The file of what was trained beside the adapter; None where the folder is not LLaVA's."""
    found = (inside(folder, name, folder) for name in BESIDE) if Path(folder).is_dir() else ()
    return next((file for file in found if file.is_file()), None)


def as_in_transformers(adapter: Adapter, file: Path, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter by transformers' names, with the projector of `file`; CheckpointError for what has no place."""
    saved = {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector(tensors, file).items()}
    if strange := [name for name in adapter.layers if not name.startswith(_LAYERS[0])]:
        raise CheckpointError(f"{file.parent}: '{strange[0]}' is adapted, LLaVA adapts '{_LAYERS[0]}...' alone")
    layers = {name.replace(*_LAYERS, 1): factors for name, factors in adapter.layers.items()}
    return replace(adapter, layers=layers, saved={**adapter.saved, **saved})


def projector(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The projector of LLaVA's tensors by transformers' names, "linear_1.weight" and so on; `file` is where they are.

    Raises CheckpointError for other tensors beside it, one that is missing and numbers that are not finite.
    """
    found = {}
    for key, tensor in tensors.items():
        if (place := _PROJECTOR.fullmatch(key)) is None:
            raise CheckpointError(f"{file}: '{key}' is no part of LLaVA-1.5's projector, which is what belongs here")
        found[f"{_PLACES[place['layer']]}.{place['leaf']}"] = tensor
    if len(found) != 4 or len(tensors) != 4:
        raise CheckpointError(
            f"{file}: {len(tensors)} tensors, a projector has weight and bias of 0 and 2; fetch it again"
        )
    refuse_not_finite(found, file)
    return found
