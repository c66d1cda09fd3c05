"""The layers that can be adapted, one class a kind: how each multiplies by its weight, seen as a matrix (out, in).

A kind knows the layout of its base weight and turns every product of an adapter into one that keeps that layout:
`base` by the frozen weight, `low` by A (rank, in), `up` by B (out, rank). What it takes and gives is what the layer
takes and gives: (..., in) -> (..., out) for linear layers, ids for embeddings, (N, channels, ...) for convolutions.
Shape suffixes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IDENTITY_ROWS = 256  # rows of the identity at a time that are pushed through a layer whose weight cannot be read


class Linear:
    """`torch.nn.Linear`: weight (out, in)."""

    name = "linear"
    zero = "lora_B"  # the factor that starts at zero
    is_matrix = True  # the layer is one matrix product, its weight at hand

    def __init__(self, layer: Any) -> None:
        self.out_features, self.in_features = self.matrix(layer.weight).shape

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, in), a view."""
        return weight

    def stored(self, W_OI: Tensor, weight: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of `weight`, contiguous."""
        return W_OI

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The frozen layer itself."""
        return F.linear(x, self.matrix(weight), bias)

    def low(self, x: Tensor, A_RI: Tensor) -> Tensor:
        """The product by A, in the type of A."""
        return F.linear(x.to(A_RI.dtype), A_RI)

    def up(self, h: Tensor, B_OR: Tensor) -> Tensor:
        """The product of what `low` gave by B."""
        return F.linear(h, B_OR)

    def across(self, v_O: Tensor) -> Tensor:
        """One number per output feature, shaped to multiply an output."""
        return v_O


class Transposed(Linear):
    """`transformers.pytorch_utils.Conv1D` (GPT-2): a linear layer with its weight stored as (in, out)."""

    name = "conv1d"

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, in), a view."""
        return weight.t()

    def stored(self, W_OI: Tensor, weight: Tensor) -> Tensor:
        """A matrix (out, in) as (in, out), contiguous."""
        return W_OI.t().contiguous()


class Embedding(Transposed):
    """`torch.nn.Embedding`: a linear layer of one-hot rows, its weight stored as (vocabulary, dim) = (in, out).

    The magnitude is one per output feature here too, (dim,), as in PEFT. A starts at zero and B is drawn: a token's
    column of A is trained when the token is seen.
    """

    name = "embedding"
    is_matrix = False
    zero = "lora_A"

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__(layer)
        if layer.max_norm is not None:
            raise ValueError("max_norm writes into the base weight at every use; an adapter needs it frozen")
        self.padding_idx, self.by_frequency = layer.padding_idx, layer.scale_grad_by_freq

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The rows of the token ids."""
        return F.embedding(x, weight)

    def low(self, x: Tensor, A_RI: Tensor) -> Tensor:
        """The columns of A of the token ids."""
        return F.embedding(x, A_RI.t(), self.padding_idx, scale_grad_by_freq=self.by_frequency)


class Conv(Linear):
    """`torch.nn.Conv1d`, `Conv2d`, `Conv3d`: the matrix is (out channels, in channels x kernel)."""

    name = "conv"
    is_matrix = False

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise ValueError(
                f"a convolution with groups = {layer.groups}, padding_mode = '{layer.padding_mode}' cannot be adapted; "
                "only groups = 1 and zeros can"
            )
        self.shape = tuple(layer.weight.shape[1:])
        self.how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (out, in), a view."""
        return weight.flatten(1)

    def stored(self, W_OI: Tensor, weight: Tensor) -> Tensor:
        """A matrix (out, in) as the weight of the convolution."""
        return W_OI.view(weight.shape)

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution."""
        return self._convolve(x, weight, bias, **self.how)

    def low(self, x: Tensor, A_RI: Tensor) -> Tensor:
        """The same convolution with A as its weight: `rank` channels."""
        return self._convolve(x.to(A_RI.dtype), A_RI.view(-1, *self.shape), None, **self.how)

    def up(self, h: Tensor, B_OR: Tensor) -> Tensor:
        """A convolution with a kernel of one."""
        return self._convolve(h, B_OR.view(*B_OR.shape, *(1 for _ in self.shape[1:])), None)

    def across(self, v_O: Tensor) -> Tensor:
        """One number per channel."""
        return v_O.view(-1, *(1 for _ in self.shape[1:]))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        return (F.conv1d, F.conv2d, F.conv3d)[len(self.shape) - 2](x, weight, bias, **how)


class Opaque(Linear):
    """A linear layer whose weight is not to be read: quantised, sharded, or of a class that we do not know.

    It is used as it is, by its forward alone. The products by the frozen weight that a norm needs are the layer's
    outputs for the rows of A and, once, for those of the identity. A layer that quantises its inputs quantises these.
    """

    name = "opaque"
    is_matrix = False

    def __init__(self, layer: Any) -> None:
        self.out_features, self.in_features = int(layer.out_features), int(layer.in_features)

    @staticmethod
    def product(layer: Any, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) without the bias, in the type that the layer gives."""
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            x = x.to(weight.dtype)
        if bias is None:
            return layer(x)
        layer.bias = None  # taken off the output again it would leave its rounding behind
        try:
            return layer(x)
        finally:
            layer.bias = bias

    def dense(self, layer: Any, rows: slice | Tensor = slice(None)) -> Tensor:
        """Some rows of the weight, float32, by way of the identity."""
        like = next(layer.parameters(), torch.empty(0))
        columns = []
        for start in range(0, self.in_features, IDENTITY_ROWS):
            size = min(IDENTITY_ROWS, self.in_features - start)
            eye = torch.zeros(size, self.in_features, device=like.device)
            eye[torch.arange(size), start + torch.arange(size)] = 1
            columns.append(self.product(layer, eye).float()[:, rows].t())
        return torch.cat(columns, dim=1)


def kind_of(layer: nn.Module) -> Linear:
    """The kind of a layer; raises ValueError, saying what can be adapted, for one that is of none."""
    weight = getattr(layer, "weight", None)
    readable = isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if readable and type(layer) in _KINDS:
        return _KINDS[type(layer)](layer)
    # what follows uses its out_proj's weight without calling it: an adapter there would do nothing
    called = type(layer).__name__ != "NonDynamicallyQuantizableLinear"
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    if called and all(isinstance(size, int) for size in sizes):
        return Opaque(layer)
    raise ValueError(
        f"a {type(layer).__name__} cannot be adapted; what can: {', '.join(kind.__name__ for kind in _KINDS)} and "
        "linear layers with in_features and out_features that are called (quantised ones included)"
    )


_KINDS: dict[type, type[Linear]] = {
    nn.Linear: Linear,
    Conv1D: Transposed,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
}
