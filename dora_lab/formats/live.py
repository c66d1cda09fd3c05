"""Adapters of live models in and out of files, each tied to its base by a manifest (see `manifest`).

Files of other tools have none: the base is then not checked, and a warning says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dora_lab
from dora_lab.formats import manifest
from dora_lab.formats.manifest import MANIFEST
from dora_lab.formats.read import CONFIG, WEIGHTS, Adapter, Factors, read_adapter, write_config, write_tensors
from dora_lab.io.atomic import replacing, write_text
from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import sha256
from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.dora import DoraLinear, MagnitudeLinear
from dora_lab.methods.inject import adapted, attach, merge, unmerge
from dora_lab.methods.lora import LoraLinear
from dora_lab.spec import Method, did_you_mean

_TRAINED = ("lora_A", "lora_B", "magnitude")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) that identifies the base of a model, adapted or not, whatever type it is loaded in.

    Over the name, the shape and up to 4,096 evenly spaced numbers, rounded to bfloat16, of every tensor of the base.
    """
    return manifest.fingerprint(_base_tensors(model))


def save_adapter(model: nn.Module, folder: Path | str, format: str = "peft", base_name: str | None = None) -> Path:
    """Write the adapter of `model` as a folder that ``PeftModel.from_pretrained`` takes; returns the folder.

    format: "peft", or "authors" (the layout of the weights released with the paper).
    base_name: hub id or path of the base, for ``base_model_name_or_path``; default: the one the model was loaded from.

    Raises CheckpointError if the model has no adapter, or one that the format cannot hold.
    """
    if format not in ("peft", "authors"):
        raise CheckpointError(f"format '{format}' cannot be written; choices: authors, peft")
    found = dict(adapted(model))
    if not found:
        raise CheckpointError("the model has no adapter to save: inject one, or save the model itself")
    layers = {name: _factors_of(name, layer) for name, layer in found.items()}
    bare = [name for name, layer in layers.items() if layer.A is None]
    name = base_name or getattr(getattr(model, "config", None), "name_or_path", None) or None
    dropout = max((layer.dropout for layer in found.values() if isinstance(layer, LoraLinear)), default=0.0)
    targets = _targets(model, [module for module in found if module not in bare])
    config = write_config(layers, format, targets, base_model_name_or_path=name, lora_dropout=dropout)
    shapes = {module: _shape(layer) for module, layer in found.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # until the new one is there, the folder is not whole
    with replacing(folder / WEIGHTS) as file:
        save_file(write_tensors(layers, format, shapes), file, metadata={"format": "pt"})
    _write(folder / CONFIG, config)
    whole = {module: layer.weight for module, layer in found.items() if layer.weight is not None}
    tensors = {module: manifest.digest(tuple(W.shape), iter([W])) for module, W in whole.items()}
    base = {"name": name, "fingerprint": fingerprint(model), "tensors": tensors}
    files = {part: sha256(folder / part) for part in (WEIGHTS, CONFIG)}
    _write(folder / MANIFEST, {"schema": 1, "format": format, "base": base, "files": files, "packages": _packages()})
    return folder


def load_adapter(model: nn.Module, path: Path | str, *, allow_pickle: bool = False) -> nn.Module:
    """Put a saved adapter (PEFT, the authors', LyCORIS) on its base, in place; returns `model`, frozen but for it.

    Raises CheckpointError, and changes nothing, for a file that is damaged or does not fit, for another base than the
    manifest names, and for a model that is adapted already: take that adapter off with ``detach(model)`` first, since
    two DoRAs do not add up to one.
    """
    path = Path(path)
    if busy := next((name for name, _ in adapted(model)), None):
        raise CheckpointError(
            f"'{busy}' is adapted already; the sum of two DoRAs is no DoRA (each has its own norm): detach(model) "
            "first, or export one of them and train on"
        )
    modules = dict(model.named_modules())
    _check_base(model, path)
    adapter = read_adapter(path, modules, allow_pickle=allow_pickle)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        layers = {name: _layer(path, modules, name, factors, adapter) for name, factors in adapter.layers.items()}
        saved = {name: _parameter(path, model, name, tensor) for name, tensor in adapter.saved.items()}
    except CheckpointError:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    model.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in saved.items():
            parameter.copy_(adapter.saved[name])
    return attach(model, layers)


def export(model: nn.Module, folder: Path | str, tokenizer: Any = None) -> Path:
    """Write `model` with its adapter merged as a plain transformers folder; the live model stays as it is.

    Raises CheckpointError if the folder has something in it, or the model cannot be saved that way.
    """
    folder, plain = Path(folder), model
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is not empty; give a new folder")
    if not hasattr(plain, "save_pretrained"):
        raise CheckpointError(f"a {type(model).__name__} has no save_pretrained: merge(model) and save its state_dict")
    folder.parent.mkdir(parents=True, exist_ok=True)
    was_adapted = any(True for _ in adapted(model))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / folder.name
        merge(model)
        try:
            with _untied(plain):
                plain.save_pretrained(whole)  # type: ignore[operator]
        finally:
            if was_adapted:
                unmerge(model)
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        files = {file.name: sha256(file) for file in sorted(whole.iterdir()) if file.is_file()}
        _write(whole / MANIFEST, {"schema": 1, "format": "model", "files": files, "packages": _packages()})
        if folder.exists():
            folder.rmdir()
        os.replace(whole, folder)
    return folder


@contextlib.contextmanager
def _untied(model: Any) -> Iterator[None]:
    """A model of which one of two tied matrices was adapted says in its configuration that they are two now."""
    config: Any = getattr(model, "config", None)
    ends: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    apart = None not in ends and ends[0].weight is not ends[1].weight
    if apart := apart and bool(getattr(config, "tie_word_embeddings", False)):
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        if apart:
            config.tie_word_embeddings = True


def _packages() -> dict[str, str]:
    return {"dora_lab": dora_lab.__version__, "torch": torch.__version__}


def _factors_of(name: str, layer: AdaptedLinear) -> Factors:
    kind = "linear" if layer.kind.name == "opaque" else layer.kind.name
    if isinstance(layer, MagnitudeLinear):
        return Factors(None, None, 1.0, layer.magnitude.detach().cpu(), kind)
    if not isinstance(layer, LoraLinear):
        raise CheckpointError(f"'{name}' is a {type(layer).__name__}: neither LoRA nor DoRA, no file format holds it")
    m = layer.magnitude.detach().cpu() if isinstance(layer, DoraLinear) else None
    try:
        return Factors(layer.lora_A.detach().cpu(), layer.lora_B.detach().cpu(), layer.scaling, m, kind)
    except CheckpointError as error:
        raise CheckpointError(f"'{name}': {error}") from None


def _targets(model: nn.Module, names: list[str]) -> list[str]:
    """Leaf names if these mean the adapted modules and no other, else whole names."""
    leaves = {name.rpartition(".")[2] for name in names}
    meant = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
    return sorted(leaves) if meant == names else sorted(names)


def _shape(layer: AdaptedLinear) -> tuple[int, ...]:
    return tuple(layer.weight.shape) if layer.weight is not None else (layer.out_features, layer.in_features)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] not in _TRAINED and tensor.is_floating_point():
            yield name.replace(".frozen.", "."), tensor


