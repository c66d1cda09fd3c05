"""A real language model on a laptop: table 1, figures 2 and 3 on the thirty layers of SmolLM2-135M-Instruct.

    dora-lab fetch smollm2
    dora-lab run small --data-dir DIR           # a folder in the LLM-Adapters layout

Its weights are dequantised Q4_1: their numbers never share a column with the hub's.

FT, LoRA, DoRA, DoRA at half the rank, and the base, on BoolQ, ARC and OpenBookQA; PIQA and Social IQa are not trained
on. What is trained and scored is the text of the answer (template and protocol `cloze`): labels out of a list are
beyond this model. Every cell has a sweep of seven rates on validation items; at the rates that it chooses, twenty
seeds. What will be claimed is registered before: registered/small.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Probe, Spec

TIERS = ("small",)
TASKS = ("boolq", "piqa", "social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa")
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
CELLS = (("ft", None), ("lora", 16), ("dora", 16), ("dora", 8))
SMALL = {
    "train_items": 1600,  # about 60,000 tokens, in 100 steps
    "validation_items": 400,  # of the sweep
    "test_items": 250,  # per task
    "batch_size": 16,
    "warmup_steps": 10,
    "fractions": (0.25, 0.5, 0.75, 1.0),  # the paper's four; `sign` has more of the end
}
PROBED = 5  # seeds whose rows are kept: 210 matrices at four checkpoints are 100 kB a run
SWEEP_SEED = 100
MIDDLE = {"ft": 1e-4, "lora": 1e-3, "dora": 1e-3}
STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # of the middle
# results/tables/rates: the vertex of the sweep's parabola, frozen before any run of `confirmation`
RATES: dict[tuple[str, int | None], float] = {
    ("ft", None): 7.9e-5,
    ("lora", 16): 0.0011,
    ("dora", 16): 0.0011,
    ("dora", 8): 0.0013,
}


def specs(tier: str) -> list[Spec]:
    """All runs."""
    return [*sweep(), *confirmation()]


def sweep() -> list[Spec]:
    """Every cell at every rate of its grid, one seed, on validation items."""
    return [
        _swept(trained(method, rank, MIDDLE[method] * step, SWEEP_SEED)) for method, rank in CELLS for step in STEPS
    ]


def confirmation(seeds: Sequence[int] = range(20)) -> list[Spec]:
    """The base, and every cell at its rate with twenty seeds; nothing before the rates are chosen."""
    found = [trained(method, rank, rate, seed) for seed in seeds for (method, rank), rate in RATES.items()]
    kept = [spec if spec.seed < PROBED else replace(spec, probe=None) for spec in found]
    return [untrained(found[0]), *kept] if found else []


def untrained(spec: Spec) -> Spec:
    """The base, asked the same."""
    return replace(spec, method=Method(name="base"), optim=None, probe=None, seed=0)


def trained(method: str, rank: int | None, learning_rate: float, seed: int) -> Spec:
    """One run, scored on test items."""
    adapter = Method(name=method)
    if rank is not None:
        adapter = Method(name=method, rank=rank, alpha=2.0 * rank, target_modules=TARGETS)
    return Spec(
        experiment="small",
        tier="small",
        seed=seed,
        model=Model(name="smollm2"),
        data=Data(
            name="llm_adapters",
            tasks=TASKS,
            train_items=SMALL["train_items"],
            test_items=SMALL["test_items"],
            template="cloze",
        ),
        method=adapter,
        optim=Optim(
            learning_rate=learning_rate,
            warmup_steps=SMALL["warmup_steps"],
            batch_size=SMALL["batch_size"],
            micro_batch_size=SMALL["batch_size"],
            epochs=1.0,
        ),
        probe=Probe(fractions=SMALL["fractions"]),
        evaluation=Evaluation(protocols=("cloze",)),
    )


def _swept(spec: Spec) -> Spec:
    return replace(
        spec,
        data=replace(spec.data, validation_items=SMALL["validation_items"]),
        probe=Probe(fractions=(1.0,)),
        evaluation=replace(spec.evaluation, split="validation"),
    )
