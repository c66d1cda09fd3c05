"""A model of two linear layers, and every method on it: what the tests of adapters have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tiny import small_method
from torch import Tensor, nn

from dora_lab.decompose import magnitude
from dora_lab.methods.catalog import methods
from dora_lab.methods.dora import DoraLinear
from dora_lab.methods.inject import adapted, inject
from dora_lab.spec import Method

TARGETS = ("first", "second")
NAMES = methods()


class Toy(nn.Module):
    """Two linear layers, with and without bias, and one that is never adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy().to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))


def method(name: str, **changes: Any) -> Method:
    return small_method(name, TARGETS, **changes)


def train(model: nn.Module, steps: int = 5, learning_rate: float = 0.05) -> None:
    """Move every trained parameter by a few steps of Adam on a fixed regression."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    x = inputs(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x[..., :3].sin()).pow(2).mean().backward()
        optimizer.step()


def dora_model(dtype: torch.dtype = torch.float64, **changes: Any) -> Toy:
    model = toy(dtype)
    inject(model, method("dora", **changes), seed=3)
    return model


def layers_of(model: nn.Module) -> list[DoraLinear]:
    return [layer for _, layer in adapted(model) if isinstance(layer, DoraLinear)]


def dense_dora(layer: DoraLinear, x: Tensor, *, detach: bool) -> Tensor:
    """Equation 5 with a dense V and autograd, nothing else."""
    V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    norm = V.pow(2).sum(1, keepdim=True).sqrt()
    return F.linear(x, layer.magnitude[:, None] * V / (norm.detach() if detach else norm), layer.bias)


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def check_gradients(product: Callable[..., Tensor], x: Tensor, bias: bool, through_norm: bool) -> None:
    """`product(layer, x, A, B, magnitude, norm_O)` of a DoRA layer (5 -> 4) against finite differences in float64.

    through_norm: whether the norm is taken anew from A and B at each point, or held constant.
    """
    layer = DoraLinear(nn.Linear(5, 4, bias=bias).double(), method("dora", rank=3), torch.Generator())
    nn.init.normal_(layer.lora_B)
    fixed_O = layer._norm()

    def output(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        norm_O = magnitude(layer.weight + layer.scaling * (B @ A)).detach() if through_norm else fixed_O
        return product(layer, x, A, B, m, norm_O)

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), layer.lora_A, layer.lora_B, layer.magnitude))
