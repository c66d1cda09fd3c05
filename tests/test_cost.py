"""The estimate of a run's cost: FLOPs as torch counts them, training's own steps, what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab.launch import cost
from dora_lab.methods.catalog import entry_of
from dora_lab.methods.inject import inject
from dora_lab.models import shapes
from dora_lab.spec import Method, Spec, SpecError
from experiments import commonsense

SHAPE = shapes.Shape(hidden=64, intermediate=176, layers=3, heads=4, key_value_heads=2, vocabulary=300)
LENGTH, BATCH = 32, 4
LOW: dict[str, Any] = {"rank": 4, "alpha": 8.0, "target_modules": commonsense.TARGETS}
METHODS = {
    "ft": Method(name="ft"),
    "lora": Method(name="lora", **LOW),
    "lora, dropout": Method(name="lora", dropout=0.2, **LOW),
    "lora on two": Method(name="lora", **(LOW | {"target_modules": ("q_proj", "down_proj")})),
    "dora": Method(name="dora", **LOW),
    # more than the share up to which the second base product is had from the first on a CPU
    "dora, published dropout": Method(name="dora", dropout=0.2, **LOW),
    "dora, branch dropout": Method(name="dora", dropout=0.2, dropout_form="branch", **LOW),
    "dora, norm in graph": Method(name="dora", detach_norm=False, **LOW),
    "dora, magnitudes alone": Method(
        name="dora", magnitude_modules=("o_proj", "up_proj"), **(LOW | {"target_modules": ("q_proj", "v_proj")})
    ),
}


def a_spec(method: Method = METHODS["dora"], **optim: Any) -> Spec:
    spec = commonsense.specs("paper")[0]
    assert spec.optim is not None
    return replace(spec, method=method, optim=replace(spec.optim, **optim))


def a_model(shape: shapes.Shape, method: Method, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, vocab_size=shape.vocabulary,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    inject(model, method, 0)
    return model.train()


def _in_place(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * b[1]  # torch's counter knows addmm, not addmm_


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("name", METHODS)
def test_flops_of_a_step_are_those_that_torch_counts(name: str, micro: int) -> None:
    model, ids = a_model(SHAPE, METHODS[name]), torch.randint(0, 300, (micro, LENGTH))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    optimizer.step()  # from here on a norm has to be computed anew
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counted:
        for _ in range(BATCH // micro):
            model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    spec = a_spec(METHODS[name], batch_size=BATCH, micro_batch_size=micro)
    found = cost.step_flops(spec, SHAPE, LENGTH)
    if METHODS[name].name == "ft" or set(commonsense.TARGETS) <= set(METHODS[name].target_modules):
        assert found == counted.get_total_flops()
    else:  # the first layer's q, k or v that has no adapter needs no gradient at all
        assert counted.get_total_flops() < found < 1.02 * counted.get_total_flops()


def test_flops_of_a_forward() -> None:
    model, ids = a_model(SHAPE, Method(name="base")), torch.randint(0, 300, (2, LENGTH))
    for kept in (LENGTH, 8):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=kept)
        assert 2 * LENGTH * cost.forward_flops(SHAPE, LENGTH, kept / LENGTH) == counted.get_total_flops()


def test_steps() -> None:
    for items, epochs, steps in ((1, 0.3, 1), (16, 1.0, 1), (17, 1.0, 2), (16, 3.0, 3), (170_300, 3.0, 31_932)):
        spec = a_spec(epochs=epochs, batch_size=16)
        assert spec.optim is not None and spec.optim.steps(items) == steps


def kept_bytes(shape: shapes.Shape, method: Method, half: bool, texts: int = 2, length: int = 48) -> int:
    """Bytes that autograd keeps for the backward of one forward, parameters aside."""
    model = a_model(shape, method, torch.bfloat16 if half else torch.float32, attention="sdpa")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []  # or a freed tensor's place would be counted once for two

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(0, shape.vocabulary, (texts, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, half):
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1
        ).logits.float().sum()
    return sum(found.values())


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("name", ["ft", "lora", "lora, dropout", "dora", "dora, published dropout"])
def test_memory_for_the_backward_is_what_autograd_keeps(name: str, half: bool) -> None:
    """Per layer and token, on a shape that the coefficients were not taken from."""
    method = METHODS[name]
    per_layer = [
        kept_bytes(
            shapes.Shape(hidden=256, intermediate=704, layers=layers, heads=4, key_value_heads=4, vocabulary=60),
            method,
            half,
        )
        for layers in (1, 3)
    ]
    measured = (per_layer[1] - per_layer[0]) / 2 / (2 * 48)
    saved = entry_of(method.name).saved
    assert saved is not None
    hidden, intermediate = saved[method.dropout > 0][2 if half else 4]
    assert measured == pytest.approx(hidden * 256 + intermediate * 704, rel=0.03)


def test_memory_of_the_paper_tier() -> None:
    seven = shapes.PAPER["LLaMA-7B"][0]
    spec = a_spec(replace(METHODS["dora, published dropout"], rank=32, alpha=64.0), batch_size=16, micro_batch_size=4)
    found = cost.peak_memory(spec, seven, 256)
    weights, adapter = 2 * 6_738_415_616, 16 * 56_975_360
    assert found > weights + adapter
    # table 7: 28.2 GB at 4 accumulations; the released code keeps more than ours
    assert 0.75 * 28.2e9 < found < 28.2e9
    whole = cost.peak_memory(replace(spec, optim=replace(spec.optim, micro_batch_size=16)), seven, 256)
    assert whole > found
    base = replace(spec, method=Method(name="base"), optim=None, probe=None)
    assert weights < cost.peak_memory(base, seven, 256) < found
    single = replace(spec, model=replace(spec.model, dtype="float32"), method=Method(name="ft"))
    assert cost.peak_memory(single, seven, 256) > 4 * 4 * 6_738_415_616


def test_an_estimate_adds_up() -> None:
    spec, seven = a_spec(), shapes.PAPER["LLaMA-7B"][0]
    found = cost.estimate(spec, seven, 1600, 800, cost.gpu("A100-80GB"))
    assert spec.optim is not None
    steps = spec.optim.steps(1600)
    assert steps == 300
    assert (found.steps, found.tokens) == (steps, steps * 16 * 256)
    assert found.train_flops == steps * cost.step_flops(spec, seven, 256)
    assert found.validation_flops == 3 * 120 * 256 * cost.forward_flops(seven, 256)
    assert found.evaluation_flops == 800 * (256 + 32) * 4 * cost.forward_flops(seven, 256)
    assert found.hours is not None
    at_peak = found.flops / (cost.UTILISATION * 312e12) / 3600
    assert at_peak <= found.hours < 3 * at_peak
    shorter = cost.estimate(spec, seven, 1600, 800, cost.gpu("A100-80GB"), tokens=128)
    assert shorter.flops < 0.55 * found.flops and shorter.memory_bytes < found.memory_bytes
    assert cost.estimate(spec, seven, 1600, 800).hours is None
    with pytest.raises(SpecError, match="did you mean 'A100-80GB'"):
        cost.gpu("A100")


def test_the_dry_run_says_what_it_costs() -> None:
    def told(*arguments: str) -> str:
        done = CliRunner().invoke(command.app, ["run", "commonsense", "--dry-run", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    paper = told(
        "--tier", "paper", "--only", "model.name=yahma/llama-7b-hf", "--only", "seed=0", "--only", "method.rank=32"
    )
    lora, dora = (line for line in paper.splitlines() if "tokens, " in line)
    assert "130.8 M tokens, 4.0 EFLOP" in lora and "130.8 M tokens, 6.4 EFLOP" in dora
    assert "on one A100-80GB at an assumed 35% of its peak" in paper and "estimate, not a measurement" in paper
    assert "hours for a GPU with --gpu" in told("--tier", "paper", "--only", "seed=0", "--device", "cpu")
    small = told("--tier", "paper", "--only", "seed=0", "--gpu", "RTX4090-24GB")
    assert small.count("does not fit") == 12
    mini = told()
    assert "524.3 k tokens" in mini and " h\n" not in mini and "no training" in mini
    unknown = told("--with", "model.name=somebody/some-model", "--only", "seed=1")
    assert "7 of them have no estimate" in unknown
