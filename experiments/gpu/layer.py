"""One decoder layer's seven linear layers alone, and one whole decoder layer: eager, with the kernels, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.gpu.fast import kernels_are_right
from experiments.gpu.models import SEVEN, Linears, adamw, llama, put_on
from experiments.gpu.right import apart
from experiments.gpu.visit import Visit

LINEARS, DECODER = "linears", "decoder layer"
EAGER = (
    "ours/lora", "ours/dora", "ours/dora-triton", "ours/dora-branch", "ours/dora-published", "ours/lora-dropped",
    "ours/dora-graph", "peft/lora", "peft/dora", "peft/dora-dropped", "ours/lora-again",
)  # fmt: skip
COMPILED = ("ours/lora-compiled", "ours/dora-compiled")
WHOLE_LAYER = ("ours/lora", "ours/dora", "ours/dora-triton", "peft/lora", "peft/dora", *COMPILED)


def run(visit: Visit) -> None:
    """The linear layers, eager and with the kernels."""
    for name in EAGER:
        _cell(visit, "linears", LINEARS, name)


def run_compiled(visit: Visit) -> None:
    """The decoder layer in every form, and the linear layers compiled."""
    for name in WHOLE_LAYER:
        _cell(visit, "compiled", DECODER, name)
    for name in COMPILED:
        _cell(visit, "compiled", LINEARS, name)


def _cell(visit: Visit, stage: str, group: str, name: str) -> None:
    cell = f"{group}: {name}"
    if name.endswith("-triton") and not kernels_are_right(visit):
        visit.cell(stage, cell, 0, lambda: {"skipped": "the kernels were not found right before"})
        return
    estimate = 30 if name.endswith("-compiled") else 2
    visit.cell(stage, cell, estimate, lambda: _measure(visit, group, name))


def _measure(visit: Visit, group: str, name: str) -> dict[str, Any]:
    size, dtype = visit.size, torch.bfloat16
    batch, length = (2, 16) if visit.cpu else (16, 256)
    if group == LINEARS:
        with torch.device(visit.device):
            base: Any = Linears(size).to(dtype).requires_grad_(False)
        compiled = base
    else:
        base = llama(visit, dtype, layers=1).model
        compiled = base.layers[0]
    with put_on(base, name, SEVEN, size.rank, 2.0 * size.rank) as model:
        forward, step = _steps(visit, model, batch, length, group == LINEARS)
        checked: dict[str, Any] = {}
        if name.endswith("-compiled"):
            eager = forward()
            torch._dynamo.reset()
            compiled.compile(backend="aot_eager" if visit.cpu else "inductor")
            worst = max(apart(one, other) for one, other in zip(forward(), eager, strict=True))
            checked = {"worst": worst, "tolerance": 2e-2, "ok": worst <= 2e-2}
            del eager
        found = visit.took(step, warm=4, rounds=20)
    done = 4.0 * batch * length * sum(out * width for out, width in size.shapes().values())
    done += 6.0 * batch * length * length * size.hidden if group == DECODER else 0.0
    about = {"group": group, "contender": name, "dtype": "bfloat16", "rank": size.rank, "tokens": batch * length}
    return about | found | checked | {"operations": done, "share": visit.share("product", done, found["seconds"])}


def _steps(
    visit: Visit, model: Any, batch: int, length: int, linears: bool
) -> tuple[Callable[[], list[Tensor]], Callable[[], None]]:
    """(the forward, a training step). AdamW is in it, so that DoRA's norm is made anew as it is in training."""
    size, tokens = visit.size, batch * length
    x = _random(visit, tokens, size.hidden).requires_grad_()
    wide_x = _random(visit, tokens, size.intermediate).requires_grad_()
    widths = [out for out, _ in size.shapes().values()] if linears else [size.hidden]
    upstream = [_random(visit, tokens, width) for width in widths]
    optimizer = adamw(model)

    def forward() -> list[Tensor]:
        if linears:
            return model(x, wide_x)
        hidden = model(inputs_embeds=x.view(batch, length, -1), use_cache=False).last_hidden_state
        return [hidden.view(tokens, -1)]

    def step() -> None:
        torch.autograd.backward(forward(), upstream)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = wide_x.grad = None

    return forward, step


def _random(visit: Visit, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, device=visit.device, dtype=torch.bfloat16)
