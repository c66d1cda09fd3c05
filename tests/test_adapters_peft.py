"""LoRA and DoRA against PEFT: outputs, gradients, merged weights, forty steps, roundings."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from toys import TARGETS, Toy, apart, dora_model, inputs, method, toy, train

from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.dora import DoraLinear
from dora_lab.methods.inject import adapted, inject
from dora_lab.methods.lora import LoraLinear


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
