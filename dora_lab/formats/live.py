"""Adapters of live models in and out of files, each tied to its base by a manifest (see `manifest`).

Files of other tools have none: the base is then not checked, and a warning says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dora_lab
from dora_lab.formats import manifest
from dora_lab.formats.manifest import MANIFEST
from dora_lab.formats.neutral import CONFIG, OWN, WEIGHTS, Adapter, Factors, refuse_not_finite
from dora_lab.formats.peft import trains_biases, write_config, write_tensors, write_whole
from dora_lab.formats.read import read_adapter
from dora_lab.io.atomic import disk_errors, replacing, write_text
from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import sha256
from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.inject import adapted, attach, bare, bare_name, detach, hold, inject, merge, unmerge
from dora_lab.methods.saved import put, saved
from dora_lab.spec import Method, did_you_mean


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) that identifies the base of a model, adapted or not, whatever type it is loaded in.

    Over the name, the shape and up to 4,096 evenly spaced numbers, rounded to bfloat16, of every tensor of the base.
    """
    return manifest.fingerprint(_base_tensors(model))


def _through_float16(model: nn.Module) -> str:
    """The fingerprint that the base has where it is loaded in float16."""
    return manifest.fingerprint(_base_tensors(model), torch.float16)


def save_trained(model: Any, folder: Path, base_name: str) -> None:
    """Write what a finished training leaves: the adapter, or a transformers model of which all was trained.

    Raises RuntimeError for a layer that says that a part of it never moved, else as `save_adapter` does.
    """
    for name, layer in adapted(model):
        if (still := layer.unmoved()) is not None:
            raise RuntimeError(f"'{name}': {still}")
    if any(True for _ in adapted(model)):
        save_adapter(model, folder, base_name=base_name)
    else:
        with disk_errors(folder):
            model.save_pretrained(folder)


