"""A few timed steps before many: the micro-batch that is fastest here, and how long runs will take.

Nothing is learnt: gradients are taken and thrown away, the optimiser's own step is not in the times.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from dora_lab.launch.run import threads_of_torch
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.models.base import model_and_tokenizer
from dora_lab.spec import Optim, Spec
from dora_lab.tasks import sources

SLOWER = 1.1  # times the best one's time; after two such micro-batches in a row, larger ones are not tried
ITEMS = 8  # of each task that are scored
SHORT = 1.0  # seconds: below it a step is timed three times
PRODUCT = 1024  # rows and columns of the matrices of `products`


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured, in seconds."""

    load: float  # the model
    steps: dict[int, float]  # a step of the first spec, by micro-batch
    step: dict[str, float]  # a step at the chosen micro-batch, by method
    item: float  # an item that is scored
    tokens: int  # of that step

    @property
    def micro_batch(self) -> int:
        """The fastest."""
        return min(self.steps, key=self.steps.__getitem__)

    def of(self, spec: Spec, scored: int) -> float:
        """A run, `scored` items being scored; the validation losses are counted as forwards, a third of a step each."""
        if spec.optim is None:
            return self.load + scored * self.item
        step, steps = self.step[spec.method.name], spec.optim.steps(spec.data.train_items or 0)
        losses = 0 if spec.optim.eval_steps is None else steps // spec.optim.eval_steps
        checked = losses * spec.data.validation_items / spec.optim.batch_size / 3
        return self.load + (steps + checked) * step + scored * self.item


def measure(specs: Sequence[Spec], paths: Paths, runtime: Runtime, micro_batches: Sequence[int]) -> Trial:
    """Time steps of the first spec at each micro-batch, of the others at the best of them, and some scored items.

    specs: one for each method, on one model and data; micro_batches: from the smallest on, divisors of
    `optim.batch_size`. A GPU that a micro-batch does not fit on ends the trying. The same items in every step.
    """
    from dora_lab.methods.inject import detach, inject

    runtime = runtime.settled(specs[0])
    with threads_of_torch(runtime.threads):
        start = time.perf_counter()
        model, tokenizer = model_and_tokenizer(specs[0], paths.model_dir)
        model.to(runtime.device)  # type: ignore[arg-type]
        load = time.perf_counter() - start
        items = sources.items(specs[0], paths.data_dir)
        found: dict[int, float] = {}
        step: dict[str, float] = {}
        tokens = 0
        for spec in specs:
            inject(model, spec.method, spec.seed)
            model.train()
            for micro in micro_batches if spec is specs[0] else [min(found, key=found.__getitem__)]:
                one, tokens = _step(spec, micro, model, tokenizer, items)
                seconds = _timed(one, fits=not found)
                if spec is specs[0]:
                    found[micro] = seconds
                    if len(found) > 2 and min([*found.values()][-2:]) > SLOWER * min(found.values()):
                        break
                step[spec.method.name] = min(seconds, step.get(spec.method.name, seconds))
            detach(model)
        item = _scored(specs[0], model, tokenizer, items)
        del model
    gc.collect()
    return Trial(load=load, steps=found, step=step, item=item, tokens=tokens)


def _step(spec: Spec, micro: int, model: Any, tokenizer: Any, items: sources.Items) -> tuple[Callable[[], None], int]:
    """(forward and backward of the first optimiser step, tokens of its items)."""
    from dora_lab.forms import form_of
    from dora_lab.tasks.limits import limits
    from dora_lab.training.batches import MicroBatches

    optim = replace(cast(Optim, spec.optim), micro_batch_size=micro)
    form = form_of(spec, model, tokenizer, None)
    batches = MicroBatches(form.encode(items.train, spec.data, tokenizer, limits(model)).examples, optim, 0, form)
    parts = [
        {name: tensor.to(model.device) for name, tensor in batches[place].items()}
        for place in range(optim.batch_size // micro)
    ]

    def step() -> None:
        for part in parts:
            form.loss(model, part).backward()
        model.zero_grad()

    return step, sum(int(part["attention_mask"].sum()) for part in parts)


def _timed(step: Callable[[], None], *, fits: bool) -> float:
    """Seconds of a step, the least of three where it is short; infinite where a GPU has not the memory, unless `fits`.

    The very first step pays for what is set up at first use: it is made once before.
    """
    import torch

    found: list[float] = []
    try:
        if fits:
            step()
        while not found or (found[0] < SHORT and len(found) < 3):
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        if fits:
            raise
        return math.inf
    return min(found)


def _scored(spec: Spec, model: Any, tokenizer: Any, items: sources.Items) -> float:
    """Seconds of an item that is scored, a mean over the first of every task."""
    from dora_lab.evaluation.evaluate import answers, prepare

    few = {task: pool[:ITEMS] for task, pool in items.test.items()}
    parts = prepare(spec, model, tokenizer, few)
    answers(spec, model, tokenizer, parts[0], lambda: None)  # what is set up at first use
    start = time.perf_counter()
    for part in parts:
        answers(spec, model, tokenizer, part, lambda: None)
    return (time.perf_counter() - start) / sum(map(len, few.values()))


def products(device: str, threads: int | None) -> dict[str, float]:
    """FLOP/s of square matrix products in float32 and in bfloat16 on a device: half a second of each."""
    import torch

    found: dict[str, float] = {}
    with threads_of_torch(threads):
        for dtype in (torch.float32, torch.bfloat16):
            one = torch.ones(PRODUCT, PRODUCT, dtype=dtype, device=device)
            float((one @ one)[0, 0])  # once for what is set up at first use
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < 0.5:
                float((one @ one)[0, 0])  # read, so that it has been computed
                count += 1
            rate = count * 2 * PRODUCT**3 / (time.perf_counter() - start)
            found[str(dtype).removeprefix("torch.")] = rate
    return found
