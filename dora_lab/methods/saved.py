"""Parameters that an adapter brings whole, put in the place of the base's and taken off again.

The base's own stay what they are: of two modules that share one, the other keeps it, as in PEFT (`modules_to_save`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_SAVED = "_saved_parameters"  # where a model keeps, by name, (the base's parameter, the one in its place)


def saved(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(The base's parameter, the one in its place) by name, of a model; {} for one that has none."""
    return dict(model.__dict__.get(_SAVED, {}))


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