def save_adapter(model: nn.Module, folder: Path | str, format: str | None = None, base_name: str | None = None) -> Path:
    """Write the adapter of `model` as a folder, which `load_adapter` takes; returns the folder.

    format: "peft" (``PeftModel.from_pretrained`` takes it), "authors" (the layout of the weights released with the
        paper); None: the first of these that holds it, else named tensors with the method that makes such layers.
    base_name: hub id or path of the base, for ``base_model_name_or_path``; default: the one the model was loaded from.

    Raises CheckpointError if the model has no adapter, or one that the format cannot hold.
    """
    if format not in (None, "peft", "authors"):
        raise CheckpointError(f"format '{format}' cannot be written; choices: authors, peft")
    found = dict(adapted(model))
    if not found:
        raise CheckpointError("the model has no adapter to save: inject one, or save the model itself")
    model = bare(model)
    name = base_name or getattr(getattr(model, "config", None), "name_or_path", None) or None
    format, config, state = _written(model, found, format, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # until the new one is there, the folder is not whole
    with replacing(folder / WEIGHTS) as file:
        save_file(state, file, metadata={"format": "pt"})
    _write(folder / CONFIG, config)
    whole = {module: layer.weight for module, layer in found.items() if layer.weight is not None}
    tensors = {module: manifest.digest(tuple(W.shape), iter([W])) for module, W in whole.items()}
    base = {"name": name, "fingerprint": fingerprint(model), "tensors": tensors}
    base["through_float16"] = _through_float16(model)
    files = {part: sha256(folder / part) for part in (WEIGHTS, CONFIG)}
    _write(folder / MANIFEST, {"schema": 1, "format": format, "base": base, "files": files, "packages": _packages()})
    return folder


def load_adapter(model: nn.Module, path: Path | str, *, allow_pickle: bool = False) -> nn.Module:
    """Put a saved adapter (of any format in `read`) on its base, in place; returns `model`, frozen but for it.

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
    modules = {bare_name(name): module for name, module in bare(model).named_modules()}
    _check_base(model, path)
    adapter = read_adapter(path, modules, allow_pickle=allow_pickle)
    with _or_as_before(model):
        if adapter.format == "tensors":
            return _as_itself(path, model, adapter)
        layers = {name: _layer(path, modules, name, factors, adapter) for name, factors in adapter.layers.items()}
        _refuse_other_words(path, bare(model), adapter)
        _refuse_lost_biases(path, layers, adapter)
        model.requires_grad_(False)
        attach(model, layers)
        try:
            put(bare(model), adapter.saved)  # after: a layer's bias may be among them
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {error}; of another vocabulary, resize the base's embeddings first (resize_token_embeddings)"
            ) from None
        return model


def export(model: nn.Module, folder: Path | str, tokenizer: Any = None) -> Path:
    """Write `model` with its adapter merged as a plain transformers folder; the live model stays as it is.

    Raises CheckpointError if the folder has something in it, or the model cannot be saved that way.
    """
    folder, live = Path(folder), bare(model)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: is not empty; give a new folder")
    if not hasattr(live, "save_pretrained"):
        raise CheckpointError(f"a {type(model).__name__} has no save_pretrained: merge(model) and save its state_dict")
    refuse_quantised(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    was_adapted = any(True for _ in adapted(model))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / folder.name
        merge(model)
        try:
            with _untied(live) as state, disk_errors(whole):
                live.save_pretrained(whole, state_dict=state)
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


def refuse_quantised(model: nn.Module) -> None:
    """Raise CheckpointError for a base whose merged weights are not of its own type: no folder could hold both."""
    quantised = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    if quantised or any(not layer.kind.readable for _, layer in adapted(model)):
        raise CheckpointError(
            "the base is quantised, and a folder of merged and quantised weights could not be loaded: load the base as "
            f"it was before, put the adapter on that (without its {MANIFEST}, which names the quantised one), export it"
        )


@contextlib.contextmanager
def _untied(model: Any) -> Iterator[dict[str, Tensor]]:
    """The tensors to write of a model, of which one of some tied matrices may have been adapted.

    Its configuration then says meanwhile that nothing is tied, so every name has to have a tensor of its own: what is
    still shared (a bias, the other embeddings of an encoder-decoder) would be found missing and drawn at random.
    """
    state = {bare_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "get_expanded_tied_weights_keys")]
    tied = model.get_expanded_tied_weights_keys(all_submodels=True) if parts else {}
    at = {name: tensor.data_ptr() for name, tensor in state.items()}
    if all(at.get(one) == at.get(other) for one, other in tied.items()):
        yield state
        return
    configs = {id(part.config): part.config for part in parts if getattr(part.config, "tie_word_embeddings", False)}
    for config in configs.values():
        config.tie_word_embeddings = False
    first = {place: name for name, place in reversed(at.items())}
    try:
        yield {name: tensor if first[at[name]] == name else tensor.clone() for name, tensor in state.items()}
    finally:
        for config in configs.values():
            config.tie_word_embeddings = True


def _packages() -> dict[str, str]:
    return {"dora_lab": dora_lab.__version__, "torch": torch.__version__}


def _written(
    model: nn.Module, found: Mapping[str, AdaptedLinear], format: str | None, base: str | None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(format, configuration, tensors) of an adapter in the format asked for, or in the first that holds it."""
    layers = {name: _factors_of(name, layer) for name, layer in found.items()}
    strange = next((name for name, factors in layers.items() if factors is None), None)
    if strange is not None and format is not None:
        raise CheckpointError(f"'{strange}' is a {type(found[strange]).__name__}, which format '{format}' cannot hold")
    held = {name: factors for name, factors in layers.items() if factors is not None}
    targets = _targets(model, [name for name, factors in held.items() if factors.A is not None])
    dropout = max(layer.dropout for layer in found.values())
    shapes = {name: _shape(layer) for name, layer in found.items()}
    kept = {bare_name(name): own.detach().cpu().contiguous() for name, (_, own) in saved(model).items()}
    every = {bare_name(name) for name, _ in model.named_parameters(remove_duplicate=False)} - _of_layers(model).keys()
    for one in (format,) if format else ("peft", "authors") if strange is None else ():
        try:
            config = write_config(held, one, targets, base_model_name_or_path=base, lora_dropout=dropout)
            more, whole = write_whole(one, kept, every, set(held))
            return one, config | more, write_tensors(held, one, shapes) | whole
        except CheckpointError:
            if format is not None:
                raise
    name, layer = next(iter(found.items()))
    if layer.method is None:
        raise CheckpointError(f"'{name}' is of no method, so nothing could load it: put it on the model with `inject`")
    if kept and not layer.method.also_train:
        raise CheckpointError(f"'{name}' and '{min(kept)}', which is saved whole, are held by no format together")
    config = {"peft_type": OWN, "base_model_name_or_path": base, "method": asdict(layer.method)}
    state = {name: part.detach().cpu().clone().contiguous() for name, part in _state(model).items()}
    refuse_not_finite(state)
    return "tensors", config, state


def _factors_of(name: str, layer: AdaptedLinear) -> Factors | None:
    if (found := layer.factors()) is None:
        return None
    A, B, m = (part if part is None else part.detach().cpu() for part in (found[0], found[1], found[3]))
    try:
        if not found[0].shape[0]:
            A = B = None
        return Factors(A, B, found[2], m, "linear" if layer.kind.name == "opaque" else layer.kind.name)
    except CheckpointError as error:
        raise CheckpointError(f"'{name}': {error}") from None


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """What means the adapted modules and no other, to PEFT: leaf names, whole names, or a regular expression.

    A name in a list means every module whose name ends in it, from a dot on.
    """
    every = [bare_name(name) for name, _ in model.named_modules()]
    for some in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in every for end in some if f".{name}".endswith(f".{end}")} == set(names):
            return some
    return "|".join(map(re.escape, sorted(names)))