def _layer(path: Path, modules: dict[str, nn.Module], name: str, factors: Factors, adapter: Adapter) -> AdaptedLinear:
    if name not in modules:
        near = did_you_mean(name, [other for other, module in modules.items() if not list(module.children())][:60])
        raise CheckpointError(f"{path}: the base has no module '{name}': is it the right base? {near}")
    dropout = adapter.config.get("lora_dropout") or 0.0
    try:
        if factors.A is None or factors.B is None:
            layer: Any = MagnitudeLinear(modules[name])
        else:
            rank = factors.A.shape[0]
            settings = Method(name=adapter.method, rank=rank, alpha=factors.scaling * rank, dropout=dropout)
            kind = DoraLinear if factors.magnitude is not None else LoraLinear
            layer = kind(modules[name], settings, torch.Generator())
            layer.scaling = factors.scaling
        pairs = {"lora_A": factors.A, "lora_B": factors.B, "magnitude": factors.magnitude}
        for part, tensor in pairs.items():
            if tensor is None:
                continue
            if tensor.shape != getattr(layer, part).shape:
                wanted = tuple(getattr(layer, part).shape)
                raise ValueError(f"{part} is {tuple(tensor.shape)} in the file, the base needs {wanted}")
            with torch.no_grad():
                getattr(layer, part).copy_(tensor)
    except ValueError as error:
        raise CheckpointError(f"{path}: '{name}': {error}") from None
    return layer


def _parameter(path: Path, model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        raise CheckpointError(f"{path}: the base has no parameter '{name}'") from None
    if parameter.shape != tensor.shape:
        raise CheckpointError(f"{path}: '{name}' is {tuple(tensor.shape)}, the base's is {tuple(parameter.shape)}")
    return parameter


def _check_base(model: nn.Module, path: Path) -> None:
    found = manifest.read_manifest(path)
    if found is None:
        if path.exists():
            warnings.warn(f"{path} has no {MANIFEST}: whether this is its base could not be checked", stacklevel=3)
        return
    wanted, seen = found["base"]["fingerprint"], fingerprint(model)
    if seen != wanted:
        name = found["base"].get("name")
        raise CheckpointError(
            f"{path}: made for the base {name or 'with another fingerprint'} ({wanted[:12]}), this model's is "
            f"{seen[:12]}: load the base it was trained on (delete {MANIFEST} to use it on this one all the same)"
        )


def _write(file: Path, values: dict[str, Any]) -> None:
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
