"""One decoder layer's seven linear layers alone, and one whole decoder layer: as they are, without kernels, compiled.

The contenders of a group are there together and are timed in turns, round by round, in an order that moves on by one:
what is divided is what one round gave, and clocks, heat and neighbours are the same for all. A turn is some steps one
after the other and begins with an idle device, so that nobody profits from what the one before has in the queue.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.gpu.models import SEVEN, Linears, adamw, llama, put_on, switched
from experiments.gpu.right import apart
from experiments.gpu.visit import Visit, failure

LINEARS, DECODER = "linears", "decoder layer"
ALONE = (
    "ours/lora", "ours/lora-eager", "ours/dora", "ours/dora-eager", "ours/dora-branch", "ours/dora-published",
    "ours/lora-dropped", "ours/dora-graph", "peft/lora", "peft/dora", "ours/lora-again", "peft/dora-dropped",
)  # fmt: skip
COMPILED = ("ours/lora-compiled", "ours/dora-compiled")
WHOLE_LAYER = ("ours/lora", "ours/dora", "peft/lora", "peft/dora", *COMPILED)
ROUNDS, STEPS, WARM = 8, 3, 3


@dataclass
class Contender:
    """What is timed, and what was seen of it so far."""

    name: str
    step: Callable[[], None]
    about: dict[str, Any]


@dataclass
class Inputs:
    """Inputs and upstream gradients, the same for all contenders of a group."""

    x: Tensor
    wide_x: Tensor
    upstream: list[Tensor]
    length: int


def run(visit: Visit) -> None:
    """The linear layers; PEFT's with dropout takes longer than all others together."""
    _group(visit, "linears", LINEARS, ALONE, 14)


def run_compiled(visit: Visit) -> None:
    """The decoder layer in every form, and the linear layers compiled beside eager ones."""
    _group(visit, "compiled", LINEARS + ", compiled", ("ours/lora", "ours/dora", *COMPILED), 30)
    _group(visit, "compiled", DECODER, WHOLE_LAYER, 45)


def _group(visit: Visit, stage: str, group: str, names: tuple[str, ...], estimate: float) -> None:
    """A row of every contender; the cell `group` itself writes none."""
    known = {row["cell"] for row in visit.known if row["stage"] == stage}
    names = tuple(name for name in names if f"{group}: {name}" not in known)
    if names:
        visit.cell(stage, f"{group}: in turns", estimate, lambda: _in_turns(visit, stage, group, names))


def _in_turns(visit: Visit, stage: str, group: str, names: tuple[str, ...]) -> None:
    inputs = _inputs(visit, group)
    with contextlib.ExitStack() as stack:
        there: list[Contender] = []
        for name in names:
            try:
                there.append(_contender(visit, group, name, inputs, stack))
            except Exception as error:  # any: the others go on
                visit.write(stage, f"{group}: {name}", **failure(error))
        rounds = 2 if visit.cpu else ROUNDS
        taken: dict[str, list[float]] = {one.name: [] for one in there}
        for number in range(rounds):
            first = number % max(1, len(there))
            for one in there[first:] + there[:first]:
                (seconds,) = visit.timed_once([lambda one=one: [one.step() for _ in range(STEPS)]])
                taken[one.name].append(seconds / STEPS)
    size, tokens = visit.size, inputs.x.shape[0]
    done = 4.0 * tokens * sum(out * width for out, width in size.shapes().values())
    done += 6.0 * tokens * inputs.length * size.hidden if group == DECODER else 0.0
    for one in there:
        seconds = statistics.median(taken[one.name])
        about = {"group": group, "contender": one.name, "dtype": "bfloat16", "rank": size.rank, "tokens": tokens}
        measured = {"seconds": seconds, "taken": taken[one.name], "in_turns": True, "operations": done}
        share = {"share": visit.share("product", done, seconds)}
        visit.write(stage, f"{group}: {one.name}", **about, **one.about, **measured, **share)


