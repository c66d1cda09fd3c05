"""DoRA on a base narrower than its adapter, in blocks and kernels, against float64 and the eager form."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import apart, check_gradients, method

from dora_lab.decompose import magnitude
from dora_lab.methods import dora_autograd, narrow
from dora_lab.methods.dora import DoraLinear
from dora_lab.methods.dora_autograd import Blocked
from dora_lab.methods.lora import LoraLinear
from dora_lab.methods.steady import HOLDS


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("through_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_blocks(second: bool, through_norm: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dora_autograd.TOKENS, "cpu", 64)  # 16 tokens at a time

    def product(layer: DoraLinear, x: Tensor, A: Tensor, B: Tensor, m: Tensor, norm_O: Tensor) -> Tensor:
        torch.manual_seed(1)  # one mask for all evaluations
        return Blocked.apply(
            x, layer.weight, layer.bias, A, B, m, norm_O, True, layer.scaling, 0.3, through_norm, second, x.dtype
        )  # type: ignore[no-any-return]

    check_gradients(product, torch.randn(3, 7, 5, dtype=torch.float64), bias, through_norm)


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