def _shape(layer: AdaptedLinear) -> tuple[int, ...]:
    return tuple(layer.weight.shape) if layer.weight is not None else (layer.out_features, layer.in_features)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """All that an adapter holds, by the names that it has in the model: its layers' own, and what it brings whole."""
    return _of_layers(model) | {bare_name(name): own for name, (_, own) in saved(bare(model)).items()}


def _of_layers(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{part}": held for name, layer in adapted(model) for part, held in layer.trained_state().items()}


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own = _of_layers(model)
    base: dict[str, Tensor] = {bare_name(name): now for name, now in bare(model).state_dict().items()}
    base |= {bare_name(name): before for name, (before, _) in saved(bare(model)).items()}
    for name, tensor in base.items():
        if name not in own and tensor.is_floating_point():
            yield name.replace(".frozen.", "."), tensor


def _as_itself(path: Path, model: nn.Module, adapter: Adapter) -> nn.Module:
    """The method of the file put on, and filled with its tensors."""
    try:
        inject(model, Method(**adapter.config["method"]), seed=0)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: 'method' in {CONFIG} makes no adapter of this base: {error}") from None
    own = _state(model)
    if differing := sorted(own.keys() ^ adapter.tensors.keys()):
        raise CheckpointError(
            f"{path}: '{differing[0]}' is {'missing' if differing[0] in own else 'no part of the method'}: is it the "
            "right base, and the method's own file?"
        )
    _fill(path, own, adapter.tensors)
    return model


def _layer(path: Path, modules: dict[str, nn.Module], name: str, factors: Factors, adapter: Adapter) -> AdaptedLinear:
    if name not in modules:
        near = did_you_mean(name, [other for other, module in modules.items() if not list(module.children())][:60])
        raise CheckpointError(f"{path}: the base has no module '{name}': is it the right base? {near}")
    dropout = adapter.config.get("lora_dropout") or 0.0
    rank = None if factors.A is None else factors.A.shape[0]
    try:
        layer = hold(modules[name], rank, factors.scaling, dropout, magnitude=factors.magnitude is not None)
        A, B, _, m = layer.factors() or (None, None, 1.0, None)
        for part, own, given in (
            ("lora_A", A, factors.A), ("lora_B", B, factors.B), ("magnitude", m, factors.magnitude)
        ):  # fmt: skip
            if own is None or given is None:
                continue
            if given.shape != own.shape:
                raise ValueError(f"{part} is {tuple(given.shape)} in the file, the base needs {tuple(own.shape)}")
            with torch.no_grad():
                own.copy_(given)
    except ValueError as error:
        raise CheckpointError(f"{path}: '{name}': {error}") from None
    return layer


def _refuse_other_words(path: Path, model: nn.Module, adapter: Adapter) -> None:
    """PEFT writes the frozen weight of an adapted embedding beside its factors: it has to be the base's."""
    base = {bare_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, tensor in adapter.frozen.items():
        own = base.get(name)
        same = own is not None and own.shape == tensor.shape
        if not same or not torch.equal(base[name].detach().cpu().bfloat16(), tensor.bfloat16()):
            raise CheckpointError(
                f"{path}: the '{name}' that it was trained on is in it, and is not this model's: load the base it was "
                "trained on (of the same vocabulary)"
            )


def _refuse_lost_biases(path: Path, layers: Mapping[str, AdaptedLinear], adapter: Adapter) -> None:
    """Some versions of PEFT train the biases of adapted layers and do not write them."""
    for name, layer in layers.items():
        if trains_biases(adapter.config) and layer.offset is not None and f"{name}.bias" not in adapter.saved:
            said = f"bias = '{adapter.config['bias']}' in {CONFIG}"
            raise CheckpointError(f"{path}: {said}, and the trained bias of '{name}' is not in the file")


@torch.no_grad()
def _fill(path: Path, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model's own of the same names; nothing, if one is of another shape."""
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            shapes = tuple(given[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{path}: '{name}' is {shapes[0]}, the base's is {shapes[1]}")
    for name, tensor in own.items():
        tensor.copy_(given[name])


@contextlib.contextmanager
def _or_as_before(model: nn.Module) -> Iterator[None]:
    """A model that an adapter did not fit is what it was."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except CheckpointError:
        detach(model)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        raise


def _check_base(model: nn.Module, path: Path) -> None:
    found = manifest.read_manifest(path)
    if found is None:
        if path.exists():
            warnings.warn(f"{path} has no {MANIFEST}: whether this is its base could not be checked", stacklevel=3)
        return
    wanted, seen = found["base"]["fingerprint"], fingerprint(model)
    if seen != wanted and not {wanted, found["base"].get("through_float16")} & {seen, _through_float16(model)}:
        name = found["base"].get("name")
        raise CheckpointError(
            f"{path}: made for the base {name or 'with another fingerprint'} ({wanted[:12]}), this model's is "
            f"{seen[:12]}: load the base it was trained on (delete {MANIFEST} to use it on this one all the same)"
        )


def _write(file: Path, values: dict[str, Any]) -> None:
    write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")
