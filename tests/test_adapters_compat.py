"""Adapters on every kind of layer, on quantised bases, and in more than one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from dora_lab.decompose import magnitude
from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.dora import DoraLinear, MagnitudeLinear
from dora_lab.methods.inject import adapted, inject
from dora_lab.methods.lora import LoraLinear
from dora_lab.spec import Method

SMALL = Method(name="dora", rank=3, alpha=6.0)


class Strange(nn.Linear):
    """A linear layer of a class that nobody knows: it is used by its forward alone."""


def kinds() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(8, 6), torch.randn(4, 5, 8)),
        "conv1d": (Conv1D(6, 8), torch.randn(4, 5, 8)),
        "embedding": (nn.Embedding(8, 6, padding_idx=2), torch.tensor([[0, 1, 7], [1, 3, 3]])),
        "convolution": (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
        "picture": (nn.Conv2d(2, 6, 2, bias=False, dilation=2), torch.randn(2, 2, 5, 6)),
        "strange": (Strange(8, 6), torch.randn(4, 5, 8)),
    }


def dense(layer: Any, x: Tensor, V_OI: Tensor) -> Tensor:
    """The replaced layer with the matrix V_OI (out, in) for its weight."""
    plain = layer.replaced()
    weight = V_OI.t() if isinstance(plain, Conv1D | nn.Embedding) else V_OI
    return torch.func.functional_call(plain, {"weight": weight.reshape(plain.weight.shape)}, (x,))


def double(name: str, method: Method = SMALL) -> tuple[Any, Tensor]:
    base, x = kinds()[name]
    layer = DoraLinear(base.double(), method, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        layer.magnitude.mul_(1.5)
    return layer, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", [name for name in kinds() if name != "strange"])
def test_gradients_on_every_kind_of_layer(name: str, detach: bool) -> None:
    layer, x = double(name, Method(name="dora", rank=3, alpha=6.0, detach_norm=detach))
    V = layer.matrix + layer.scaling * layer.lora_B @ layer.lora_A
    norm = magnitude(V)
    expected = dense(layer, x, (layer.magnitude / (norm.detach() if detach else norm))[:, None] * V)
    seen = layer(x)
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense(layer, x, layer.effective_weight()), expected, rtol=1e-12, atol=1e-12)
    weights = [layer.lora_A, layer.lora_B, layer.magnitude]
    upstream = torch.randn_like(seen)
    pairs = zip(*(torch.autograd.grad(y, weights, upstream) for y in (seen, expected)), strict=True)
    for part, (one, other) in zip("ABm", pairs, strict=True):
        if name == "embedding" and part == "A":  # the padding token learns nothing, as in PEFT
            assert not one[:, 2].any() or not detach
            one, other = (torch.cat([g[:, :2], g[:, 3:]], 1) for g in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("which", [LoraLinear, DoraLinear, MagnitudeLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", kinds())
def test_every_kind_of_layer_starts_as_itself(name: str, dtype: torch.dtype, which: Any) -> None:
    base, x = kinds()[name]
    base, x = base.to(dtype), x.to(dtype) if x.is_floating_point() else x
    expected = base(x)
    layer = which(base) if which is MagnitudeLinear else which(base, SMALL, torch.Generator())
    assert torch.equal(layer(x), expected) and layer(x).dtype == dtype
    assert torch.equal(layer.effective_weight(), layer.base_weight())
    layer(x).float().pow(2).sum().backward()
    for parameter in layer.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    assert torch.equal(layer.replaced()(x), expected)


def test_layers_that_are_not_called_or_not_understood_are_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)  # uses out_proj.weight without calling out_proj
    for layer, words in (
        (attention.out_proj, "NonDynamicallyQuantizableLinear cannot be adapted"),
        (nn.Conv2d(4, 4, 1, groups=2), "groups = 2"),
        (nn.Conv1d(4, 4, 3, padding_mode="circular"), "padding_mode = 'circular'"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    ):
        with pytest.raises(ValueError, match=words):
            DoraLinear(layer, SMALL, torch.Generator())


def test_a_weight_that_is_not_finite_is_refused() -> None:
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight[2, 3] = 1e30  # its square overflows float32
    with pytest.raises(ValueError, match="1 rows of the base weight, the first is 2, have a norm that is not finite"):
        DoraLinear(layer, SMALL, torch.Generator())


# --- quantised bases


def quantised(bits: int) -> tuple[Any, nn.Linear]:
    """A bitsandbytes layer on the CPU, and the plain layer with its weight written out."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")  # quantises
    with torch.no_grad():
        layer(torch.zeros(1, 64))
        plain.weight.copy_((layer(torch.eye(64)) - layer.bias).t())
    assert layer.weight.dtype != torch.float32
    return layer, plain


