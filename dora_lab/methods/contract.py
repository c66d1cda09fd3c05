"""What an adapted layer is: the contract that every method's layers keep.

Shape suffixes: O = out features, I = in features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dora_lab.decompose import wide
from dora_lab.methods.layers import Opaque, kind_of


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
