"""Adapter files read, whoever wrote them; the format is recognised by its keys.

- "peft": a folder as PEFT writes it, "authors": one of the DoRA authors' release (both: see `peft`);
  Of LLaVA's the names are brought to transformers', and the projector beside it belongs to it (see `llava`);
- "lycoris": a safetensors file (see `lycoris`);
- "tensors": a folder of the lab's own, for a method that none of these holds: the trained state of its layers by name,
  and in the configuration the method, whole, that makes such layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dora_lab.formats import llava, lycoris, peft
from dora_lab.formats.neutral import CONFIG, OWN, PICKLE, WEIGHTS, Adapter, refuse_not_finite
from dora_lab.formats.shards import read_pickle
from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import PICKLED, header, inside, metadata, parse_json, refuse_what_is_no_weights


def read_adapter(path: Path, modules: Iterable[str] = (), *, allow_pickle: bool = False) -> Adapter:
    """Read an adapter folder (PEFT's, the authors', the lab's own) or a LyCORIS file.

    modules: names of the base's modules; needed for LyCORIS, whose keys write a dot and an underscore alike.
    allow_pickle: read ``adapter_model.bin`` where there is no safetensors file (tensors only, ``weights_only=True``).

    Raises CheckpointError for anything missing, broken, ambiguous, or beyond what the lab computes.
    """
    found, beside = _read(Path(path), modules, allow_pickle), llava.beside(path)
    if beside is None:
        return found
    return llava.as_in_transformers(found, beside, read_tensors(beside, allow_pickle=allow_pickle))


def _read(path: Path, modules: Iterable[str], allow_pickle: bool) -> Adapter:
    if path.is_dir():
        config, file = _read_config(inside(path, CONFIG, path)), _weights_in(path)
    else:
        config, file = {}, path
    tensors = read_tensors(file, allow_pickle=allow_pickle)
    keys = " ".join(tensors)
    if config.get("peft_type") == OWN:
        refuse_not_finite(tensors, file)
        return Adapter("tensors", {}, {}, config, tensors)
    if "dora_scale" in keys or "lora_down" in keys:
        said = {} if file.suffix in PICKLED else metadata(file)
        return Adapter("lycoris", lycoris.read_layers(file, tensors, tuple(modules), said), {}, config)
    if not path.is_dir():
        raise CheckpointError(f"{path}: give the folder that holds {CONFIG} and {WEIGHTS}, not the file alone")
    if "weight_m_wdecomp" in keys:
        return Adapter("authors", peft.read_authors(path, file, tensors, config), {}, config)
    layers, saved = peft.read_peft(path, file, tensors, config)
    # PEFT writes the frozen weight of an adapted embedding or head beside its factors, and the bias that it trained
    frozen = {name.replace(".base_layer.", "."): saved.pop(name) for name in list(saved) if ".base_layer." in name}
    biases = [name for name in frozen if name.endswith(".bias") and peft.trains_biases(config)]
    return Adapter("peft", layers, saved | {name: frozen.pop(name) for name in biases}, config, frozen=frozen)


def read_tensors(file: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; CheckpointError says what the file is if it is something else."""
    refuse_what_is_no_weights(file)
    if file.suffix in PICKLED:
        if not allow_pickle:
            raise CheckpointError(
                f"{file}: a pickle can run code when it is read; convert it to safetensors, or allow_pickle"
            )
        return read_pickle(file)
    header(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None


def read_projector(file: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The projector in a file of its own ("mm_projector.bin"); raises CheckpointError as `llava.projector` does."""
    return llava.projector(read_tensors(file, allow_pickle=allow_pickle), file)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; an adapter folder holds {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def _weights_in(folder: Path) -> Path:
    found = [file for name in (WEIGHTS, PICKLE) if (file := inside(folder, name, folder)).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: no {WEIGHTS} in it")
    return found[0]
