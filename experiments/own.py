"""Anybody's model on anybody's data: FT, LoRA and DoRA beside the base, their rates from a sweep of their own.

    dora-lab run own --model-dir M --data-dir D [--quick] [--ft]    # M: a saved causal model; D: LLM-Adapters' layout

Adapted are all linear layers of the model's blocks; warm-up, validation and the rest follow from what is there. A sweep
of equal size for each method on validation items chooses its rate, then come the seeds. It says beforehand what it will
do, how long that takes and what of it is not the paper's protocol; called again, it goes on where it was.

Without a folder: the sweep that it would make of the model of experiment `small` (for --dry-run).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dora_lab.launch.given import FEWEST, Given
from dora_lab.methods.catalog import entry_of
from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Probe, Spec

TIERS = ("small",)
BATCH = 16
RANK = 16
SWEEP_SEED = 100
MIDDLE = {"ft": 1e-4, "lora": 1e-3, "dora": 1e-3}
STEP = 4.0  # from one rate of the grid to the next: wide, as nothing is known of the model
LONGER = 2  # how often all grids are made longer where the best rate is an end of one
# what is chosen here: a change of one of these on the command line would be overwritten, or make two runs one
CHOSEN = (
    "seed", "method.name", "optim.learning_rate", "evaluation.split", "experiment", "tier", "data.name",
    "data.eval_name",
)  # fmt: skip


class Size(NamedTuple):
    """How much is done."""

    train_items: int  # at most, as all of these
    validation_items: int
    test_items: int  # per task
    rates: int
    seeds: int


FULL = Size(train_items=1600, validation_items=200, test_items=200, rates=5, seeds=3)
QUICK = Size(train_items=320, validation_items=64, test_items=50, rates=3, seeds=1)


# what `run own --dry-run` plans for without a folder
EXAMPLE = Given(
    model=Model(name="smollm2"), kind="LlamaForCausalLM", parameters=134_515_008, blocks=30, left_out=(), scope=None,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), narrowest=192,
    positions=8192, tasks=("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"), data_sha256=None, items=18_000,
    tokens=128,
)  # fmt: skip


def specs(tier: str) -> list[Spec]:
    """The sweep of the example."""
    return sweep(first(EXAMPLE, FULL), methods(), factors(FULL))


def methods(ft: bool = False) -> tuple[str, ...]:
    """What is compared."""
    return ("ft", "lora", "dora") if ft else ("lora", "dora")


def factors(size: Size) -> tuple[float, ...]:
    """The rates of a grid, as multiples of its middle."""
    return tuple(STEP ** (place - size.rates // 2) for place in range(size.rates))


def longer(grid: Sequence[float], top: bool) -> tuple[float, ...]:
    """The grid with one rate more, above or below."""
    return (*grid, grid[-1] * STEP) if top else (grid[0] / STEP, *grid)


def first(given: Given, size: Size) -> Spec:
    """The DoRA run that all others are made from, at the middle of its grid."""
    held = min(size.validation_items, given.items // FEWEST)
    trained = min(size.train_items, given.items - held)
    rank = min(RANK, max(1, given.narrowest // 2))
    adapter = Method(name="dora", rank=rank, alpha=2.0 * rank, target_modules=given.targets, scope=given.scope)
    spec = Spec(
        experiment="own",
        tier="small",
        seed=0,
        model=given.model,
        data=Data(
            name="llm_adapters", tasks=given.tasks, sha256=given.data_sha256, train_items=trained,
            validation_items=held, test_items=size.test_items, template="cloze",
            cutoff=min(given.tokens, given.positions or given.tokens),
        ),
        method=adapter,
        optim=Optim(
            learning_rate=MIDDLE["dora"], warmup_steps=0, batch_size=BATCH, micro_batch_size=BATCH,
            epochs=float(min(3, max(1, size.train_items // trained))),  # of few items, the paper's three passes at most
        ),
        probe=Probe(),
        evaluation=Evaluation(protocols=("cloze",), reuse=True),
    )  # fmt: skip
    return scaled(spec)


def scaled(spec: Spec, said: Sequence[str] = ()) -> Spec:
    """The spec with what follows from its number of steps; `said` are fields that are left as they are."""
    optim = spec.optim
    assert optim is not None and spec.data.train_items is not None
    steps = optim.steps(spec.data.train_items)
    if "optim.warmup_steps" not in said and not optim.warmup_fraction:
        optim = replace(optim, warmup_steps=min(steps - 1, max(1, steps // 10)))
    if "optim.eval_steps" not in said and spec.data.validation_items:
        optim = replace(optim, eval_steps=max(1, steps // 4))
    return replace(spec, optim=optim)


def sweep(spec: Spec, names: Sequence[str], grid: Sequence[float]) -> list[Spec]:
    """Every method at every rate, one seed, scored on validation items; no losses meanwhile, nothing probed."""
    found = [_at(spec, name, MIDDLE[name] * factor, SWEEP_SEED) for name in names for factor in grid]
    return [
        replace(
            one,
            optim=replace(one.optim, eval_steps=None, keep="last"),
            probe=None,
            evaluation=replace(one.evaluation, split="validation"),
        )
        for one in found
        if one.optim is not None
    ]


def confirmation(spec: Spec, rates: Mapping[str, float], size: Size) -> list[Spec]:
    """The base, and every method at its rate with all seeds."""
    base = replace(spec, method=Method(name="base"), optim=None, probe=None, seed=0)
    return [base, *(_at(spec, name, rate, seed) for seed in range(size.seeds) for name, rate in rates.items())]


def _at(spec: Spec, name: str, learning_rate: float, seed: int) -> Spec:
    # what the method reads of the settings of all
    adapter = Method(name=name, **{field: getattr(spec.method, field) for field in entry_of(name).fields})
    assert spec.optim is not None
    return replace(spec, method=adapter, seed=seed, optim=replace(spec.optim, learning_rate=learning_rate))
