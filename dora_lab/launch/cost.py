"""What a run costs before it is run: steps, tokens, FLOPs, peak memory and hours, from the spec and the model's shape.

Nothing is loaded and torch is not imported. All tokens are counted as if every text had `tokens` of them (default: the
cutoff, so an upper bound; with 16 items in a batch the longest is near it anyway).

FLOPs: a multiplication and an addition are two. With W = sum of out x in over the linear layers, A = width of all
heads, L layers, V words, h hidden, r rank, T tokens of a text, per token:
- forward: F = L (2 W + 4 T A) + 2 h V (the last term only at positions that carry loss);
- full fine-tuning: 3 F (gradients of inputs and of weights, as much as the forward each);
- an adapter: 2 F + 4 L T A (attention has no weights, so its gradients are of inputs alone), plus 6 r (in + out) for
  each adapted matrix, less the gradient of the first layer's q, k and v inputs, which nothing needs; the published
  dropout of DoRA adds one base product each way, 4 out x in;
- DoRA's norm: 2 r out x in (W0 A^T) and 2 r^2 (in + out) for each adapted matrix, once a step; with the norm in the
  graph 4 r out x in + 4 r^2 (in + out) more for each forward;
- a validation: F; an evaluation by "generate": F for every token of prompt and answer and every beam, by
  "loglikelihood": F for every token and answer that is offered.
`tests/test_cost.py` holds this against torch's FlopCounterMode on a small model: equal for a step and for a forward (an
upper bound, by less than 2 %, where not all of q, k and v are adapted).

Of a LLaVA beside it: the forward of its frozen tower for every text, as if each had an image; with layers that run
again for the gradient (--recompute) a forward more, and of every layer but one its input alone is kept.

Memory: weights; 16 bytes for each adapter parameter (value, gradient, two moments, float32), or 3 x its type more for
each weight under full fine-tuning; what autograd keeps, a h + b m bytes for each token and layer (m =
intermediate), measured on small models with plain Llama layers and attention that keeps no T x T matrix; logits, their
gradient and the float32 softmax at positions with loss; or, if that is more, the key-value cache of the evaluation;
1 GiB for the CUDA context. Unvalidated on a GPU: fragmentation, workspaces and the released code's own copies are not
in it (table 7 prints 28.2 GB where this says 24).

Hours: FLOPs over `UTILISATION` of the peak of the named GPU; token by token generation is bound by reading the weights,
so it takes at least bytes over `UTILISATION` of its memory bandwidth. Both are assumptions, not measurements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dora_lab.methods.catalog import Entry, catalog, entry_of
from dora_lab.models.shapes import Shape
from dora_lab.spec import Spec, SpecError, did_you_mean
from dora_lab.tasks import load_task
from dora_lab.tasks.commonsense.released_files import KNOWN

UTILISATION = 0.35  # of peak FLOP/s and of bandwidth: short texts and many small kernels
CONTEXT = 2**30  # bytes
ANSWER = 10  # positions that carry loss where the prompt carries none: "the correct answer is <label>" and its end
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers: dense matrix products in 16 bit and in float32 (no TF32), memory, bandwidth."""

    half: float  # FLOP/s
    single: float  # FLOP/s
    memory: float  # bytes
    bandwidth: float  # bytes/s


