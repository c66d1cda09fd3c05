"""Fine-tuning methods, one file each, found by name, and the contract that they share.

A file ``<name>.py`` here is the method `name`. It exposes

- ``FIELDS``: the fields of `dora_lab.spec.Method`, besides the name, that the method reads. Any other field must be at
  its default: a setting that changes nothing must not look as if it did;
- ``prepare(model, method, generator)``: changes `model` in place, decides which parameters are trained, and draws every
  random number from `generator`.

A method that adapts layers does so with a subclass of `AdaptedLinear`; nothing else in the lab knows a method by name.
Shape suffixes: O = out features, I = in features.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_lab.adapters._layers import Opaque, kind_of
from dora_lab.decompose import wide
from dora_lab.spec import Method, did_you_mean

_KEPT = "_adapted"  # where a merged layer keeps the adapted one


class AdaptedLinear(nn.Module):
    """A linear layer whose base weight is frozen and whose effect is that of another weight.

    In evaluation mode ``forward(x) == F.linear(x, effective_weight(), bias)`` up to rounding, and before training
    `effective_weight()` equals the base weight. The base weight and bias keep the names (`weight`, `bias`), the tensors
    and the layout of the layer that is replaced, so checkpoints and tied weights stay what they were; an opaque layer
    (quantised, see `_layers.Opaque`) is kept whole as `frozen`, and `weight` is None.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.kind = kind_of(layer)
        self.in_features, self.out_features = self.kind.in_features, self.kind.out_features
        self._replaced = (layer,)  # in a tuple: not a part of this module
        self.frozen: Any = None
        self.weight: Any = None
        self.bias: Any = None
        if isinstance(self.kind, Opaque):
            self.frozen = layer.requires_grad_(False)
        else:
            plain: Any = layer.requires_grad_(False)
            self.weight, self.bias = plain.weight, getattr(plain, "bias", None)  # (out, in) for nn.Linear; (out,)
        self.train(layer.training)

    @property
    def matrix(self) -> Tensor:
        """The base weight as (out, in), a view; an opaque layer's is built, in float32."""
        if isinstance(self.kind, Opaque):
            return self.kind.dense(self.frozen)
        return self.kind.matrix(self.weight)

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The base weight as (out, in), float32 (float64 on a float64 base), detached."""
        return wide(self.matrix.detach())

    def effective_weight(self) -> Tensor:
        """The weight that the layer acts with now: (out, in), float32 (float64 on a float64 base), detached."""
        return self.base_weight()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of the base product."""
        return self._base(x)

    def merge(self) -> nn.Module:
        """A frozen layer of the replaced one's class with the effective weight, in the base weight's type, and bias.

        An opaque layer becomes a float32 `nn.Linear`. Raises ValueError if the weight does not fit the type's range.
        """
        effective_OI = self.effective_weight()
        if isinstance(self.kind, Opaque):
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(effective_OI, requires_grad=False)
            if (bias := getattr(self.frozen, "bias", None)) is not None:
                linear.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
            return linear.train(self.training)
        rounded = self.kind.stored(effective_OI, self.weight).to(self.weight.dtype, copy=True)
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"the merged weight is not finite in {rounded.dtype}; merge into a wider type")
        merged: dict[int, Any] = {id(self.weight): nn.Parameter(rounded, requires_grad=False)}
        return copy.deepcopy(self.replaced(), merged).train(self.training)  # the weight alone is not copied

    def replaced(self) -> nn.Module:
        """The layer that was replaced, with its own tensors: the base, bit for bit."""
        layer: Any = self._replaced[0]
        if self.frozen is None:
            layer.weight = self.weight
            if self.bias is not None:
                layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return size if self.kind.name == "linear" else f"{size}, kind={self.kind.name}"

    def _base(self, x: Tensor, *, bias: bool = True) -> Tensor:
        """What the frozen layer gives, with its bias or without."""
        if isinstance(self.kind, Opaque):
            return self.frozen(x) if bias else self.kind.product(self.frozen, x)
        return self.kind.base(x, self.weight, self.bias if bias else None)


def methods() -> list[str]:
    """Names of the methods there are: the files of this package that do not begin with an underscore."""
    return sorted(item.name for item in pkgutil.iter_modules(__path__) if not item.name.startswith("_"))


def inject(model: nn.Module, method: Method, seed: int) -> dict[str, int]:
    """Prepare `model`, in place, to be fine-tuned by `method`; all that is drawn comes from `seed` (>= 0) alone.

    Returns ``{"trainable": ..., "total": ...}``, numbers of parameters (shared ones once, the adapters' included).
    Raises ValueError for an unknown method, a field the method does not read, target modules that do not exist.
    """
    module = _load(method.name)
    _refuse_unread(method, module)
    module.prepare(model, method, torch.Generator("cpu").manual_seed(seed))
    counted = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trainable": sum(n for n, trained in counted if trained), "total": sum(n for n, _ in counted)}


def adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(module name, layer) of every adapted layer, in the model's order; none for methods that wrap nothing."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def merge(model: nn.Module, *, keep: bool = True) -> nn.Module:
    """Replace every adapted layer, in place, by the plain layer it amounts to; returns `model`.

    For a float32 base this costs nothing but the last bits, and makes evaluation as fast as the base model's.
    keep: hold on to the adapted layers, so that `unmerge` can bring them back; costs the memory of the base's matrices.
    """
    for name, layer in list(adapted(model)):
        try:
            plain = layer.merge()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if keep:
            plain.__dict__[_KEPT] = layer  # not registered: no part of the state dict
        _replace(model, name, plain)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`, in place, bit for bit; returns `model`. Raises ValueError if nothing in it was merged and kept."""
    kept = {name: module.__dict__[_KEPT] for name, module in model.named_modules() if _KEPT in module.__dict__}
    if not kept:
        raise ValueError("nothing to unmerge: no layer of this model was merged by merge(model, keep=True)")
    for name, layer in kept.items():
        _replace(model, name, layer.train(model.training))
    return model


def detach(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Take the adapter off, in place: the base's own layers are put back, bit for bit.

    Returns the adapted layers by module name, for `attach`. They share the base's tensors, so many adapters of one base
    cost little more than their own parameters.
    """
    layers = dict(adapted(model))
    for name, layer in layers.items():
        _replace(model, name, layer.replaced())
    return layers


def attach(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> nn.Module:
    """Put adapted layers that `detach` gave back on their base, in place; returns `model`.

    Raises ValueError, and changes nothing, if a layer was made for other tensors than this model's, or if the model is
    adapted already: two adapters do not add up (m V / ||V|| of a sum is not the sum of two).
    """
    for name, layer in layers.items():
        module: Any = model.get_submodule(name)
        if isinstance(module, AdaptedLinear):
            raise ValueError(f"'{name}' is adapted already and adapters do not add up: detach(model) first")
        same = module is layer.frozen if layer.frozen is not None else getattr(module, "weight", None) is layer.weight
        if not same:
            raise ValueError(f"'{name}' does not hold the base weight that this adapter was made for")
    for name, layer in layers.items():
        _replace(model, name, layer.train(model.training))
    return model


def wrap(model: nn.Module, method: Method, make: Callable[[str, nn.Module, Method], AdaptedLinear]) -> None:
    """Freeze `model` and replace, in place, each layer that `method` names by ``make(name, layer, settings)``.

    Named are the modules whose leaf name is in `target_modules` or `magnitude_modules`; `settings` is `method` with the
    rank and alpha that `rank_pattern` and `alpha_pattern` give this layer. Nothing is changed if anything is refused.

    Raises ValueError if a name or pattern matches nothing (with near misses), or a layer that cannot be adapted.
    """
    targets = (*method.target_modules, *method.magnitude_modules)
    found = {name: module for name, module in model.named_modules() if name and _leaf(name) in targets}
    linear = {_leaf(name) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}
    if not targets:
        raise ValueError(f"method '{method.name}': target_modules is empty; {did_you_mean('', linear)}")
    for target in targets:
        if target not in {_leaf(name) for name in found}:
            raise ValueError(f"target_modules: no module is named '{target}'; {did_you_mean(target, linear)}")
        if targets.count(target) > 1:
            raise ValueError(f"target_modules: '{target}' is named twice (magnitude_modules included)")
    for pattern, _ in (*_patterns(method.rank_pattern), *_patterns(method.alpha_pattern)):
        if not any(_matches(pattern, name) for name in found):
            raise ValueError(f"pattern '{pattern}' matches none of the target modules")
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers: dict[str, AdaptedLinear] = {}
    try:
        for name, module in found.items():
            if isinstance(module, AdaptedLinear):
                raise ValueError("is adapted already and adapters do not add up: detach(model) or merge(model) first")
            layers[name] = make(name, module, _settings(method, name))
    except ValueError as error:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[path])
        raise ValueError(f"{name}: {error}") from None
    model.requires_grad_(False)
    for name, layer in layers.items():
        _replace(model, name, layer)


def _settings(method: Method, name: str) -> Method:
    """The method with the rank and alpha of one module."""
    ranks = [int(value) for pattern, value in _patterns(method.rank_pattern) if _matches(pattern, name)]
    alphas = [value for pattern, value in _patterns(method.alpha_pattern) if _matches(pattern, name)]
    return replace(method, rank=(ranks or [method.rank])[0], alpha=(alphas or [method.alpha])[0])


def _patterns(pairs: tuple[str, ...]) -> list[tuple[str, float]]:
    """("pattern", value) of each "pattern=value"."""
    return [(pattern, float(value)) for pattern, _, value in (pair.rpartition("=") for pair in pairs)]


def _matches(pattern: str, name: str) -> bool:
    """As in PEFT: the pattern is the end of the module's name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _load(name: str) -> ModuleType:
    if name not in (known := methods()):
        raise ValueError(f"unknown method '{name}'; {did_you_mean(name, known)}")
    return importlib.import_module(f"{__name__}.{name}")


def _refuse_unread(method: Method, module: ModuleType) -> None:
    for item in fields(Method):
        value = getattr(method, item.name)
        if item.name != "name" and item.name not in module.FIELDS and value != item.default:
            raise ValueError(
                f"method '{method.name}' does not read {item.name} = {value!r}; leave it at {item.default!r} "
                f"(it reads: {', '.join(module.FIELDS) or 'nothing'})"
            )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
