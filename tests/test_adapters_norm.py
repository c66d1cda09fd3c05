"""DoRA's norm, factored and kept between steps; compiled, copied, with rows of zeros and with dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import dense_dora, dora_model, inputs, layers_of, method, toy, train

from dora_lab.decompose import magnitude
from dora_lab.methods.dora import DoraLinear
from dora_lab.methods.inject import inject


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_factored_norm_is_the_direct_norm(dtype: torch.dtype, size: float) -> None:
    layer = DoraLinear(nn.Linear(96, 64).to(dtype), method("dora", rank=8), torch.Generator())
    nn.init.normal_(layer.lora_B, std=size)
    exact = magnitude(layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double())
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(layer._norm().double(), exact, rtol=rtol, atol=0)
    torch.testing.assert_close(layer._direct_norm().double(), exact, rtol=rtol, atol=0)


def test_a_row_whose_square_cancels_is_taken_directly() -> None:
    layer = DoraLinear(nn.Linear(16, 16), method("dora", rank=16, alpha=16.0), torch.Generator())
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(16))
        layer.lora_B.copy_(-layer.weight * 0.9995)  # V is 0.0005 W0
        layer.lora_B[0] = -layer.weight[0]  # V is zero
    norm_O = layer._norm()
    exact = magnitude(layer.weight.double() + layer.lora_B.double())
    torch.testing.assert_close(norm_O.double(), exact, rtol=1e-5, atol=0)
    assert norm_O[0] == 0
    assert torch.isfinite(layer(torch.randn(3, 16))).all()


def test_the_norm_is_computed_once_per_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DoraLinear(nn.Linear(12, 20), method("dora"), torch.Generator())
    counted: list[int] = []
    compute = layer._factored_norm
    monkeypatch.setattr(layer, "_factored_norm", lambda *args: counted.append(1) or compute(*args))
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        for _ in range(4):
            layer(inputs()).pow(2).sum().backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            layer(inputs())
    assert len(counted) == 2, "once before the first step is known from the start, then once after each step"


@pytest.mark.parametrize("write", ["data", "no_grad", "optimizer", "load", "swap", "weight", "scaling"])
def test_a_kept_norm_is_never_stale(write: str) -> None:
    layer = DoraLinear(nn.Linear(12, 20), method("dora"), torch.Generator())
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(2))
    layer(inputs())
    if write == "data":
        layer.lora_B.data.mul_(3.0)  # leaves no trace in the version
    elif write == "no_grad":
        with torch.no_grad():
            layer.lora_A.add_(0.1)
    elif write == "optimizer":
        layer(inputs()).sum().backward()
        torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1).step()
    elif write == "load":
        layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})
    elif write == "swap":
        layer.lora_B = nn.Parameter(layer.lora_B.detach() * 2)
    elif write == "weight":
        with torch.no_grad():
            layer.weight.mul_(2.0)
    else:
        layer.scaling *= 2
    x = inputs()
    torch.testing.assert_close(layer(x), F.linear(x, layer.effective_weight(), layer.bias))
    torch.testing.assert_close(layer._norm(), layer._direct_norm())


def test_a_model_that_writes_into_the_output_gets_its_gradients() -> None:
    grads = []
    for in_place in (True, False):
        layer = DoraLinear(nn.Linear(12, 20).double(), method("dora"), torch.Generator().manual_seed(3))
        with torch.no_grad():
            layer.weight.copy_(torch.arange(240.0).view(20, 12).sin())
            layer.lora_B.copy_(torch.arange(80.0).view(20, 4).cos())
            assert layer.bias is not None
            layer.bias.fill_(0.3)
            layer.magnitude.fill_(0.7)
        y = layer(inputs(torch.float64))
        y = y.add_(1.0) if in_place else y + 1.0
        y.pow(2).sum().backward()
        grads.append([p.grad for p in (layer.lora_A, layer.lora_B, layer.magnitude)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_magnitude_of_zero_still_learns() -> None:
    model = dora_model()
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.magnitude[2] = 0
    x = inputs(torch.float64)
    seen, expected = layer(x), dense_dora(layer, x, detach=True)
    (one,) = torch.autograd.grad(seen.pow(2).sum(), layer.magnitude)
    (other,) = torch.autograd.grad(expected.pow(2).sum(), layer.magnitude)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert one[2] != 0


def test_gradient_checkpointing_copies_pickles_and_compilation(tmp_path: Any) -> None:
    model = toy()
    inject(model, method("dora"), seed=3)
    train(model)
    x = inputs().requires_grad_()
    plain = torch.autograd.grad(model(x).pow(2).sum(), [p for p in model.parameters() if p.requires_grad])
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).pow(2).sum(),
        [p for p in model.parameters() if p.requires_grad],
    )
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))


@pytest.mark.parametrize("detach", [True, False])
def test_compiled_without_a_graph_break_it_is_the_same(detach: bool) -> None:
    layer = layers_of(dora_model(detach_norm=detach))[0]
    nn.init.constant_(layer.lora_B, 0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(torch.float64)
    weights = [layer.lora_A, layer.lora_B, layer.magnitude]
    plain, seen = layer(x), compiled(x)
    torch.testing.assert_close(seen, plain, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(seen.pow(2).sum(), weights), torch.autograd.grad(plain.pow(2).sum(), weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_rows_of_zeros_are_defined(detach: bool, dropout: float) -> None:
    model = toy()
    with torch.no_grad():
        model.first.weight[3] = 0
        model.second.weight.zero_()
    before = model(inputs())
    inject(model, method("dora", detach_norm=detach, dropout=dropout), seed=3)
    assert torch.equal(model(inputs()), before)
    for _ in range(3):
        model.zero_grad()
        model(inputs()).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all(), name
                parameter.data -= 0.1 * parameter.grad
        assert all(torch.isfinite(layer.effective_weight()).all() for layer in layers_of(model))
    assert layers_of(model)[0].lora_B[3].abs().max() > 0, "a row of zeros cannot begin to move"


@pytest.mark.parametrize("dropout", [0.08, 0.4])  # with sparse products and without
def test_published_and_branch_dropout_as_written(dropout: float) -> None:
    for form in ("published", "branch"):
        model = dora_model(dropout=dropout, dropout_form=form)
        train(model)
        layer = layers_of(model)[0]
        x = inputs(torch.float64)
        torch.manual_seed(5)
        seen = layer(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, dropout)
        g = layer.magnitude / magnitude(layer.weight + layer.scaling * layer.lora_B @ layer.lora_A)
        low = layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T
        if form == "published":
            expected = x @ layer.weight.T + (g - 1) * (dropped @ layer.weight.T) + g * low
        else:
            expected = g * (x @ layer.weight.T) + g * low
        torch.testing.assert_close(seen, expected + model.first.bias, rtol=1e-12, atol=1e-12)
        model.eval()
        assert not torch.allclose(layer(x), seen)
