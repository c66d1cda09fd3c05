"""Training items in an order that comes from (seed, epoch) alone, as micro-batches; what is in one, the form says."""

from __future__ import annotations

import array
import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor
from torch.utils.data import Dataset

from dora_lab.forms.form import Example, Form
from dora_lab.io.limits import task_sizes
from dora_lab.spec import Optim, SpecError


def order(items: int, seed: int | str, length: int) -> list[int]:
    """The first `length` item indices of the run: one permutation per epoch, each from (seed, epoch) alone."""
    indices: list[int] = []
    epoch = 0
    while len(indices) < length:
        epoch_order = list(range(items))
        random.Random(f"{seed} {epoch}").shuffle(epoch_order)
        indices += epoch_order
        epoch += 1
    return indices[:length]


def steps_by_task(counts: Mapping[str, int], optim: Optim, seed: int) -> list[list[int]]:
    """The item indices of every optimiser step, each of one task; items are numbered task after task, in `counts`.

    A task has epochs x items, in full steps, the last one filled from its next epoch; items come as in `order`. Which
    task's turn it is comes from (seed, epoch) alone: every epoch has its share of each task's steps, shuffled. Raises
    SpecError where `optim.task_batch_sizes` names other tasks than there are.
    """
    sizes = task_sizes(optim.task_batch_sizes)
    if sizes.keys() != counts.keys():
        raise SpecError(
            f"optim.task_batch_sizes names {', '.join(sizes)}; trained are {', '.join(counts)}: name each of them once"
        )
    first = dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
    last = {task: max(1, math.ceil(counts[task] * optim.epochs / sizes[task])) for task in counts}
    found: list[list[int]] = []
    done = dict.fromkeys(counts, 0)
    items = {task: order(counts[task], f"{seed} {task}", last[task] * sizes[task]) for task in counts}
    for epoch in range(math.ceil(optim.epochs)):
        due = {task: min(last[task], math.ceil(counts[task] * (epoch + 1) / sizes[task])) for task in counts}
        turns = [task for task in counts for _ in range(due[task] - done[task])]
        random.Random(f"{seed} turns {epoch}").shuffle(turns)
        for task in turns:
            start = done[task] * sizes[task]
            found.append([first[task] + index for index in items[task][start : start + sizes[task]]])
            done[task] += 1
    return found


class MicroBatches(Dataset[dict[str, Tensor]]):
    """All micro-batches of a run in training order; one dataset entry is one of them, ready for the model.

    Examples are those of one task after those of another, as forms encode them.

    The items of one optimiser step are sorted by length before they are cut into micro-batches: less padding, and
    since the loss is a mean over the step's tokens or items, the same gradient.
    """

    def __init__(self, examples: Sequence[Example], optim: Optim, seed: int, form: Form) -> None:
        self.examples, self.form = examples, form
        if optim.task_batch_sizes:
            self._steps = steps_by_task(Counter(example.task for example in examples), optim, seed)
        else:
            mixed = order(len(examples), seed, optim.steps(len(examples)) * optim.batch_size)
            self._steps = [mixed[at : at + optim.batch_size] for at in range(0, len(mixed), optim.batch_size)]
        self.steps, self._parts = len(self._steps), optim.batch_size // optim.micro_batch_size
        # what a step's items are drawn from, one permutation after another: all items, or those of the step's task
        self._pools = Counter(example.task for example in examples) if optim.task_batch_sizes else None
        self._starts = self._places()

    @property
    def indices(self) -> list[int]:
        """The items of all steps, one step after another."""
        return [index for step in self._steps for index in step]

    def _places(self) -> list[int]:
        """How many items were drawn before each step, from the same pool."""
        starts, drawn = [], Counter[str]()
        for step in self._steps:
            pool = self.examples[step[0]].task if self._pools else ""
            starts.append(drawn[pool])
            drawn[pool] += len(step)
        return starts

    def __len__(self) -> int:
        return self.steps * self._parts

    def sha256(self) -> str:
        """Hash of what is trained on: the tokens and labels of every item, and their order."""
        content = hashlib.sha256()
        for step in self._steps:
            content.update(array.array("q", step).tobytes())
        for example in self.examples:
            content.update(example.content())
        return content.hexdigest()

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        drawn = self.drawn(place)
        return self.form.collate([self.examples[index] for index, _ in drawn], [epoch for _, epoch in drawn])

    def items_of(self, place: int) -> list[int]:
        """Indices of the items in micro-batch number `place`."""
        return [index for index, _ in self.drawn(place)]

    def drawn(self, place: int) -> list[tuple[int, int]]:
        """The items in micro-batch number `place`: index, and the how-manieth pass over the items it is of, from 0."""
        number, part = divmod(place, self._parts)
        step, start = self._steps[number], self._starts[number]
        pool = len(self.examples) if self._pools is None else self._pools[self.examples[step[0]].task]
        every = [(index, (start + at) // pool) for at, index in enumerate(step)]
        # ties broken by place in the step, so the order is one and the same everywhere
        chosen = sorted(every, key=lambda one: len(self.examples[one[0]].ids))
        micro = len(chosen) // self._parts
        return chosen[part * micro : (part + 1) * micro]


def cut(examples: Sequence[Example], size: int, *, by_task: bool) -> list[list[Example]]:
    """The examples in order, at most `size` at a time; by_task: none of two tasks."""
    parts: list[list[Example]] = []
    for example in examples:
        if not parts or len(parts[-1]) == size or (by_task and parts[-1][0].task != example.task):
            parts.append([])
        parts[-1].append(example)
    return parts
