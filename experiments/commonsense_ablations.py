"""Ranks (table 15, figure 5), tuning granularity (table 6) and the norm in the graph (table 7): tier paper alone.

    dora-lab run commonsense_ablations --tier paper --dry-run      # 30 runs, 10 to 20 hours each on one 80 GB GPU
    dora-lab run commonsense_ablations --tier paper --only method.rank=4

Ranks 16 and 32 of DoRA and 32 of LoRA are runs of `commonsense`; these are the others. alpha is twice the rank, as in
table 8 (the paper states none for the other ranks), learning rates are those of the authors' README by rank: 3e-4 for
LoRA, 2e-4 for DoRA. Granularity and the norm in the graph keep the rates of DoRA at rank 32.
"""

from __future__ import annotations

from dataclasses import replace

from dora_lab.spec import Spec
from experiments import commonsense

TIERS = ("paper",)
RANKS = {"lora": ((4, 8, 16, 64), 3e-4), "dora": ((4, 8, 64), 2e-4)}  # method: ranks, learning rate
BARE = ("o_proj", "gate_proj", "up_proj", "down_proj")  # table 6: of these the magnitude alone is trained

ITEMS = commonsense.ITEMS


def specs(tier: str) -> list[Spec]:
    """All runs, three seeds each (the paper has one of each)."""
    start = [replace(spec, experiment="commonsense_ablations") for spec in commonsense.specs(tier)]
    at_32 = {(spec.model.name, spec.method.name, spec.seed): spec for spec in start if spec.method.rank == 32}
    small, large = list(commonsense.PAPER)[:2]
    made = []
    for (model, name, _), spec in at_32.items():
        if model == small:
            ranks, rate = RANKS[name]
            made += [_at_rank(spec, rank, rate) for rank in ranks]
        if name == "dora" and model in (small, large):
            made.append(_method(spec, target_modules=("q_proj", "k_proj", "v_proj"), magnitude_modules=BARE))
        if name == "dora" and model == small:
            made.append(_method(spec, detach_norm=False))
    return made


def _at_rank(spec: Spec, rank: int, rate: float) -> Spec:
    assert spec.optim is not None
    return replace(_method(spec, rank=rank, alpha=2.0 * rank), optim=replace(spec.optim, learning_rate=rate))


def _method(spec: Spec, **changes: object) -> Spec:
    return replace(spec, method=replace(spec.method, **changes))
