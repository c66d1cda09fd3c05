"""Passes of another kind than training's: of nothing, in inference mode, traced, vectorised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dora_lab import inject
from dora_lab.methods.inject import adapted
from dora_lab.spec import Method


def model(name: str, **fields: Any) -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(7, 9)).double()
    inject(found, Method(name=name, rank=2, alpha=4.0, target_modules=("0",), **fields), seed=0)
    with torch.no_grad():
        for _, layer in adapted(found):
            layer.lora_B.normal_()  # type: ignore[operator]
    return found


def weight(found: nn.Sequential) -> torch.Tensor:
    layer: Any = found[0]
    return layer.effective_weight()


CASES = [("lora", {}), ("dora", {}), ("dora", {"detach_norm": False}), ("dora", {"dropout": 0.1})]


@pytest.mark.parametrize(("name", "fields"), CASES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_an_empty_batch_gives_an_empty_output(name: str, fields: Any, training: bool, grad: bool) -> None:
    found = model(name, **fields).train(training)
    for shape in ((0, 7), (2, 0, 7)):
        with torch.set_grad_enabled(grad):
            y = found(torch.zeros(*shape).double())
        assert y.shape == (*shape[:-1], 9)
        if grad:
            y.sum().backward()


@pytest.mark.parametrize(("name", "fields"), CASES)
@pytest.mark.parametrize("tokens", [1, 64])
def test_gradients_after_a_pass_in_inference_mode(name: str, fields: Any, tokens: int) -> None:
    """The oracle is a layer that was never in inference mode."""
    x = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(1)).double()
    one, other = model(name, **fields).eval(), model(name, **fields).eval()
    with torch.inference_mode():
        first = one(x)
    for found in (one, other):
        found(x).pow(2).sum().backward()
    torch.testing.assert_close(first.clone(), other(x))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:  # the norm may be another in its last bit: it is computed with or without a product
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_vmap_grad_and_trace_give_what_the_weight_gives(name: str, fields: Any) -> None:
    found, x = model(name, **fields).eval(), torch.randn(5, 7).double()
    expected = F.linear(x, weight(found), found[0].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.func.vmap(found)(x), expected)
    torch.testing.assert_close(torch.func.jacrev(found)(x[0]), weight(found))
    traced: Any = torch.jit.trace(found, (x,))
    torch.testing.assert_close(traced(2 * x[:3]), found(2 * x[:3]))
    trained = {key: part for key, part in found.named_parameters() if part.requires_grad}

    def loss(trained: Any) -> Any:
        return torch.func.functional_call(found, trained, (x,)).pow(2).sum()

    grads = torch.func.grad(loss)(trained)
    loss(trained).backward()
    for key, part in trained.items():
        torch.testing.assert_close(grads[key], part.grad)


@pytest.mark.parametrize("fields", [{}, {"detach_norm": False}, {"dropout": 0.3, "dropout_form": "branch"}])
def test_gradients_of_gradients(fields: Any) -> None:
    """A penalty on the gradient of the input, of a layer used twice; the oracle is a dense V and autograd alone."""
    found, x = model("dora", **fields), torch.randn(5, 7).double()
    layer: Any = found[0]
    parts = (layer.lora_A, layer.lora_B, layer.magnitude)

    def plain(x: Any, rest: Any) -> Any:
        low = layer.scaling * layer.lora_B @ layer.lora_A
        norm = (layer.weight + low).norm(dim=1)
        norm = norm.detach() if layer.detach_norm else norm
        return layer.magnitude / norm * (x @ layer.weight.t() + x * rest @ low.t()) + layer.bias

    def penalty(call: Any) -> Any:
        given = x.clone().requires_grad_()
        y = call(torch.tanh(call(given, 0)[:, :7]), 1).pow(2).sum()
        return torch.autograd.grad(y, given, create_graph=True)[0].pow(2).sum()

    torch.manual_seed(3)
    mine = torch.autograd.grad(penalty(lambda x, _: layer(x)), parts)
    torch.manual_seed(3)
    kept = 1 - layer.dropout
    rests = [torch.empty(5, 7).double().bernoulli_(kept) / kept if layer.dropout else 1.0 for _ in range(2)]
    theirs = torch.autograd.grad(penalty(lambda x, which: plain(x, rests[which])), parts)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_published_dropout_takes_the_dense_products_of_lora() -> None:
    """What the authors' dropout asks of the base's weight besides is as sparse as the dropout (torch's own count)."""

    def flops(name: str, dropout: float) -> int:
        torch.manual_seed(0)
        found = nn.Sequential(nn.Linear(576, 576))
        inject(found, Method(name=name, rank=16, alpha=32.0, dropout=dropout, target_modules=("0",)), seed=0)
        x = torch.randn(128, 576, requires_grad=True)
        found(x).sum().backward()  # the norm is computed once for each step
        with FlopCounterMode(display=False) as counted:
            found(x).sum().backward()
        return counted.get_total_flops()

    assert flops("dora", 0.05) <= 1.05 * flops("lora", 0.05) < 0.7 * flops("dora", 0.4)
