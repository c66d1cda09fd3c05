"""The layers of a live model whose weights are watched while it is trained, whoever adapted them.

Each says what its weight is now and what it began as. PEFT's plain LoRA and DoRA are seen through their factors; every
other method of PEFT through PEFT's own merge of a copy, one layer at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dora_lab import distributed
from dora_lab.methods.contract import AdaptedLinear, FactorsOf
from dora_lab.methods.inject import bare_name
from dora_lab.methods.layers import Opaque, kind_of
from dora_lab.models import layout
from dora_lab.spec import did_you_mean

PEFT_PREFIX = "base_model.model."
# PEFT's ways to begin: those that leave the base weight alone, those that take out of it what the factors begin with
KEPT_STARTS, SPLIT_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica"), ("pissa", "olora", "corda")


@dataclass(frozen=True)
class Layer:
    """A watched layer."""

    name: str  # of the module in the base model
    now: Callable[[], Tensor]  # its weight as it acts now, (out, in)
    base: Callable[[], Tensor] | None = None  # the weight that it began with, (out, in), where that is kept frozen
    factors: Callable[[], FactorsOf] | None = None
    copied: Callable[[], Tensor] | None = None  # what has to be copied before training, where nothing is kept
    seen: Callable[[Tensor], Tensor] = lambda weight: weight  # a weight as its file or copy has it, as (out, in)
    lost: str | None = None  # why the weight that it began with is not in the model at all, in words


def watched(model: nn.Module, kinds: Sequence[str] | None) -> list[Layer]:
    """The layers with a leaf name in `kinds`, or all that are trained (embeddings and heads if adapted or saved alone).

    Raises ValueError for a kind that matches nothing or no matrix, and for an adapter that cannot be measured.
    """
    starts, heads = _starts(model), _words(model)
    found: list[Layer] = []
    linear: set[str] = set()
    for name, module in _outermost(model):
        kind = name.rpartition(".")[2]
        plain = not isinstance(module, AdaptedLinear) and not _of_peft(module) and not _saved(module)
        if plain and _seen(module) is None:
            if kinds is not None and kind in kinds:
                raise ValueError(f"probe: '{name}' is a {type(module).__name__}, neither a matrix nor adapted")
            continue
        linear.add(kind)
        trained = not plain or (module.weight.requires_grad and id(module) not in heads)
        if kind in kinds if kinds is not None else trained:
            found.append(_layer(name, module, starts))
    leaves = {layer.name.rpartition(".")[2] for layer in found}
    for kind in kinds or ():
        if kind not in leaves:
            raise ValueError(f"probe: no module is named '{kind}'; {did_you_mean(kind, linear)}")
    if not found and kinds is None:
        raise ValueError(f"probe: no matrix of the model is trained; name what to watch: {did_you_mean('', linear)}")
    return found


def unwatched(model: nn.Module) -> list[str]:
    """Trained tensors with two axes or more that nothing here sees as a matrix: packed experts, recurrences."""
    found = []
    for name, module in _outermost(model):
        if isinstance(module, AdaptedLinear) or _of_peft(module) or _saved(module):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            looked_up = layout.kind_of(module, leaf, parameter.dim()) == "embedding"
            matrix = leaf == "weight" and _seen(module) is not None
            if parameter.requires_grad and parameter.dim() > 1 and not looked_up and not matrix:
                found.append(f"{name}.{leaf}".lstrip("."))
    return found


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the base model, module), without what is inside an adapted layer."""
    inside: set[int] = set()
    every: Iterator[tuple[str, Any]] = model.named_modules()
    for path, module in every:
        if id(module) in inside:
            continue
        if isinstance(module, AdaptedLinear) or _of_peft(module) or (_saved(module) and _seen_saved(module)):
            inside |= {id(part) for part in module.modules()}
        elif _saved(module):  # a block that is saved whole: in its copy, each layer is trained
            before: Any = module.original_module
            inside |= {id(part) for part in before.modules()}
            continue
        name = bare_name(path).removeprefix(PEFT_PREFIX)
        yield re.sub(r"\.modules_to_save\.[^.]+", "", name), module


def _words(model: nn.Module) -> set[int]:
    """Modules that look tokens up, or turn states into tokens."""
    heads = {id(m) for m in model.modules() if layout.kind_of(m, "weight", 2) == "embedding"}
    parts: Iterator[Any] = model.modules()
    for part in parts:
        if hasattr(part, "get_output_embeddings"):
            try:
                heads.add(id(part.get_output_embeddings()))
            except (AttributeError, NotImplementedError):
                continue
    return heads


def _seen(module: Any) -> Callable[[Tensor], Tensor] | None:
    """How a plain module's weight is seen as (out, in), by the module's class; None where it is no matrix."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() < 2:
        return None
    kind = layout.kind_of(module, "weight", weight.dim())
    if kind == "other" or (weight.dim() == 3 and not isinstance(module, nn.Conv1d)):
        return None
    return _turned if kind in ("transposed", "embedding") else _flat


def _turned(weight: Tensor) -> Tensor:
    return weight.t()


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _of_peft(module: Any) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters") and hasattr(module, "merge")


def _saved(module: Any) -> bool:
    """Whether it is PEFT's ``modules_to_save``: the module as it was, and the copy that is trained."""
    return hasattr(module, "original_module") and isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)


def _seen_saved(module: Any) -> bool:
    return _seen(module.original_module) is not None


