"""Commonsense reasoning: table 1 and figures 2 and 3 (eight tasks; FT, LoRA, DoRA and DoRA at half the rank).

    dora-lab run commonsense                    # mini: 147 runs of a sweep, under a minute each, one per core at a time
    dora-lab reproduce commonsense              # 13 runs, beside the committed ones
    dora-lab run commonsense --tier paper       # paper: 36 runs, 10 to 20 hours each on one 80 GB GPU

mini: the embedded base and world (source `mini2`); no network, no GPU. Every cell (method and rank) has a sweep of its
own, of equal size; at the rates that it chose, 40 seeds, which are 281 runs more. 13 earlier runs on source `mini` are
kept and not made again. What will be claimed is registered before: registered/<name>.md.

paper: the models and hyperparameters of table 8 and, for LoRA, those of the LLM-Adapters baselines that the paper uses
(r 32, alpha 64, learning rate 3e-4), everything else as the released code has it. Give the folder of test files (a
clone of LLM-Adapters) with --data-dir; training items are taken from it too if it has them, else from the hub at
--with data.revision=COMMIT. Each published choice is a field, and the corrected one is one --with away:

    published                                             corrected (--with)
    prompts that differ between training and evaluation   data.template=clean
    loss on the prompt too                                data.train_on_prompt=false
    items over 256 tokens lose their end, the answer      data.truncation=prompt
    no end-of-sequence token on an item of 256 tokens     data.eos=always
    the checkpoint of lowest loss on 120 items            optim.keep=last
    adapter merged into float16 for the evaluation        evaluation.weights=unmerged
    padding token of id 0 (masked: no result changes)     model.pad=own

What differs from the released code all the same, on purpose: everything random comes from the seed (there the start of
A and the order of data were not reproducible); evaluation is masked, so its batch size changes nothing (there batches
over 1 attended to their padding); magnitudes start from float32 norms of the float16 weights; the validation loss is a
mean over tokens, not over batches of 8; AdamW is torch's fused one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Probe, Spec
from experiments import _mini
from experiments._mini import TARGETS, TASKS, full, low_rank, trained_mini

TIERS = ("mini", "paper")
SEEDS = (0, 1, 2)  # of tier paper

# Frozen after trials on validation facts (CHANGELOG). A cell: method, rank; alpha / rank is 2 in all of them.
CELLS = (("ft", None), *((method, rank) for method in ("lora", "dora") for rank in (4, 8, 16)))
MINI = {
    "train_items": 2048,
    "validation_items": 800,  # of the sweep; of facts that no test asks about
    "test_items": 150,  # per task
    "fractions": (0.25, 0.5, 0.75, 0.8, 0.9, 1.0),  # the paper's four, and more of the end
}
SWEEP_SEEDS = (100, 101, 102)
MIDDLE = {"ft": 2e-3, "lora": 1e-2, "dora": 1e-2}
STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # of the middle: the same number of tries for every cell
# results/tables/rates: the vertex of the sweep's parabola, frozen before any run of `confirmation`
RATES: dict[tuple[str, int | None], float] = {
    ("ft", None): 0.0014,
    ("lora", 4): 0.012,
    ("lora", 8): 0.0083,
    ("lora", 16): 0.0062,
    ("dora", 4): 0.016,
    ("dora", 8): 0.0086,
    ("dora", 16): 0.0062,
}

# table 8: hub id: (commit, DoRA's learning rate at rank 32, at rank 16). The commits are those that public code pins or
# has in its caches; no such source was found for LLaMA-13B and the training mix: these have to be given, and a run
# without them says how to find them.
PAPER = {
    "yahma/llama-7b-hf": ("cf33055e5df9cc533abd7ea4707bf727ca2ada75", 1e-4, 2e-4),
    "yahma/llama-13b-hf": (None, 2e-4, 3e-4),
    "meta-llama/Llama-2-7b-hf": ("01c7f73d771dfac7d292323805ebc428287df4f9", 2e-4, 2e-4),
    "meta-llama/Meta-Llama-3-8B": ("8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920", 1e-4, 1e-4),
}
PAPER_LORA_LEARNING_RATE = 3e-4
ITEMS = {"commonsense_170k": 170_420}  # as published; for showing numbers of steps before the data is there


def specs(tier: str) -> list[Spec]:
    """All runs of a tier."""
    return [*sweep(), *confirmation()] if tier == "mini" else paper()


def sweep() -> list[Spec]:
    """Every cell at every rate of its grid, three seeds, on validation items; seed by seed."""
    return [
        swept(method, rank, MIDDLE[method] * step, seed)
        for seed in SWEEP_SEEDS
        for method, rank in CELLS
        for step in STEPS
    ]


def confirmation(seeds: Sequence[int] = range(40)) -> list[Spec]:
    """The base, and every cell at its rate with 40 seeds."""
    found = [at_its_rate(*cell, seed) for seed in seeds for cell in RATES]
    return [replace(found[0], method=Method(name="base"), optim=None, probe=None, seed=0), *found]


def reproduced() -> list[Spec]:
    """What `dora-lab reproduce` runs: table 1's rows with three seeds of the forty."""
    rows = (("ft", None), ("lora", 8), ("dora", 8), ("dora", 4))
    return [spec for spec in confirmation(range(3)) if spec.optim is None or _cell(spec) in rows]


