"""What the runs of a selection would take, before any is run: `dora-lab run --dry-run`. The formulas: `cost`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dora_lab.io.limits import task_sizes
from dora_lab.launch import cost
from dora_lab.launch.runtime import AS_THE_TIER_SAYS, Runtime
from dora_lab.methods.catalog import is_counted
from dora_lab.models import shapes
from dora_lab.models.base import model_folder
from dora_lab.spec import Spec, spec_id


def lines(
    specs: Sequence[Spec],
    known: Mapping[str, int],
    model_dir: Path | None,
    gpu: str | None,
    tokens: int | None,
    runtime: Runtime = AS_THE_TIER_SAYS,
) -> Iterator[str]:
    """A line per spec with its steps and, where its model and data are known here, one with its cost; then the sum.

    Args: known: sizes of data that a spec takes whole; model_dir: a saved model to start from; gpu: a name that
        `cost.gpu` knows, None: A100-80GB for runs on a GPU, no hours for others; tokens: per text, None: the cutoff.
    """
    gpu = gpu or ("A100-80GB" if all(runtime.of(spec.tier).device == "cuda" for spec in specs) else None)
    card = None if gpu is None else cost.gpu(gpu)
    found: list[cost.Cost] = []
    for spec in specs:
        rank = "-" if spec.method.rank is None else spec.method.rank
        yield (
            f"{spec_id(spec)}  {spec.tier:5}  {spec.model.name:26} {spec.method.name:5} rank {rank:<3} "
            f"seed {spec.seed:<3} {_steps(spec, known)}"
        )
        shape, items, asked = _shape(spec, model_dir), _train_items(spec, known), cost.test_items(spec)
        counted = shape is not None and (shape.tower or is_counted(spec.method))
        if shape is not None and items is not None and asked is not None and counted:
            found.append(cost.estimate(spec, shape, items, asked, card, tokens, runtime.recompute))
            yield f"{'':14}{cost.words(found[-1], card)}"
    yield f"{len(specs)} specs"
    if found:
        yield cost.total(found, gpu, tokens)
    if len(found) < len(specs):
        yield f"{len(specs) - len(found)} of them have no estimate: their model, data or method is not counted here"


def _shape(spec: Spec, model_dir: Path | None) -> shapes.Shape | None:
    if model_dir is not None or spec.model.name == "mini":
        return shapes.of_folder(model_folder(spec.model, model_dir))
    name = shapes.printed_name(spec.model.name)
    return shapes.OTHERS.get(spec.model.name) if name is None else shapes.PAPER[name][0]


def _train_items(spec: Spec, known: Mapping[str, int]) -> int | None:
    """How many items are trained on, None if that is only known once the data is there."""
    if spec.optim is None:
        return 0
    if {*task_sizes(spec.optim.task_batch_sizes).values()} - {spec.optim.batch_size}:
        return None  # how many of each task is not known; with steps as large for all it does not matter
    if spec.data.train_items is None and spec.data.name in known:
        return known[spec.data.name] - spec.data.validation_items
    return spec.data.train_items


def _steps(spec: Spec, known: Mapping[str, int]) -> str:
    """Optimiser steps and how they are made."""
    if spec.optim is None:
        return "no training"
    batch = ", ".join(spec.optim.task_batch_sizes) or str(spec.optim.batch_size)
    how = f"learning rate {spec.optim.learning_rate:g}, batch {batch}"
    items = _train_items(spec, known)
    if items is None:
        steps = " in steps of one task" if spec.optim.task_batch_sizes else ""
        return f"{spec.optim.epochs:g} epochs of all items{steps}, {how}"
    about = "about " if spec.data.train_items is None else ""
    return f"{about}{spec.optim.steps(items)} steps, {how}"
