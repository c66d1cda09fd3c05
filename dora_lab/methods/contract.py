"""What an adapted layer is: the contract that every method's layers keep.

Shape suffixes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import copy
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor, nn

from dora_lab.decompose import wide
from dora_lab.methods.layers import Merged, Opaque, kind_of
from dora_lab.spec import Method

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip
FactorsOf = tuple[Tensor, Tensor, float, Tensor | None]  # A (rank, in), B (out, rank), s, m (out,) or none


class AdaptedLinear(nn.Module):
    """A linear layer whose base weight is frozen and whose effect is that of another weight.

    In evaluation mode ``forward(x) == F.linear(x, effective_weight(), bias)`` up to rounding, and before training
    `effective_weight()` equals the base weight. The base weight and bias keep the names (`weight`, `bias`), the tensors
    and the layout of the layer that is replaced, so checkpoints and tied weights stay what they were; an opaque layer
    (quantised, see `layers.Opaque`) is kept whole as `frozen`, and `weight` is None. Hooks belong to the place in the
    model: the layer replaced, the adapted and the merged one share them, and each is called around the layer once. What
    else others may read of the replaced layer (`stride`, `padding_idx`, ...) is found here too.
    """

    method: Method | None = None  # the method, whole, that it is a layer of: `wrap` says so
    dropout: float = 0.0  # probability, of the input of what is trained

    def __init_subclass__(cls) -> None:
        """A class that redefines anything of its parent computes something else: its parent's factors are not its own.

        It defines `factors` itself where there are such. (Dunders aside: FSDP2 makes classes of its own from ours.)
        """
        super().__init_subclass__()
        owner = next(parent for parent in cls.__mro__ if "factors" in vars(parent))
        ours = {name for parent in owner.__mro__ if issubclass(parent, AdaptedLinear) for name in vars(parent)}
        for name in ours - vars(nn.Module).keys() | {"forward"}:  # a mixin may bring another forward as well
            if not name.startswith("__") and getattr_static(cls, name) is not getattr_static(owner, name):
                cls.factors = AdaptedLinear.factors

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        _share_hooks(layer, self)
        own = dir(self)
        for name, value in vars(layer).items():  # what others may read of the layer beside calling it
            if not name.startswith("_") and name not in own and not isinstance(value, nn.Module | Tensor):
                setattr(self, name, value)
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

    @property
    def offset(self) -> Tensor | None:
        """The bias, (out,), if there is one."""
        return self.bias if self.frozen is None else getattr(self.frozen, "bias", None)

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The base weight as (out, in), float32 (float64 on a float64 base), detached."""
        return wide(self.matrix.detach())

    def effective_weight(self) -> Tensor:
        """The weight that the layer acts with now: (out, in), float32 (float64 on a float64 base), detached."""
        return self.base_weight()

    def factors(self) -> FactorsOf | None:
        """(A, B, s, m) with effective weight V = W0 + s B A, or m V / ||V|| if there is an m; None if it is no such.

        The layer's own tensors, not copies. A of rank 0 says that the magnitude alone is trained. What has factors is
        saved in the formats of PEFT and of the authors, anything else as its `trained_state`.
        """
        return None

    def trained_state(self) -> dict[str, Tensor]:
        """What is saved and resumed, by name: the state of the layer that is not the base's, its own tensors."""
        state = self.state_dict(keep_vars=True)
        return {name: state[name] for name in state if name.partition(".")[0] not in ("weight", "bias", "frozen")}

    def unmoved(self) -> str | None:
        """After training: a part that was not trained though the rest was, in words; None if all is as it should be."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of the base product."""
        return self._base(x)

    def merge(self) -> nn.Module:
        """A frozen layer of the replaced one's class with the effective weight, in the base weight's type, and bias.

        A quantised layer becomes a float32 linear one that takes and gives what the layer did (`layers.Merged`). Raises
        ValueError if the weight does not fit the type's range.
        """
        effective_OI = self.effective_weight()
        if isinstance(self.kind, Opaque) and not self.kind.readable:
            linear = Merged(self.in_features, self.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(effective_OI, requires_grad=False)
            if self.offset is not None:
                linear.bias = nn.Parameter(self.offset.detach().float(), requires_grad=False)
            _share_hooks(self, linear)
            return linear.train(self.training)
        layer: Any = self.replaced()
        rounded = self.kind.stored(effective_OI, layer.weight).to(layer.weight.dtype, copy=True)
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"the merged weight is not finite in {rounded.dtype}; merge into a wider type")
        kept: dict[int, Any] = {id(hooks): hooks for name in _HOOKS if (hooks := vars(layer)[name]) is not None}
        kept[id(layer.weight)] = nn.Parameter(rounded, requires_grad=False)
        return copy.deepcopy(layer, kept).train(self.training)  # the weight alone is not copied, nor are hooks

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
            return self.frozen.forward(x) if bias else self.kind.product(self.frozen, x)
        return self.kind.base(x, self.weight, self.bias if bias else None)


def is_traced() -> bool:
    """Is this pass recorded or transformed (compiled, `torch.jit.trace`, `torch.func`)? Its tensors have no numbers."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def _share_hooks(layer: nn.Module, other: nn.Module) -> None:
    """Give `other` the hooks of `layer`, the very ones: whose handle is removed is removed from both."""
    for name in (*_HOOKS, "_is_full_backward_hook"):
        vars(other)[name] = vars(layer)[name]
