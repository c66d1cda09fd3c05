"""The layers that can be adapted, one class a kind: how each multiplies by its weight, seen as a matrix (out, in).

A kind knows the layout of its base weight and turns every product of an adapter into one that keeps that layout:
`base` by the frozen weight, `low` by A (rank, in), `up` by B (out, rank). What it takes and gives is what the layer
takes and gives: (..., in) -> (..., out) for linear layers, ids for embeddings, (N, channels, ...) for convolutions.
Shape suffixes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from dora_lab.decompose import wide

IDENTITY_ROWS = 256  # rows of the identity at a time that are pushed through a layer whose weight cannot be read


class Linear:
    """`torch.nn.Linear`: weight (out, in)."""

    name = "linear"
    zero = "lora_B"  # the factor that starts at zero
    is_matrix = True  # the layer is one matrix product, its weight at hand
    readable = True  # its weight is plain numbers

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
    """A linear layer that is used as it is, by its own forward alone: quantised, sharded, of a class we do not know.

    The products by the frozen weight that a norm needs are the layer's outputs for the rows of A and, once, for those
    of the identity. A layer that quantises its inputs quantises these. Where the layer has a weight of plain numbers,
    that is the weight, and the layer has been seen to act as it (see `kind_of`).
    """

    name = "opaque"
    is_matrix = False

    def __init__(self, layer: Any, *, readable: bool = False) -> None:
        self.out_features, self.in_features = int(layer.out_features), int(layer.in_features)
        self.readable = readable

    def product(self, layer: Any, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) without the bias, in the type that the layer gives; no hook is called."""
        if self.readable:  # its own forward may not do without its bias
            return F.linear(x.to(layer.weight.dtype), layer.weight)
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            x = x.to(weight.dtype)
        if bias is None:
            return layer.forward(x)
        layer.bias = None  # taken off the output again it would leave its rounding behind
        try:
            return layer.forward(x)
        finally:
            layer.bias = bias

    def dense(self, layer: Any, rows: slice | Tensor = slice(None)) -> Tensor:
        """Some rows of the weight, float32 or wider: its own, or by way of the identity."""
        if self.readable:
            return wide(layer.weight.detach()[rows])
        like = next(layer.parameters(), torch.empty(0))
        columns = []
        for start in range(0, self.in_features, IDENTITY_ROWS):
            size = min(IDENTITY_ROWS, self.in_features - start)
            eye = torch.zeros(size, self.in_features, device=like.device)
            eye[torch.arange(size), start + torch.arange(size)] = 1
            columns.append(self.product(layer, eye).float()[:, rows].t())
        return torch.cat(columns, dim=1)


class Merged(nn.Linear):
    """What a quantised layer is merged into: a float32 weight, in a model whose inputs may be of a narrower type."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of the input."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def kind_of(layer: nn.Module) -> Linear:
    """The kind of a layer; raises ValueError, saying why and what can be adapted, for one that is of none."""
    name, own = type(layer).__name__, vars(layer)
    if is_parametrized(layer) or any(isinstance(own.get(part), Tensor) for part in ("weight", "bias")):
        raise ValueError(
            f"the weight of this {name} is computed anew at each call (weight or spectral norm, pruning, a "
            "parametrization): there is no frozen base; make it plain first (remove_parametrizations(..., "
            "leave_parametrized=True), remove_weight_norm, remove_spectral_norm, prune.remove)"
        )
    weight = getattr(layer, "weight", None)
    readable = isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    own_forward = "forward" in own  # put over the class's by another tool, which means it to be called
    if readable and type(layer) in _KINDS and not own_forward:
        return _KINDS[type(layer)](layer)
    # what follows uses its out_proj's weight without calling it: an adapter there would do nothing
    called = name != "NonDynamicallyQuantizableLinear"
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    if called and all(isinstance(size, int) for size in sizes):
        if readable:
            _refuse_another_function(layer, own_forward)
        return Opaque(layer, readable=readable)
    what = f"{name} with a forward put over its own" if own_forward else name
    raise ValueError(
        f"a {what} cannot be adapted; what can: {', '.join(kind.__name__ for kind in _KINDS)} and "
        "linear layers with in_features and out_features that are called (quantised ones included)"
    )


@torch.no_grad()
def _refuse_another_function(layer: Any, own_forward: bool) -> None:
    """Raise ValueError if a layer whose forward is its own is seen to be more than x W0^T + bias.

    An adapter is part of the weight: of act(x W0^T) or 2 x W0^T it could neither be added nor merged.
    """
    weight: Tensor = layer.weight
    if weight.is_meta:
        if own_forward:
            raise ValueError("its weight is not in memory (offloaded): load the base without offloading")
        return
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    training = layer.training
    layer.eval()
    try:
        expected, seen = F.linear(x, weight, getattr(layer, "bias", None)), layer.forward(x)
        error = (seen - expected).abs().max().item() if seen.shape == expected.shape else math.inf
    except Exception as problem:  # any, of a forward that we do not know
        raise ValueError(
            f"the forward of this {type(layer).__name__} cannot be tried ({type(problem).__name__}: {problem}): it "
            "does not take one input for a weight (out, in); adapt another layer"
        ) from None
    finally:
        layer.train(training)
    if error > 100 * torch.finfo(weight.dtype).eps * (x.abs() @ weight.abs().t()).max().item():
        raise ValueError(
            f"the forward of this {type(layer).__name__} is more than the product by its weight (off by {error:.2g}): "
            "an adapter of the weight would be neither added nor merged; adapt another layer"
        )


_KINDS: dict[type, type[Linear]] = {
    nn.Linear: Linear,
    Conv1D: Transposed,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
}
