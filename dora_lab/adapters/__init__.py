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

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab.decompose import wide
from dora_lab.spec import Method, did_you_mean


class AdaptedLinear(nn.Module):
    """A linear layer whose base weight is frozen and whose effect is that of another weight.

    In evaluation mode ``forward(x) == F.linear(x, effective_weight(), bias)`` up to rounding, and before training
    `effective_weight()` equals the base weight. The base weight and bias keep the names (`weight`, `bias`) and the
    tensors of the `nn.Linear` that is replaced, so checkpoints and tied weights stay what they were.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight.requires_grad_(False)  # (out, in)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)  # (out,)
        self.train(linear.training)

    def effective_weight(self) -> Tensor:
        """The weight that the layer acts with now: (out, in), float32 (float64 on a float64 base), detached."""
        return wide(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of the base product."""
        return F.linear(x, self.weight, self.bias)

    def merge(self) -> nn.Linear:
        """A frozen `nn.Linear` with the effective weight, in the base weight's type (which may round), and the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.effective_weight().to(self.weight.dtype, copy=True), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


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


def merge(model: nn.Module) -> nn.Module:
    """Replace every adapted layer, in place, by the plain linear layer it amounts to; returns `model`.

    For a float32 base this costs nothing but the last bits, and makes evaluation as fast as the base model's.
    """
    for name, layer in list(adapted(model)):
        _replace(model, name, layer.merge())
    return model


def wrap(model: nn.Module, method: Method, make: Callable[[nn.Linear], AdaptedLinear]) -> None:
    """Freeze `model` and replace, in place, each linear layer with a name in `method.target_modules` by `make` of it.

    Raises ValueError if a name matches nothing (with near misses), or something that is not a plain `nn.Linear`.
    """
    found = {name: module for name, module in model.named_modules() if _leaf(name) in method.target_modules}
    linear = {_leaf(name) for name, module in model.named_modules() if type(module) is nn.Linear}
    if not method.target_modules:
        raise ValueError(f"method '{method.name}': target_modules is empty; {did_you_mean('', linear)}")
    for target in method.target_modules:
        if target not in {_leaf(name) for name in found}:
            raise ValueError(f"target_modules: no module is named '{target}'; {did_you_mean(target, linear)}")
    for name, module in found.items():
        # subclasses of nn.Linear are quantised or otherwise special: their weight is not what it seems
        if type(module) is not nn.Linear:
            raise ValueError(f"target_modules: '{name}' is a {type(module).__name__}, only nn.Linear can be adapted")
    model.requires_grad_(False)
    for name, module in found.items():
        assert isinstance(module, nn.Linear)
        try:
            layer = make(module)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        _replace(model, name, layer)


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
