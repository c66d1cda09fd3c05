"""Methods put on models and taken off again.

A file ``<name>.py`` here is the method `name`. It exposes

- the literals that `catalog` reads; a field of `dora_lab.spec.Method` that is not among its ``FIELDS`` must be at its
  default: a setting that changes nothing must not look as if it did;
- ``prepare(model, method, generator)``: changes `model` in place, decides which parameters are trained, and draws every
  random number from `generator`;
- with a ``FORM``, ``hold(layer, settings, scaling)``: an adapted layer to be filled from a file of that form.

A method that adapts layers does so with `wrap` and a subclass of `AdaptedLinear`; nothing else in the lab knows a
method by name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_lab.methods.catalog import catalog, entry_of
from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.readers import Watch, reader_of, refuse_read
from dora_lab.methods.saved import put, saved, take_off, whole_parameters
from dora_lab.spec import Method, did_you_mean, pattern_matches

_KEPT = "_adapted"  # where a merged layer keeps the adapted one
_WATCH = "_watch"  # where an adapted layer keeps the watch that it is called (see `readers`)
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # in names, of modules around modules


def inject(model: nn.Module, method: Method, seed: int) -> dict[str, int]:
    """Prepare `model`, in place, to be fine-tuned by `method`; all that is drawn comes from `seed` (>= 0) alone.

    Returns ``{"trainable": ..., "total": ...}``, numbers of parameters (shared ones once, the adapters' included).
    Raises ValueError for an unknown method, a field the method does not read, target modules that do not exist.
    """
    _refuse_unread(method)
    _module(method.name).prepare(model, method, torch.Generator("cpu").manual_seed(seed))
    counted = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trainable": sum(n for n, trained in counted if trained), "total": sum(n for n, _ in counted)}


def hold(layer: nn.Module, rank: int | None, scaling: float, dropout: float, *, magnitude: bool) -> AdaptedLinear:
    """An adapted layer for what a file holds of it: factors, a magnitude, or both (see `AdaptedLinear.factors`).

    Its numbers are those of a layer that was never trained, to be overwritten. Raises ValueError as `inject` does.
    """
    form = "factors, magnitude" if magnitude else "factors"
    name = next(entry.name for entry in catalog().values() if entry.form == form)
    alpha = None if rank is None else scaling * rank
    return _module(name).hold(layer, Method(name=name, rank=rank, alpha=alpha, dropout=dropout), scaling)


def adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(module name, layer) of every adapted layer, in the model's order; none for methods that wrap nothing.

    The names are those of the bare model: what `torch.compile`, FSDP or DDP put around it or its parts is left out.
    """
    for name, module in bare(model).named_modules():
        if isinstance(module, AdaptedLinear):
            yield bare_name(name), module


def bare(model: nn.Module) -> Any:
    """The model inside what `torch.compile` and `DistributedDataParallel` put around it."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def bare_name(name: str) -> str:
    """A name in a model, without what is around its parts."""
    return ".".join(atom for atom in name.split(".") if atom not in _WRAPPERS)


def merge(model: nn.Module, *, keep: bool = True) -> nn.Module:
    """Replace every adapted layer, in place, by the plain layer it amounts to; returns `model`.

    For a float32 base this costs nothing but the last bits, and makes evaluation as fast as the base model's.
    keep: hold on to the adapted layers, so that `unmerge` can bring them back; costs the memory of the base's matrices.
    """
    merged: dict[nn.Module, nn.Module] = {}
    for name, layer in adapted(model):
        try:
            plain = merged[layer] = layer.merge()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if keep:
            plain.__dict__[_KEPT] = layer  # not registered: no part of the state dict
    _exchange(model, merged)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, in place, bit for bit; returns `model`. Raises ValueError if nothing in it was merged and kept."""
    kept = {module: module.__dict__[_KEPT] for module in model.modules() if _KEPT in module.__dict__}
    if not kept:
        raise ValueError("nothing to unmerge: no layer of this model was merged by merge(model, keep=True)")
    _exchange(model, {merged: layer.train(model.training) for merged, layer in kept.items()})
    return model


class Detached(dict[str, AdaptedLinear]):
    """The adapted layers of an adapter that was taken off, by module name, and the parameters that it brought whole."""

    saved: Mapping[str, nn.Parameter] = {}


def detach(model: nn.Module) -> Detached:
    """Take the adapter off, in place: the base's own layers and parameters are put back, bit for bit.

    Returns the adapted layers by module name, for `attach`. They share the base's tensors, so many adapters of one base
    cost little more than their own parameters.
    """
    layers = Detached(adapted(model))
    _exchange(model, {layer: layer.replaced() for layer in layers.values()})
    layers.saved = take_off(bare(model))
    return layers


def attach(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> nn.Module:
    """Put adapted layers that `detach` gave back on their base, in place; returns `model`.

    Raises ValueError, and changes nothing, if a layer was made for other tensors than this model's, or if the model is
    adapted already: two adapters do not add up (m V / ||V|| of a sum is not the sum of two).
    """
    if isinstance(layers, Detached) and (held := {*saved(bare(model))} & {*layers.saved}):
        raise ValueError(f"'{min(held)}' is in the place of the base's already: detach(model) first")
    places: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        module: Any = bare(model).get_submodule(name)
        if isinstance(module, AdaptedLinear):
            raise ValueError(f"'{name}' is adapted already and adapters do not add up: detach(model) first")
        same = module is layer.frozen if layer.frozen is not None else getattr(module, "weight", None) is layer.weight
        if not same:
            raise ValueError(f"'{name}' does not hold the base weight that this adapter was made for")
        try:
            refuse_read(bare(model), name)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from None
        places[module] = layer.train(model.training)
    if isinstance(layers, Detached):
        put(bare(model), layers.saved)
    _exchange(model, places)
    return model


def wrap(model: nn.Module, method: Method, make: Callable[[str, nn.Module, Method], AdaptedLinear]) -> None:
    """Freeze `model` and replace, in place, each layer that `method` names by ``make(name, layer, settings)``.

    Named are the modules whose leaf name is in `target_modules` or `magnitude_modules` and whose full name has `scope`
    in it; `settings` is `method` with the rank and alpha that `rank_pattern` and `alpha_pattern` give this layer. A
    module that stands in two places is replaced in both. What `also_train` names gets a trained parameter in the place
    of the base's own (see `saved`). Nothing is changed if anything is refused.

    Raises ValueError if a name or pattern matches nothing (with near misses), or a layer that cannot be adapted.
    """
    named = {bare_name(name): module for name, module in bare(model).named_modules()}
    found = _targets(named, method)
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        layers = {name: _adapted_layer(model, method, name, module, make) for name, module in found.items()}
        whole = whole_parameters(named, method.also_train, layers)
    except ValueError:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    _exchange(model, {found[name]: layer for name, layer in layers.items()})
    put(bare(model), {name: nn.Parameter(parameter.detach().clone()) for name, parameter in whole.items()})


def _adapted_layer(
    model: nn.Module, method: Method, name: str, module: nn.Module, make: Callable[..., AdaptedLinear]
) -> AdaptedLinear:
    try:
        if isinstance(module, AdaptedLinear):
            raise ValueError("is adapted already and adapters do not add up: detach(model) or merge(model) first")
        refuse_read(bare(model), name)
        layer = make(name, module, _settings(method, name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    layer.method = method
    return layer


def _targets(named: Mapping[str, nn.Module], method: Method) -> dict[str, nn.Module]:
    """The modules that `method` names, out of all of a model by name; raises ValueError as `wrap` does."""
    targets = (*method.target_modules, *method.magnitude_modules)
    everywhere = {name: module for name, module in named.items() if name and _leaf(name) in targets}  # '': the model
    found = {name: module for name, module in everywhere.items() if re.search(method.scope or "", name)}
    linear = {_leaf(name) for name, module in named.items() if type(module) in (nn.Linear, Conv1D)}
    if not targets:
        raise ValueError(f"method '{method.name}': target_modules is empty; {did_you_mean('', linear)}")
    for target in targets:
        if not (places := [name for name in everywhere if _leaf(name) == target]):
            raise ValueError(f"target_modules: no module is named '{target}'; {did_you_mean(target, linear)}")
        if not found.keys() & {*places}:
            raise ValueError(
                f"scope: '{method.scope}' is in the full name of no module '{target}'; there are {len(places)}, the "
                f"first is '{places[0]}'"
            )
        if targets.count(target) > 1:
            raise ValueError(f"target_modules: '{target}' is named twice (magnitude_modules included)")
    for pattern, _ in (*_patterns(method.rank_pattern), *_patterns(method.alpha_pattern)):
        if not any(pattern_matches(pattern, name) for name in found):
            raise ValueError(f"pattern '{pattern}' matches none of the target modules")
    return found


def _settings(method: Method, name: str) -> Method:
    """The method with the rank and alpha of one module."""
    ranks = [int(value) for pattern, value in _patterns(method.rank_pattern) if pattern_matches(pattern, name)]
    alphas = [value for pattern, value in _patterns(method.alpha_pattern) if pattern_matches(pattern, name)]
    return replace(method, rank=(ranks or [method.rank])[0], alpha=(alphas or [method.alpha])[0])


def _patterns(pairs: tuple[str, ...]) -> list[tuple[str, float]]:
    """("pattern", value) of each "pattern=value"."""
    return [(pattern, float(value)) for pattern, _, value in (pair.rpartition("=") for pair in pairs)]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{entry_of(name).name}")


def _refuse_unread(method: Method) -> None:
    read = entry_of(method.name).fields
    for item in fields(Method):
        value = getattr(method, item.name)
        if item.name != "name" and item.name not in read and value != item.default:
            raise ValueError(
                f"method '{method.name}' does not read {item.name} = {value!r}; leave it at {item.default!r} "
                f"(it reads: {', '.join(read) or 'nothing'})"
            )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules where others are, in every place of these, and watch the adapted ones that may be read instead."""
    for old in new:
        if (watch := old.__dict__.pop(_WATCH, None)) is not None:
            watch.end()
    places = [(parent, leaf, child) for parent in model.modules() for leaf, child in parent._modules.items()]
    for parent, leaf, child in places:
        if child is not None and child in new:
            setattr(parent, leaf, new[child])
    put = set(new.values())
    for name, layer in adapted(model):
        if layer in put and (found := reader_of(bare(model), name)) is not None:
            layer.__dict__[_WATCH] = Watch(found[0], name, layer)
