"""The adapter contract, over every method there is; DoRA's gradients against autograd."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import NAMES, check_gradients, dense_dora, dora_model, inputs, layers_of, method, toy, train

import dora_lab
from dora_lab.decompose import magnitude
from dora_lab.methods import dora
from dora_lab.methods.dora import DoraLinear
from dora_lab.methods.dora_autograd import Decomposed
from dora_lab.methods.inject import adapted, inject, merge
from dora_lab.methods.lora import LoraLinear
from dora_lab.spec import Method

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
    def product(layer: DoraLinear, x: Tensor, A: Tensor, B: Tensor, m: Tensor, norm_O: Tensor) -> Tensor:
        return Decomposed.apply(
            x, layer.weight, layer.bias, A, B, m, norm_O, True, layer.scaling, 0.0, through_norm, None
        )  # type: ignore[no-any-return]

    check_gradients(product, torch.randn(2, 3, 5, dtype=torch.float64), bias, through_norm)
