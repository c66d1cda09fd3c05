"""The adapter contract, over every method there is; LoRA and DoRA against PEFT and against autograd."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import small_method
from torch import Tensor, nn

import dora_lab
from dora_lab.decompose import magnitude
from dora_lab.methods import dora, dora_autograd, narrow
from dora_lab.methods.catalog import methods
from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.dora import DoraLinear
from dora_lab.methods.dora_autograd import Blocked, Decomposed
from dora_lab.methods.inject import adapted, inject, merge
from dora_lab.methods.lora import LoraLinear
from dora_lab.methods.steady import HOLDS
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


# --- the contract


def test_the_methods_of_the_paper_are_there() -> None:
    assert {"base", "ft", "lora", "dora"} <= set(NAMES)
    assert dora_lab.inject is inject


@pytest.mark.parametrize("name", NAMES)
def test_identity_before_training(name: str) -> None:
    model, before = toy(), toy()
    counts = inject(model, method(name), seed=3)
    assert torch.equal(model(inputs()), before(inputs())), "output differs before training"
    assert torch.equal(model.eval()(inputs()), before(inputs()))
    for module, layer in adapted(model):
        W0: Any = before.get_submodule(module).weight
        assert torch.equal(layer.effective_weight(), W0)
    parameters = list(model.parameters())
    assert counts["total"] == sum(p.numel() for p in parameters)
    assert counts["trainable"] == sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_after_training_the_layer_is_its_effective_weight(name: str) -> None:
    model = toy()
    inject(model, method(name), seed=3)
    train(model)
    model.eval()
    for _, layer in adapted(model):
        x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(2))
        weight = layer.effective_weight()
        assert weight.dtype == torch.float32 and weight.shape == (layer.out_features, layer.in_features)
        assert not weight.requires_grad
        assert not torch.allclose(weight, layer.weight), "training moved nothing"
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
        torch.testing.assert_close(layer(x[0]), F.linear(x[0], weight, layer.bias))


@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_frozen_and_the_adapter_trained(name: str) -> None:
    model, before = toy(), toy()
    inject(model, method(name), seed=3)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    train(model)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trained
    if any(True for _ in adapted(model)):
        assert not trained & set(before.state_dict()), "a parameter of the base is trained"
        for key, value in before.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_merging_changes_no_output(name: str) -> None:
    model = toy()
    inject(model, method(name), seed=3)
    train(model)
    expected = model.eval()(inputs())
    assert merge(model) is model
    assert not list(adapted(model)) and type(model.first) is nn.Linear and type(model.second) is nn.Linear
    torch.testing.assert_close(model(inputs()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_one_start_and_no_global_generator_is_touched(name: str) -> None:
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    fresh = generator.get_state()
    importlib.import_module(f"dora_lab.methods.{name}").prepare(toy(), method(name), generator)
    draws = not torch.equal(generator.get_state(), fresh)
    starts = []
    for seed, dtype in ((3, torch.float32), (3, torch.float32), (4, torch.float32), (3, torch.float64)):
        model = toy(dtype)
        inject(model, method(name), seed)
        starts.append([value.float() for key, value in model.state_dict().items() if key not in toy().state_dict()])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, starts[0], starts[1]))
    assert draws != all(map(torch.equal, starts[0], starts[2])), "what is drawn, and it alone, differs by the seed"
    # float64 norms differ in their last bits from float32's; the drawn numbers do not
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(starts[0], starts[3], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name: str) -> None:
    model, other = toy(), toy()
    inject(model, method(name), seed=3)
    train(model)
    inject(other, method(name), seed=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(inputs()), model.eval()(inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_base_is_the_identity_too(name: str, dtype: torch.dtype) -> None:
    model, before = toy(dtype), toy(dtype)
    inject(model, method(name), seed=3)
    x = inputs(dtype)
    assert model(x).dtype == dtype
    assert torch.equal(model(x), before(x))
    for _, layer in adapted(model):
        assert layer.effective_weight().dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    train(model)
    # Adam's epsilon is zero in float16: what is trained in it is lost, whatever we do
    assert torch.isfinite(model(x)).all() or (name, dtype) == ("ft", torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_rounds_products_alone(name: str) -> None:
    model, before = toy(), toy()
    inject(model, method(name), seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs()), before(inputs())), "not the identity under autocast"
    train(model)
    for _, layer in adapted(model):
        expected = layer.effective_weight()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.effective_weight(), expected)
            x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(2))
            seen = layer(x)
        assert seen.dtype == torch.bfloat16
        torch.testing.assert_close(seen.float(), F.linear(x, expected, layer.bias), rtol=0.02, atol=0.02)


# --- what is refused


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Method(name="dorra"), "unknown method 'dorra'; did you mean 'dora'?"),
        (Method(name="_contract"), "unknown method"),
        (method("dora", target_modules=("first", "secnd")), "no module is named 'secnd'; did you mean 'second'?"),
        (method("lora", target_modules=()), "target_modules is empty; choices: first, head, second"),
        (method("dora", rank=9), "second: rank = 9 must be in 1 .. 8"),
        (method("lora", rank=0), "first: rank = 0 must be in 1 .. 12"),
        (method("dora", rank=None), "method 'dora' needs rank and alpha"),
        (method("ft", rank=4), "method 'ft' does not read rank = 4"),
        (method("lora", detach_norm=False), "method 'lora' does not read detach_norm = False"),
        (method("base", target_modules=("first",)), "method 'base' does not read target_modules"),
    ],
)
def test_wrong_methods_are_refused(wrong: Method, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        inject(toy(), wrong, seed=0)
    assert words in str(caught.value)


def test_a_layer_by_itself_is_frozen() -> None:
    for name, kind in (("lora", LoraLinear), ("dora", DoraLinear)):
        layer = kind(nn.Linear(6, 5), method(name), torch.Generator())
        assert not layer.weight.requires_grad and layer.bias is not None and not layer.bias.requires_grad


def test_layers_that_cannot_be_adapted_are_refused_and_nothing_is_changed() -> None:
    model = toy()
    model.add_module("norm", nn.LayerNorm(3))
    with pytest.raises(ValueError, match="norm: a LayerNorm cannot be adapted; what can: Linear, "):
        inject(model, method("lora", target_modules=("first", "norm")), seed=0)
    assert not list(adapted(model)) and all(parameter.requires_grad for parameter in model.parameters())
    inject(model, method("lora"), seed=0)
    with pytest.raises(ValueError, match=r"first: is adapted already and adapters do not add up: detach\(model\)"):
        inject(model, method("dora"), seed=0)


# --- DoRA itself


def dora_model(dtype: torch.dtype = torch.float64, **changes: Any) -> Toy:
    model = toy(dtype)
    inject(model, method("dora", **changes), seed=3)
    return model


def layers_of(model: nn.Module) -> list[DoraLinear]:
    return [layer for _, layer in adapted(model) if isinstance(layer, DoraLinear)]


def test_the_magnitude_really_moves() -> None:
    model = dora_model(torch.float32)
    start = [layer.magnitude.detach().clone() for layer in layers_of(model)]
    train(model)
    for layer, m0 in zip(layers_of(model), start, strict=True):
        torch.testing.assert_close(m0, magnitude(layer.weight), rtol=3e-7, atol=0)
        assert not torch.isclose(layer.magnitude, m0).any(), "an output feature's magnitude did not move"
        # and it is the magnitude of the weight that the layer acts with
        torch.testing.assert_close(magnitude(layer.effective_weight()), layer.magnitude.detach().abs())


def test_dora_starts_as_lora_and_is_another_function() -> None:
    plain, decomposed = toy(), toy()
    inject(plain, method("lora"), seed=3)
    inject(decomposed, method("dora"), seed=3)
    for a, b in zip(adapted(plain), adapted(decomposed), strict=True):
        assert isinstance(a[1], LoraLinear) and isinstance(b[1], DoraLinear)
        assert torch.equal(a[1].lora_A, b[1].lora_A), "one seed should mean one start for both"
        for layer in (a[1], b[1]):
            nn.init.constant_(layer.lora_B, 0.1)
        assert not torch.allclose(a[1].effective_weight(), b[1].effective_weight())


def dense_dora(layer: DoraLinear, x: Tensor, *, detach: bool) -> Tensor:
    """Equation 5 with a dense V and autograd, nothing else."""
    V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    norm = V.pow(2).sum(1, keepdim=True).sqrt()
    return F.linear(x, layer.magnitude[:, None] * V / (norm.detach() if detach else norm), layer.bias)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("block", [1, 40, 2**17])
def test_gradients_of_equations_6_7_and_11(detach: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dora.BLOCK, "cpu", block)  # one row, a few rows, all rows at a time
    model = dora_model(detach_norm=detach)
    train(model)
    for layer in layers_of(model):
        assert (layer.detach_norm, layer.training) == (detach, True)
        x = torch.randn(6, layer.in_features, dtype=torch.float64, requires_grad=True)
        weights = [x, layer.lora_A, layer.lora_B, layer.magnitude]
        seen, expected = layer(x), dense_dora(layer, x, detach=detach)
        torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(seen)
        for a, b in zip(
            torch.autograd.grad(seen, weights, upstream), torch.autograd.grad(expected, weights, upstream), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_gradient_through_the_norm_is_another() -> None:
    gradients = []
    for detach in (True, False):
        model = dora_model(detach_norm=detach)
        nn.init.constant_(layers_of(model)[0].lora_B, 0.3)
        model(inputs(torch.float64)).sum().backward()
        grad = layers_of(model)[0].lora_B.grad
        assert grad is not None
        gradients.append(grad)
    assert not torch.allclose(*gradients)


def test_equation_6_is_orthogonal_to_v() -> None:
    layer = DoraLinear(nn.Linear(12, 20).double(), method("dora", rank=12, detach_norm=False), torch.Generator())
    nn.init.constant_(layer.lora_B, 0.3)
    layer.lora_A = nn.Parameter(torch.eye(12, dtype=torch.float64))  # then a gradient of B is one of V
    layer(inputs(torch.float64)).pow(3).sum().backward()
    V = layer._direction().detach()
    grad = layer.lora_B.grad
    assert grad is not None and grad.abs().max() > 0.1
    assert (grad * V).sum(1).abs().max() < 1e-10, "I - v v^T removes what lies along V"


@pytest.mark.parametrize("through_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(through_norm: bool, bias: bool) -> None:
    layer = DoraLinear(nn.Linear(5, 4, bias=bias).double(), method("dora", rank=3), torch.Generator())
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    fixed_O = layer._norm()

    def output(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        norm_O = magnitude(layer.weight + layer.scaling * (B @ A)).detach() if through_norm else fixed_O
        return Decomposed.apply(
            x, layer.weight, layer.bias, A, B, m, norm_O, True, layer.scaling, 0.0, through_norm, None
        )  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(output, (x, layer.lora_A, layer.lora_B, layer.magnitude))


# --- the norm: factored, kept between steps


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


# --- PEFT


def peft_twin(model: Toy, *, use_dora: bool, dropout: float) -> nn.Module:
    """PEFT's model with the base and adapter weights of ours."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS), lora_dropout=dropout, use_dora=use_dora, bias="none"
    )
    twin = peft.get_peft_model(toy(torch.float64), config)  # type: ignore[arg-type]
    twin = twin.double()
    with torch.no_grad():
        for name, layer in adapted(model):
            other: Any = twin.get_submodule(f"base_model.model.{name}")
            assert isinstance(layer, LoraLinear)
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
            if use_dora:
                other.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    return twin.train(model.training)


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_equal_to_peft_in_float64(name: str, dropout: float, training: bool) -> None:
    model = toy(torch.float64)
    inject(model, method(name, dropout=dropout), seed=3)
    train(model)
    model.train(training)
    twin = peft_twin(model, use_dora=name == "dora", dropout=dropout)
    model.zero_grad()
    outputs, input_gradients = [], []
    for one in (model, twin):
        x = inputs(torch.float64).requires_grad_()
        torch.manual_seed(11)  # one mask for both
        y = one(x)
        y.pow(3).sum().backward()
        assert x.grad is not None
        outputs.append(y)
        input_gradients.append(x.grad)
    assert apart(*outputs) <= 1e-13
    assert apart(*input_gradients) <= 1e-13
    for path, layer in adapted(model):
        other: Any = twin.get_submodule(f"base_model.model.{path}")
        assert isinstance(layer, LoraLinear)
        pairs = [(layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight)]
        if isinstance(layer, DoraLinear):
            pairs.append((layer.magnitude, other.lora_magnitude_vector["default"].weight))
        for mine, theirs in pairs:
            assert mine.grad is not None and mine.grad.abs().max() > 0
            assert apart(mine.grad, theirs.grad) <= 1e-13


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_merged_weight_equal_to_pefts(name: str) -> None:
    model = toy(torch.float64)
    inject(model, method(name), seed=3)
    train(model)
    twin: Any = peft_twin(model, use_dora=name == "dora", dropout=0.0)
    merged = twin.merge_and_unload()
    for path, layer in adapted(model):
        assert isinstance(layer, AdaptedLinear)
        torch.testing.assert_close(layer.effective_weight(), merged.get_submodule(path).weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_forty_steps_of_adamw_as_in_peft(dropout: float) -> None:
    model = dora_model(dropout=dropout)
    twin = peft_twin(model, use_dora=True, dropout=dropout)
    losses: list[list[float]] = []
    for one in (model.train(), twin.train()):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.02)
        torch.manual_seed(4)
        losses.append([])
        for _ in range(40):
            optimizer.zero_grad()
            loss = (one(inputs(torch.float64)) - inputs(torch.float64)[..., :3].sin()).pow(2).mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_bfloat16_is_no_further_from_the_truth_than_peft() -> None:
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(5):
        truth = toy(torch.bfloat16).double()
        inject(truth, method("dora"), seed=seed)
        train(truth)
        narrow = toy(torch.bfloat16)
        inject(narrow, method("dora"), seed=seed)
        narrow.load_state_dict(truth.state_dict())
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), use_dora=True)
        twin = peft.get_peft_model(toy(torch.bfloat16), config)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, layer in adapted(truth):
                other: Any = twin.get_submodule(f"base_model.model.{name}")
                other.lora_A["default"].weight.copy_(layer.lora_A)
                other.lora_B["default"].weight.copy_(layer.lora_B)
                other.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
            x = inputs(torch.bfloat16)
            expected = truth(x.double())
            for key, one in (("ours", narrow), ("theirs", twin)):
                errors[key].append((one(x).double() - expected).square().mean().sqrt().item())
    assert sum(errors["ours"]) <= sum(errors["theirs"]), errors