def _inputs(visit: Visit, group: str) -> Inputs:
    batch, length = (2, 16) if visit.cpu else (16, 256)
    size, tokens = visit.size, batch * length

    def random(width: int) -> Tensor:
        return torch.randn(tokens, width, device=visit.device, dtype=torch.bfloat16)

    widths = [size.hidden] if group == DECODER else [out for out, _ in size.shapes().values()]
    x, wide_x = random(size.hidden).requires_grad_(), random(size.intermediate).requires_grad_()
    return Inputs(x, wide_x, [random(width) for width in widths], length)


def _contender(visit: Visit, group: str, name: str, inputs: Inputs, stack: contextlib.ExitStack) -> Contender:
    """Built, checked where it is compiled, and warm; its memory is what it adds at its most."""
    size = visit.size
    before = 0 if visit.cpu else torch.cuda.memory_allocated()
    if group == DECODER:
        base: Any = llama(visit, torch.bfloat16, layers=1).model
        compiled = base.layers[0]
    else:
        with torch.device(visit.device):
            base = Linears(size).to(torch.bfloat16).requires_grad_(False)
        compiled = base
    model = stack.enter_context(put_on(base, name, SEVEN, size.rank, 2.0 * size.rank))
    forward, step = _steps(model, inputs, group == DECODER)
    about: dict[str, Any] = {}
    if name.endswith("-compiled"):
        eager = forward()
        compiled.compile(backend="aot_eager" if visit.cpu else "inductor")
        worst = max(apart(one, other) for one, other in zip(forward(), eager, strict=True))
        about = {"worst": worst, "tolerance": 2e-2, "ok": worst <= 2e-2}
        del eager

    def switched_step() -> None:
        with switched(name):
            step()

    for _ in range(1 if visit.cpu else WARM):
        switched_step()
    if not visit.cpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        switched_step()
        torch.cuda.synchronize()
        about |= {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    return Contender(name, switched_step, about)


def _steps(model: Any, inputs: Inputs, decoder: bool) -> tuple[Callable[[], list[Tensor]], Callable[[], None]]:
    """(the forward, a training step). AdamW is in it, so that DoRA's norm is made anew as it is in training."""
    optimizer = adamw(model)

    def forward() -> list[Tensor]:
        if not decoder:
            return model(inputs.x, inputs.wide_x)
        tokens, width = inputs.x.shape
        hidden = model(inputs_embeds=inputs.x.view(-1, inputs.length, width), use_cache=False).last_hidden_state
        return [hidden.view(tokens, -1)]

    def step() -> None:
        torch.autograd.backward(forward(), inputs.upstream)
        optimizer.step()
        optimizer.zero_grad()
        inputs.x.grad = inputs.wide_x.grad = None

    return forward, step


def run_profile(visit: Visit) -> None:
    """Where the device's time goes in a step of the linear layers: the longest kernels, and waits for the device."""
    for name in ("ours/dora", "ours/dora-eager", "ours/lora", "ours/dora-published"):
        visit.cell("profile", name, 4, lambda name=name: _profile(visit, name))


def _profile(visit: Visit, name: str) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with contextlib.ExitStack() as stack:
        step = _contender(visit, LINEARS, name, _inputs(visit, LINEARS), stack).step
        kinds = [ProfilerActivity.CPU] if visit.cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=kinds) as seen:
            step()
            if not visit.cpu:
                torch.cuda.synchronize()
    events = seen.key_averages()
    waits = {event.key: event.count for event in events if "Synchronize" in event.key or event.key == "aten::item"}
    on_device = [event for event in events if str(event.device_type).endswith("CPU") == visit.cpu]
    time = "self_cpu_time_total" if visit.cpu else "self_device_time_total"
    longest = sorted(on_device, key=lambda event: getattr(event, time), reverse=True)[:14]
    total = sum(getattr(event, time) for event in on_device)
    count = sum(event.count for event in on_device)
    print(f"-- {name}: {total / 1e3:.2f} ms of kernels in {count}, waits {waits}")
    for event in longest:
        print(f"  {getattr(event, time) / 1e3:8.3f} ms {event.count:4d} x {event.key[:90]}")
    rows = [{"kernel": event.key[:120], "ms": getattr(event, time) / 1e3, "count": event.count} for event in longest]
    return {"seconds": total / 1e6, "kernels": rows, "launches": count, "waits": waits}