def earlier() -> list[Spec]:
    """Runs on source `mini`, made before this instrument; their records stay, and nobody makes them again."""
    return _mini.commonsense()


def at_its_rate(method: str, rank: int | None, seed: int) -> Spec:
    """The run of a cell at the rate that its sweep chose."""
    return trained(method, rank, RATES[method, rank], seed)


def trained(method: str, rank: int | None, learning_rate: float, seed: int) -> Spec:
    """One run of the mini tier, scored on test items: the steps of the earlier runs, more of them, on `mini2`."""
    spec = trained_mini(full() if rank is None else low_rank(method, rank), learning_rate, seed)
    return replace(
        spec,
        data=Data(name="mini2", tasks=TASKS, train_items=MINI["train_items"], test_items=MINI["test_items"]),
        probe=Probe(fractions=MINI["fractions"]),
        evaluation=Evaluation(protocols=("loglikelihood",), text="pretraining"),
    )


def swept(method: str, rank: int | None, learning_rate: float, seed: int) -> Spec:
    """The same run, scored on validation items."""
    spec = trained(method, rank, learning_rate, seed)
    return replace(
        spec,
        data=replace(spec.data, validation_items=MINI["validation_items"]),
        probe=None,
        evaluation=replace(spec.evaluation, split="validation", text="none"),
    )


def _cell(spec: Spec) -> tuple[str, int | None]:
    return spec.method.name, spec.method.rank


def paper() -> list[Spec]:
    """LoRA r 32, DoRA r 32 and DoRA r 16 on four models with three seeds each (the paper has one run of each)."""
    return [
        _paper(model, method, rank, learning_rate, seed)
        for model, (_, at_32, at_16) in PAPER.items()
        for method, rank, learning_rate in (
            ("lora", 32, PAPER_LORA_LEARNING_RATE),
            ("dora", 32, at_32),
            ("dora", 16, at_16),
        )
        for seed in SEEDS
    ]


def _paper(model: str, method: str, rank: int, learning_rate: float, seed: int) -> Spec:
    return Spec(
        experiment="commonsense",
        tier="paper",
        seed=seed,
        model=Model(name=model, revision=PAPER[model][0], dtype="float16", pad="zero"),
        data=Data(
            name="commonsense_170k",
            tasks=TASKS,
            validation_items=120,
            template="published",
            cutoff=256,
            train_on_prompt=True,
            eval_name="llm_adapters",
            truncation="right",
            eos="if_shorter",
            holdout="mixed",
            pad_to_multiple_of=8,
        ),
        method=Method(name=method, rank=rank, alpha=2.0 * rank, dropout=0.05, target_modules=TARGETS),
        optim=Optim(
            learning_rate=learning_rate,
            warmup_steps=100,
            batch_size=16,
            micro_batch_size=16,
            epochs=3.0,
            keep="best_loss",
            eval_steps=80,
        ),
        probe=Probe(),
        evaluation=Evaluation(protocols=("generate",), num_beams=4, max_new_tokens=32, batch_size=8, weights="merged"),
    )