def _layer(name: str, module: Any, starts: dict[str, Any]) -> Layer:
    if isinstance(module, AdaptedLinear):
        return _ours(name, module)
    if _of_peft(module):
        return _peft(name, module, starts)
    if _saved(module):
        before, after = module.original_module, module.modules_to_save[_active(name, module)]
        seen = _seen(before) or _flat
        return Layer(name, lambda: seen(_whole(after.weight)), lambda: seen(_whole(before.weight)))
    seen = _seen(module) or _flat

    def now() -> Tensor:
        return seen(_whole(module.weight))

    if not module.weight.requires_grad:  # it stays what it is: nothing to copy
        return Layer(name, now, now)
    return Layer(name, now, copied=lambda: module.weight.detach().clone(), seen=seen)


def _ours(name: str, layer: AdaptedLinear) -> Layer:
    def base() -> Tensor:
        return layer.base_weight() if layer.weight is None else layer.kind.matrix(_whole(layer.weight))

    if (found := layer.factors()) is None:
        return Layer(name, layer.effective_weight, base)
    A, B, s, m = found
    factors = partial(lambda: (_whole(A), _whole(B), s, None if m is None else _whole(m)))
    return Layer(name, layer.effective_weight, base, factors)


def _peft(name: str, layer: Any, starts: dict[str, Any]) -> Layer:
    key = _active(name, layer)
    if layer.merged:
        raise ValueError(f"probe: '{name}' has the adapters {[key]}, merged: True; one, unmerged, is needed")
    try:
        kind = kind_of(layer.base_layer)
    except ValueError as error:
        raise ValueError(f"probe: '{name}', adapted by PEFT: {error}") from None

    def base() -> Tensor:
        plain = layer.base_layer
        return kind.dense(plain) if isinstance(kind, Opaque) else kind.matrix(_whole(plain.weight))

    config = starts.get(key)
    start = getattr(config, "init_lora_weights", None)
    variant = type(getattr(layer, "lora_variant", {}).get(key)).__name__
    plain = hasattr(layer, "lora_A") and not hasattr(layer, "lora_E") and ("Dora" in variant or variant == "NoneType")
    if plain and any(start is known or start == known for known in KEPT_STARTS):
        factors = partial(_factors, layer, key)
        return Layer(name, base, base, factors)
    now = partial(_merged, name, layer, key)
    now()  # refused now, not in the midst of training
    if getattr(config, "kasa_config", None) is not None:
        return Layer(name, now, seen=kind.matrix, lost="KaSA cuts the base weight when it is put on")
    if not hasattr(layer, "lora_A") or any(start is known or start == known for known in KEPT_STARTS):
        return Layer(name, now, base)
    if str(start).lower().startswith(SPLIT_STARTS):
        # the base weight lacks what the factors began with: their sum, before a step, is the weight it was
        return Layer(name, now, copied=lambda: _together(name, layer, key, now), seen=_unseen(kind))
    return Layer(name, now, seen=kind.matrix, lost=f"init_lora_weights = {start!r} changes the base weight")


def _together(name: str, layer: Any, key: str, now: Callable[[], Tensor]) -> Tensor:
    """Base weight and factors as one, before a step: then the columns of B are orthogonal, as PEFT has made them."""
    gram = layer.lora_B[key].weight.detach().double()
    gram = gram.t() @ gram
    size = gram.diagonal().sqrt().clamp_min(1e-300)
    if ((gram - gram.diagonal().diag()).abs() > 0.05 * size[:, None] * size).any():
        raise ValueError(
            f"probe: the factors of '{name}' have been trained already, and what they began with was taken out of the "
            "base weight, which is gone; give DecompositionCallback(initial=...)"
        )
    return now().clone()


def _unseen(kind: Any) -> Callable[[Tensor], Tensor]:
    """A weight as a file has it as (out, in); a copy of what was merged is that already."""
    return lambda weight: weight if weight.dtype == torch.float64 else kind.matrix(weight)


def _factors(layer: Any, key: str) -> FactorsOf:
    if key in layer.lora_embedding_A:
        A, B = _whole(layer.lora_embedding_A[key]), _whole(layer.lora_embedding_B[key])
    else:
        A, B = _whole(layer.lora_A[key].weight), _whole(layer.lora_B[key].weight)
    m = layer.lora_magnitude_vector[key].weight if key in layer.lora_magnitude_vector else None
    return A.flatten(1), B.flatten(1), layer.scaling[key], None if m is None else _whole(m).reshape(-1)


@torch.no_grad()
def _merged(name: str, layer: Any, key: str) -> Tensor:
    """The weight (out, in) that PEFT's own merge gives, float64; the layer stays as it is."""
    try:
        if distributed.is_sharded(layer):
            raise ValueError("its weights are shared among processes")
        twin = copy.deepcopy(layer).double()
        twin.merge(adapter_names=[key])
        plain = twin.get_base_layer()
        return kind_of(plain).matrix(plain.weight.detach())
    except Exception as error:  # of any kind: each method of PEFT has its own
        raise ValueError(
            f"probe: '{name}' is a {type(layer).__module__.rpartition('.')[0]}.{type(layer).__name__} of PEFT that "
            f"cannot be measured by merging a copy ({type(error).__name__}: {error}); leave it out of `kinds`"
        ) from None


def _active(name: str, module: Any) -> str:
    active = list(module.active_adapters) if hasattr(module, "active_adapters") else [module.active_adapter]
    if len(active) != 1:
        raise ValueError(f"probe: '{name}' has the adapters {active}; one, unmerged, is needed")
    return active[0]


def _starts(model: nn.Module) -> dict[str, Any]:
    """The configurations of PEFT's adapters by name."""
    found: Iterator[Any] = (getattr(module, "peft_config", None) for module in model.modules())
    return next((table for table in found if isinstance(table, dict)), {})


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded: then every process has to come by here."""
    return distributed.whole(tensor).detach()