@pytest.mark.parametrize(("bits", "rtol"), [(4, 1e-5), (8, 2e-2)])  # at 8 bits the inputs are rounded too
def test_dora_on_a_quantised_base(bits: int, rtol: float) -> None:
    base, plain = quantised(bits)
    x = torch.randn(5, 64, requires_grad=True)
    start = base(x)
    found: list[Any] = []
    for layer in (base, plain):
        one = DoraLinear(layer, Method(name="dora", rank=8, alpha=16.0), torch.Generator().manual_seed(1))
        assert one.kind.name == ("opaque" if layer is base else "linear")
        assert not any(p.requires_grad for n, p in one.named_parameters() if n.split(".")[0] in ("frozen", "weight"))
        if layer is base:
            assert torch.equal(one(x), start), "not the identity before training"
        nn.init.normal_(one.lora_B, std=0.05, generator=torch.Generator().manual_seed(3))
        y = one(x)
        y.pow(2).sum().backward()
        found.append((y, one.lora_A.grad, one.lora_B.grad, one.magnitude.grad, one.effective_weight(), x.grad))
        x.grad = None
    for mine, theirs in zip(*found, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=rtol * scale)


def test_a_quantised_layer_is_merged_into_a_plain_one() -> None:
    base, _ = quantised(4)
    layer = DoraLinear(base, Method(name="dora", rank=8, alpha=16.0), torch.Generator())
    nn.init.normal_(layer.lora_B, std=0.05)
    merged, x = layer.merge(), torch.randn(5, 64)
    assert isinstance(merged, nn.Linear) and merged(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-4)


# --- the paper's numbers of parameters


@pytest.mark.parametrize(
    ("targets", "bare", "expected"),
    [
        ("q_proj k_proj v_proj up_proj down_proj", "", 56_975_360),  # 0.84 % in tables 1 and 6
        ("q_proj k_proj v_proj", "o_proj gate_proj up_proj down_proj", 26_525_696),  # 0.39 % in table 6
    ],
)
def test_trained_parameters_of_llama_7b(targets: str, bare: str, expected: int) -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {"target_modules": tuple(targets.split()), "magnitude_modules": tuple(bare.split())}
    counts = inject(model, Method(name="dora", rank=32, alpha=64.0, **names), seed=0)
    assert counts["trainable"] == expected


# --- more than one process


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 20), Conv1D(16, 20), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


METHODS = {
    "lora": Method(name="lora", rank=4, alpha=8.0, target_modules=("first", "second")),
    "dora": Method(name="dora", rank=4, alpha=8.0, target_modules=("first", "second"), magnitude_modules=("third",)),
    "in graph": Method(name="dora", rank=4, alpha=8.0, target_modules=("first", "second"), detach_norm=False),
}


def trained(name: str, how: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Adapters after five steps, each on the same eight rows, however many processes share them."""
    model: Any = Net().double()  # Adam's first steps are all sign: rounding must not decide it
    inject(model, METHODS[name], seed=1)
    inner = model
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif how == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(5):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).double()[rank::world]
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    with torch.no_grad():
        last = model(x)  # a forward after the last step sees the last step's norm
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in inner.state_dict().items()}
    return {k: v.detach().clone() for k, v in state.items()} | ({"output": last} if world == 1 else {})


def worker(rank: int, name: str, how: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(trained(name, how, rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_does(name: str, how: str, tmp_path: Path) -> None:
    mp.spawn(worker, (name, how, str(tmp_path)), nprocs=2)
    expected = trained(name, "alone")
    for rank in (0, 1):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert len(seen) == len(expected) - 1
        for key, value in seen.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")
    start = Net().double()
    inject(start, METHODS[name], seed=1)
    assert all(isinstance(layer, AdaptedLinear) for _, layer in adapted(start))
    assert not torch.allclose(expected["first.lora_B"], start.state_dict()["first.lora_B"], atol=1e-3)
