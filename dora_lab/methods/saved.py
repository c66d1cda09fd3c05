"""Parameters that an adapter brings or trains whole, put in the place of the base's and taken off again.

The base's own stay what they are: of two modules that share one, the other keeps it, as in PEFT (`modules_to_save`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dora_lab.spec import did_you_mean

if TYPE_CHECKING:
    from dora_lab.methods.contract import AdaptedLinear

_SAVED = "_saved_parameters"  # where a model keeps, by name, (the base's parameter, the one in its place)


def saved(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(The base's parameter, the one in its place) by name, of a model; {} for one that has none."""
    return dict(model.__dict__.get(_SAVED, {}))


def whole_parameters(
    modules: Mapping[str, nn.Module], patterns: Collection[str], layers: Mapping[str, AdaptedLinear]
) -> dict[str, nn.Parameter]:
    """The base's parameters that train whole, by name: those whose full name has one of the patterns in it.

    Args: modules: all of the base, by name; layers: what stands in the place of some of them, by the same names.
    Raises ValueError for a pattern that is in no name, and for a parameter that cannot train by itself: shared by two
    modules, of an adapted layer and not its bias, or of a type in which small steps are rounded away.
    """
    every = {
        f"{path}.{leaf}".lstrip("."): parameter
        for path, module in modules.items()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    if idle := [pattern for pattern in patterns if not any(re.search(pattern, name) for name in every)]:
        near = did_you_mean(idle[0], {".".join(name.split(".")[-2:]) for name in every})
        raise ValueError(f"also_train: '{idle[0]}' is in no parameter's name; {near}")
    biases = {f"{name}.bias" for name, layer in layers.items() if layer.frozen is None}
    found = {name: every[name] for name in every if any(re.search(pattern, name) for pattern in patterns)}
    for name, parameter in found.items():
        if twin := next((other for other, one in every.items() if one is parameter and other != name), None):
            raise ValueError(f"also_train: '{name}' is '{twin}' as well, and the two would no longer be one")
        if name not in biases and any(name.startswith(f"{layer}.") for layer in layers):
            raise ValueError(f"also_train: '{name}' is of an adapted layer, of which a plain bias alone trains whole")
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"also_train: '{name}' is {parameter.dtype}, too coarse for small steps; load it in float32"
            )
    return found


def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give modules parameters of their own, frozen, in the type and the place of the base's.

    A `nn.Parameter` that was put and taken off is put back itself. Raises ValueError, and changes nothing, for a name
    that the model does not have or another shape.
    """
    places: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, tensor in tensors.items():
        try:
            before: Any = model.get_parameter(name)
        except AttributeError:
            raise ValueError(f"the base has no parameter '{name}'") from None
        if tensor.shape != before.shape:
            raise ValueError(f"'{name}' is {tuple(tensor.shape)}, the base's is {tuple(before.shape)}")
        same = isinstance(tensor, nn.Parameter)
        own = tensor if same else nn.Parameter(tensor.detach().to(before, copy=True), requires_grad=False)
        places[name] = (before, own)
    for name, (_, own) in places.items():
        _set(model, name, own)
    if places:
        model.__dict__[_SAVED] = saved(model) | places  # not registered: no part of the state dict


def take_off(model: nn.Module) -> dict[str, nn.Parameter]:
    """Put the base's parameters back; returns, by name, what was in their place."""
    found = saved(model)
    model.__dict__.pop(_SAVED, None)
    for name, (before, _) in found.items():
        _set(model, name, before)
    return {name: own for name, (_, own) in found.items()}


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)