GPUS = {
    "V100-32GB": Gpu(125e12, 15.7e12, 32 * 2**30, 0.90e12),
    "RTX3090-24GB": Gpu(71e12, 35.6e12, 24 * 2**30, 0.94e12),
    "RTX4090-24GB": Gpu(165e12, 82.6e12, 24 * 2**30, 1.01e12),
    "A6000-48GB": Gpu(155e12, 38.7e12, 48 * 2**30, 0.77e12),
    "L40S-48GB": Gpu(362e12, 91.6e12, 48 * 2**30, 0.86e12),
    "A100-40GB": Gpu(312e12, 19.5e12, 40 * 2**30, 1.56e12),
    "A100-80GB": Gpu(312e12, 19.5e12, 80 * 2**30, 2.04e12),
    "H100-80GB": Gpu(989e12, 67e12, 80 * 2**30, 3.35e12),
    "H200-141GB": Gpu(989e12, 67e12, 141 * 2**30, 4.80e12),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An estimate for one run; hours are None without a GPU."""

    steps: int  # optimiser steps
    tokens: int  # in training, padding included
    train_flops: float
    validation_flops: float
    evaluation_flops: float
    memory_bytes: float  # at the peak
    hours: float | None

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.train_flops + self.validation_flops + self.evaluation_flops


def gpu(name: str) -> Gpu:
    """The GPU of that name; raises SpecError with the names there are."""
    if name not in GPUS:
        raise SpecError(f"unknown GPU '{name}'; {did_you_mean(name, GPUS)}")
    return GPUS[name]


def estimate(
    spec: Spec,
    shape: Shape,
    train_items: int,
    test_items: int,
    card: Gpu | None = None,
    tokens: int | None = None,
    recompute: bool = False,
) -> Cost:
    """The cost of a run.

    Args: shape: of the base model; train_items: after the validation items are taken out; test_items: of all tasks
        together; card: for hours; tokens: of every text, padding included (default: `data.cutoff`).
        recompute: layers run again for the gradient.
    Raises: ValueError where a method's parameters cannot be counted (`Shape.trained`).
    """
    length = tokens or spec.data.cutoff
    memory = peak_memory(spec, shape, length, recompute)  # first: it refuses modules that are not there
    steps = spec.optim.steps(train_items) if spec.optim else 0
    batch = spec.optim.batch_size if spec.optim else 0
    forwards = steps // spec.optim.eval_steps if spec.optim and spec.optim.eval_steps else 0
    asked = _evaluation_flops(spec, shape, test_items, length)
    made = {
        "train_flops": steps * step_flops(spec, shape, length, recompute),
        "validation_flops": forwards * spec.data.validation_items * length * forward_flops(shape, length),
        "evaluation_flops": asked,
    }
    hours = None
    if card is not None:
        peak = UTILISATION * (card.half if _narrow(spec) else card.single)
        read = _generated(spec, test_items) * shape.parameters() * BYTES[spec.model.dtype]
        trained = (made["train_flops"] + made["validation_flops"]) / peak
        hours = (trained + max(asked / peak, read / (UTILISATION * card.bandwidth))) / 3600
    return Cost(steps=steps, tokens=steps * batch * length, memory_bytes=memory, hours=hours, **made)


def test_items(spec: Spec) -> int | None:
    """Items that are scored: of a spec that takes all there are, those of the released files; None for others."""
    if spec.data.test_items is not None:
        return spec.data.test_items * len(spec.data.tasks)
    files = {name: KNOWN.get((name, "test")) for name in spec.data.tasks}
    known = [file.items if file else load_task(name).released_items for name, file in files.items()]
    return None if None in known else sum(filter(None, known))


def words(cost: Cost, card: Gpu | None) -> str:
    """One estimate on a line."""
    hours = "" if cost.hours is None else f", about {cost.hours:.1f} h"
    fits = card is None or cost.memory_bytes <= card.memory
    more = "" if fits else " (does not fit: smaller optim.micro_batch_size, --recompute, --shard make the same steps)"
    return (
        f"{_big(cost.tokens).rstrip()} tokens, {_big(cost.flops)}FLOP, {cost.memory_bytes / 2**30:.1f} GiB{more}{hours}"
    )


def total(costs: Sequence[Cost], name: str | None, tokens: int | None) -> str:
    """All estimates together, and what they assume."""
    flops = _big(sum(cost.flops for cost in costs))
    memory = max(cost.memory_bytes for cost in costs) / 2**30
    counted = f"every text counted with {tokens} tokens" if tokens else "every text counted as long as the cutoff"
    line = f"estimate, not a measurement: {flops}FLOP in all, at most {memory:.1f} GiB; {counted}"
    if name is None:
        return f"{line}; hours for a GPU with --gpu {'|'.join(GPUS)}"
    hours = sum(cost.hours or 0.0 for cost in costs)
    return f"{line}; {hours:.0f} h in all on one {name} at an assumed {UTILISATION:.0%} of its peak"


def _big(number: float) -> str:
    """A number with its SI letter, to be followed by a unit: "6.4 E", "12 "."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:.0f} "


def forward_flops(shape: Shape, length: int, head: float = 1.0) -> float:
    """F: per token of a text of `length`; `head` is the share of positions that get logits."""
    linear = sum(out * width for out, width in shape.matrices().values())
    layers = shape.layers * (2 * linear + 4 * length * shape.attention)
    return layers + head * 2 * shape.hidden * shape.vocabulary


def step_flops(spec: Spec, shape: Shape, length: int, recompute: bool = False) -> float:
    """Of one optimiser step: all its forwards and backwards, the norm; not the optimiser's own."""
    if spec.optim is None:
        return 0.0
    head = _lossy(spec, shape, length) / length
    forward, method, tokens = forward_flops(shape, length, head), spec.method, spec.optim.batch_size * length
    known = entry_of(method.name)
    again = forward_flops(shape, length, 0.0) * tokens if recompute else 0.0
    again += 2 * shape.tower * shape.patches * spec.optim.batch_size  # the frozen tower's forward
    if not known.adapts:
        return 3 * forward * tokens + again
    linear, rank = shape.matrices(), method.rank or 0
    adapted = [linear[name] for name in method.target_modules]
    products = sum(out * width for out, width in adapted)
    sides = sum(out + width for out, width in adapted)
    per_token = 2 * forward + shape.layers * (4 * length * shape.attention + 6 * rank * sides)
    second = 2 if "dropout_form" in known.fields and method.dropout and method.dropout_form == "published" else 1
    per_token += (second - 1) * shape.layers * 4 * products
    for name in ("q_proj", "k_proj", "v_proj"):  # of the first layer
        mine = name in method.target_modules
        per_token -= 2 * shape.hidden * (linear[name][0] * (second if mine else 1) + (rank if mine else 0))
    norm = 0.0
    if "detach_norm" in known.fields:
        norm = shape.layers * (2 * rank * products + 2 * rank**2 * sides)
        if not method.detach_norm:
            each = shape.layers * (4 * rank * products + 4 * rank**2 * sides)
            norm += each * (spec.optim.batch_size // spec.optim.micro_batch_size)
    return per_token * tokens + norm + again


def _lossy(spec: Spec, shape: Shape, length: int) -> int:
    """Positions of a text that carry loss, at most: in conversations all that are behind the first question."""
    return length if spec.data.train_on_prompt or shape.tower else min(length, ANSWER)


def _narrow(spec: Spec) -> bool:
    """Whether products are made in 16 bits."""
    return BYTES[spec.model.dtype] == 2 or (spec.optim is not None and spec.optim.products == "bfloat16")


def _evaluation_flops(spec: Spec, shape: Shape, items: int, length: int) -> float:
    total = 0.0
    for protocol in spec.evaluation.protocols:
        if protocol == "generate":
            positions = (length + spec.evaluation.max_new_tokens) * spec.evaluation.num_beams
        else:
            options = [1 / (load_task(task).chance or 1) for task in spec.data.tasks]
            positions = length * sum(options) / len(options)
        total += items * positions * forward_flops(shape, length)
    return total


def _generated(spec: Spec, items: int) -> float:
    """Forwards of one token per text that the evaluation makes, each of which reads all weights."""
    if "generate" not in spec.evaluation.protocols:
        return 0.0
    return math.ceil(items / spec.evaluation.batch_size) * spec.evaluation.max_new_tokens


def peak_memory(spec: Spec, shape: Shape, length: int, recompute: bool = False) -> float:
    """Bytes; see the module's docstring."""
    size = BYTES[spec.model.dtype]
    weights = shape.parameters() * size
    beams = spec.evaluation.num_beams if "generate" in spec.evaluation.protocols else 1
    kept = length + spec.evaluation.max_new_tokens
    narrow = shape.matrices()["k_proj"][0]
    cache = spec.evaluation.batch_size * beams * kept * shape.layers * 2 * narrow * size
    training = 0.0
    if spec.optim is not None:
        trained, known = shape.trained(spec.method), entry_of(spec.method.name)
        training = trained * (16 if known.adapts else 3 * size)
        hidden, intermediate = _saved(known, spec.method.dropout > 0, 2 if _narrow(spec) else 4)
        texts = spec.optim.micro_batch_size
        layer = hidden * shape.hidden + intermediate * shape.intermediate
        training += texts * length * (layer + shape.layers * size * shape.hidden if recompute else shape.layers * layer)
        training += texts * _lossy(spec, shape, length) * shape.vocabulary * (2 * size + 12)
    return weights + max(training, cache) + CONTEXT


def _saved(known: Entry, dropout: bool, size: int) -> tuple[int, int]:
    """(a, b): autograd keeps a x hidden + b x intermediate bytes per token and layer; size: bytes of a number, 2 or 4.

    A method whose file has no ``SAVED`` (dropout: {size: (a, b)}) is taken to keep what the one that keeps most does.
    """
    told = [entry.saved[dropout][size] for entry in catalog().values() if entry.saved and dropout in entry.saved]
    return known.saved[dropout][size] if known.saved and dropout in known.saved else max(told)
