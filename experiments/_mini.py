"""The settings of the earlier runs, on source `mini`: frozen, as every record made with them is.

`commonsense_sweep`, `decomposition` and 13 runs of `commonsense` have them. What replaces them, and why, is in
`commonsense` and `pilot`.
"""

from __future__ import annotations

from dataclasses import replace

from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Probe, Spec

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SEEDS = (0, 1, 2)

MINI = {
    # method, rank: result of commonsense_sweep (0.02 is the end of the grid)
    "learning_rate": {("ft", None): 2e-3, ("lora", 8): 1e-2, ("dora", 8): 1e-2, ("dora", 4): 2e-2},
    "rank": 8,
    "alpha": 16.0,
    "train_items": 1536,
    "test_items": 125,  # per task
    "batch_size": 32,
    "micro_batch_size": 8,  # the items of a step are sorted by length first: less padding
    "warmup_steps": 10,
}


def commonsense() -> list[Spec]:
    """The base, and FT, LoRA, DoRA and DoRA at half the rank with three seeds each."""
    rank = MINI["rank"]
    trained = [
        trained_mini(method, MINI["learning_rate"][method.name, method.rank], seed)
        for method in (full(), low_rank("lora", rank), low_rank("dora", rank), low_rank("dora", rank // 2))
        for seed in SEEDS
    ]
    base = replace(trained[0], method=Method(name="base"), optim=None, probe=None, seed=0)
    return [base, *trained]


def full() -> Method:
    """Full fine-tuning."""
    return Method(name="ft")


def low_rank(name: str, rank: int) -> Method:
    """An adapter of the mini tier; alpha keeps its ratio to the rank."""
    return Method(name=name, rank=rank, alpha=MINI["alpha"] * rank / MINI["rank"], target_modules=TARGETS)


def trained_mini(method: Method, learning_rate: float, seed: int) -> Spec:
    """One run of the mini tier."""
    return Spec(
        experiment="commonsense",
        tier="mini",
        seed=seed,
        model=Model(name="mini"),
        data=Data(name="mini", tasks=TASKS, train_items=MINI["train_items"], test_items=MINI["test_items"]),
        method=method,
        optim=Optim(
            learning_rate=learning_rate,
            warmup_steps=MINI["warmup_steps"],
            batch_size=MINI["batch_size"],
            micro_batch_size=MINI["micro_batch_size"],
            epochs=1.0,
        ),
        probe=Probe(),
        evaluation=Evaluation(protocols=("generate", "loglikelihood"), max_new_tokens=16),
    )