# --- a base narrower than its adapter: `Blocked`


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("through_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_blocks(second: bool, through_norm: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dora_autograd.TOKENS, "cpu", 64)  # 16 tokens at a time
    layer = DoraLinear(nn.Linear(5, 4, bias=bias).double(), method("dora", rank=3), torch.Generator())
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    fixed_O = layer._norm()

    def output(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        norm_O = magnitude(layer.weight + layer.scaling * (B @ A)).detach() if through_norm else fixed_O
        torch.manual_seed(1)  # one mask for all evaluations
        return Blocked.apply(
            x, layer.weight, layer.bias, A, B, m, norm_O, True, layer.scaling, 0.3, through_norm, second, x.dtype
        )  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(output, (x, layer.lora_A, layer.lora_B, layer.magnitude))


def narrow_twins(dtype: torch.dtype, kind: Any = DoraLinear, rank: int = 8, **fields: Any) -> tuple[Any, Any]:
    """A layer on a narrow base with trained-looking values, and the same in float64."""
    torch.manual_seed(2)
    layer = kind(nn.Linear(96, 80).to(dtype), method("dora", rank=rank, **fields), torch.Generator())
    nn.init.normal_(layer.lora_B, std=0.02)
    if kind is DoraLinear:
        layer.magnitude.data *= 1 + 0.05 * torch.randn(80)
    return layer, copy.deepcopy(layer).double()


@torch.no_grad()
def strange(layer: DoraLinear) -> None:
    """V's row 3 is a small share of W0's, its row 5 is zero, W0's row 6 too, and the magnitude of row 7 alone."""
    layer.lora_B[5] = 0
    layer.weight[5:7] = 0
    layer.weight[3] = (-layer.scaling * 0.98 * layer.lora_B[3] @ layer.lora_A).to(layer.weight.dtype)
    layer.magnitude[7], layer.lora_B[7] = 0, 1.0
    layer.magnitude[5] = 0.7


@pytest.mark.parametrize("on", [("cuda",), ("cuda", "cpu")], ids=["in blocks", "in narrow parts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"detach_norm": False}, {"dropout": 0.3}], ids=str)
def test_gradients_on_a_narrow_base(
    dtype: torch.dtype, fields: dict[str, Any], on: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to float64 as rounding once to the narrow type allows; blocks of tokens change nothing."""
    monkeypatch.setattr(narrow, "ON", on)
    layer, truth = narrow_twins(dtype, **fields)
    x, upstream = torch.randn(40, 96).to(dtype), torch.randn(40, 80).to(dtype)
    x.requires_grad_()
    torch.manual_seed(3)
    seen = layer(x)
    wide = x.detach().double().requires_grad_()
    if fields.get("dropout"):  # by hand: float64 would draw another mask
        torch.manual_seed(3)
        dropped = wide * (F.dropout(torch.ones_like(x), 0.3) > 0) / 0.7
        g = truth.magnitude / magnitude(truth.weight + truth.scaling * truth.lora_B @ truth.lora_A).detach()
        low = truth.scaling * dropped @ truth.lora_A.T @ truth.lora_B.T
        expected = wide @ truth.weight.T + (g - 1) * (dropped @ truth.weight.T) + g * low + truth.bias
    else:
        expected = truth(wide)
    step = torch.finfo(dtype).eps
    assert apart(seen.double(), expected) <= step
    mine = torch.autograd.grad(seen, [x, layer.lora_A, layer.lora_B, layer.magnitude], upstream)
    theirs = torch.autograd.grad(expected, [wide, truth.lora_A, truth.lora_B, truth.magnitude], upstream.double())
    for one, other in zip(mine, theirs, strict=True):
        assert apart(one.double(), other) <= 2 * step


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_factors_are_not_rounded_in_narrow_parts(
    name: str, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x and dy are as they are, so the gradients of A and B are float32's, though no product has a float32 operand."""
    monkeypatch.setattr(narrow, "ON", ("cpu",))
    kind = {"lora": LoraLinear, "dora": DoraLinear}[name]
    plain = nn.Linear(96, 80, bias=bias).to(dtype)
    layer = kind(plain, method("dora", rank=8), torch.Generator())
    x, upstream = torch.randn(40, 96).to(dtype), torch.randn(40, 80).to(dtype)
    assert torch.equal(layer(x), plain(x)), "not the base at the start"
    nn.init.normal_(layer.lora_B, std=1e-4)  # its low parts are below float16's normal numbers
    truth = copy.deepcopy(layer).double()
    seen, expected = layer(x), truth(x.double())
    assert apart(seen.double(), expected) <= torch.finfo(dtype).eps
    mine = torch.autograd.grad(seen, [layer.lora_A, layer.lora_B], upstream)
    theirs = torch.autograd.grad(expected, [truth.lora_A, truth.lora_B], upstream.double())
    for one, other in zip(mine, theirs, strict=True):
        assert apart(one.double(), other) <= 5e-5  # 2^-16 a factor


def test_zeros_and_writing_models_in_narrow_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A magnitude of zero learns, a row of zeros has gradients, and an output that was written into costs nothing."""
    monkeypatch.setattr(narrow, "ON", ("cpu",))
    layer, _ = narrow_twins(torch.bfloat16)
    strange(layer)
    truth = copy.deepcopy(layer).double()
    assert truth._norm()[3] < 0.1 * magnitude(truth.weight)[3], "nothing cancels"
    x, upstream = torch.randn(40, 96).bfloat16(), torch.randn(40, 80).bfloat16()
    expected = torch.autograd.grad(truth(x.double()), [truth.lora_B, truth.magnitude], upstream.double())
    for written in (False, True):
        y = layer(x)
        y = y.add_(1.0) if written else y
        seen = torch.autograd.grad(y, [layer.lora_B, layer.magnitude], upstream)
        assert seen[1][7] != 0
        assert apart(seen[0].double(), expected[0]) <= 5e-5
        assert torch.isfinite(seen[1]).all()
        seen[1][3] = expected[1][3]  # of a V that is a fiftieth of W0, and x W0^T is rounded
        assert apart(seen[1].double(), expected[1]) <= 2 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(layer._norm().double(), truth._norm(), rtol=1e-5, atol=0)


def test_a_steady_layer_is_not_asked_and_what_is_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of an optimiser make a layer steady; a zero that is written by hand, or that it comes to, is found."""
    monkeypatch.setattr(narrow, "ON", ("cpu",))
    monkeypatch.setattr(narrow, "FUSED", False)
    layer, _ = narrow_twins(torch.bfloat16)
    x, upstream = torch.randn(40, 96).bfloat16(), torch.randn(40, 80).bfloat16()
    trained = [layer.lora_A, layer.lora_B, layer.magnitude]

    def gradients_are_right() -> None:
        truth = copy.deepcopy(layer).double()
        expected = torch.autograd.grad(truth(x.double()), [truth.lora_B, truth.magnitude], upstream.double())
        seen = torch.autograd.grad(layer(x), [layer.lora_B, layer.magnitude], upstream)
        torch.testing.assert_close(layer._norm().double(), truth._norm(), rtol=1e-5, atol=0)
        assert apart(seen[0].double(), expected[0]) <= 5e-5
        assert apart(seen[1].double(), expected[1]) <= 2 * torch.finfo(torch.bfloat16).eps

    def steps(count: int, rate: float = 1e-3) -> None:
        optimizer = torch.optim.SGD(trained, lr=rate)
        for _ in range(count):
            layer(x).backward(upstream)
            optimizer.step()
            optimizer.zero_grad()
            layer(x)

    assert not layer._steady, "nothing was seen of it yet"
    steps(3)
    assert layer._steady
    gradients_are_right()  # copied, it forgets what can be seen again
    steps(3)
    with monkeypatch.context() as patch:
        for asking in ("nonzero", "all", "__bool__"):
            patch.setattr(Tensor, asking, None)
        steps(2 * HOLDS)
    assert layer._steady
    with torch.no_grad():
        layer.magnitude[7] = 0
    gradients_are_right()
    layer.magnitude.data[7] = 1.0
    steps(3)
    assert layer._steady
    layer.magnitude.data[7] = 0  # no trace of it: finite, and right once it was asked for
    assert torch.isfinite(torch.autograd.grad(layer(x), [layer.magnitude], upstream)[0]).all()
    steps(HOLDS + 1, 0.0)
    assert not layer._steady
    gradients_are_right()
    layer.magnitude.data[7] = 1.0
    steps(3)
    assert layer._steady
    with torch.no_grad():
        layer.weight[3] = (-layer.scaling * 0.98 * layer.lora_B[3] @ layer.lora_A).to(layer.weight.dtype)
    assert torch.isfinite(layer(x)).all() and not layer._steady


def test_a_small_row_in_float16_with_its_norm_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its part of the gradient of A is beyond float16's numbers before it is made small; the output may be written."""
    monkeypatch.setattr(narrow, "ON", ("cpu",))
    monkeypatch.setattr(narrow, "FUSED", False)
    layer, _ = narrow_twins(torch.float16, detach_norm=False)
    with torch.no_grad():
        layer.weight[3] = (-layer.scaling * 0.95 * layer.lora_B[3] @ layer.lora_A).to(layer.weight.dtype)
    truth = copy.deepcopy(layer).double()
    x, upstream = torch.randn(2, 20, 96).half(), torch.randn(2, 20, 80).half()
    y = layer(x)
    y.mul_(1.0)
    (seen,) = torch.autograd.grad(y, [layer.lora_A], upstream)
    (expected,) = torch.autograd.grad(truth(x.double()), [truth.lora_A], upstream.double())
    top = layer.magnitude[3] / layer._norm()[3] ** 2 * layer.lora_B[3].abs().max() * 256
    assert top > torch.finfo(torch.float16).max, "nothing is large"
    assert apart(seen.double(), expected) <= 0.05  # x W0^T is rounded, and little of it is left


def test_triton_kernels_are_the_eager_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16: the interpreter multiplies no bfloat16. Rows of zeros, that cancel, and of an m of zero are there."""
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch alone")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "TRITON_INTERPRET" not in os.environ:  # read when triton is first imported
        again = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_triton_kernels_are_the_eager_form"]
        done = subprocess.run(again, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    monkeypatch.setattr(narrow, "ON", (device,))
    for kind, bias, form, zero, rank in (
        (LoraLinear, True, "branch", False, 8), (DoraLinear, True, "branch", False, 3),
        (DoraLinear, False, "branch", True, 40), (DoraLinear, True, "published", True, 8),
        (DoraLinear, True, "graph", True, 17),
    ):  # fmt: skip
        graph = form == "graph"
        fields = {"detach_norm": False} if graph else {"dropout": 0.3, "dropout_form": form}
        layer, _ = narrow_twins(torch.float16, kind, rank, **fields)
        layer = layer.to(device)
        layer.bias = layer.bias if bias else None
        if zero:
            strange(layer)
        x = torch.randn(50, 96, device=device).half().requires_grad_()
        upstream = torch.randn(50, 80, device=device).half()
        found = []
        for fused in (False, True):
            monkeypatch.setattr(narrow, "FUSED", fused)
            torch.manual_seed(4)
            trained = [p for p in layer.parameters() if p.requires_grad]
            for written in (False, True):
                y = layer(x)
                y = y.add_(1.0) if written else y
                found.append([y, *torch.autograd.grad(y, [x, *trained], upstream)])
            if isinstance(layer, DoraLinear):
                norm_O = layer._norm()  # made with the parts, then alone
                layer._forget()
                assert torch.equal(norm_O, layer._norm())
                layer._forget()
                wide = copy.deepcopy(layer).double()
                expected_O = magnitude(wide.weight + wide.scaling * wide.lora_B @ wide.lora_A)
                torch.testing.assert_close(norm_O.double(), expected_O, rtol=1e-5, atol=0)
        for eager, other in zip(found[0] + found[1], found[2] + found[3], strict=True):
            assert apart(other.float(), eager.float()) <= 2 * torch.finfo(torch.float16).eps
