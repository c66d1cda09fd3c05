"""Training items as batches: tokens, which of them carry loss, and an order that comes from (seed, epoch) alone.

Shape suffixes: B items of a micro-batch, T tokens of the longest of them (padded on the left).
"""

from __future__ import annotations

import array
import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_lab.forms.llava import Llava
from dora_lab.io.limits import task_sizes
from dora_lab.spec import Data, Optim, SpecError
from dora_lab.tasks import ItemError, train_prefix
from dora_lab.tasks.limits import NO_LIMITS, Limits
from dora_lab.tasks.tokens import code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without loss


@dataclass(frozen=True)
class Example:
    """One tokenised item: its task, token ids and, for each, its label (the id itself, or IGNORED)."""

    task: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def content(self) -> bytes:
        """What is learnt, for a hash."""
        return array.array("q", [len(self.ids), *self.ids, *self.labels]).tobytes()


@dataclass(frozen=True)
class Encoded:
    """Tokenised items, and how many of them did not fit into `data.cutoff` tokens as they were."""

    examples: list[Example]
    shortened: int  # something was cut off
    answers_cut: int = 0  # of these, the answer lost something too: only with data.truncation "right", as released


def encode(
    items: dict[str, list[dict[str, Any]]],
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits = NO_LIMITS,
) -> Encoded:
    """Tokenise items: template, answer and end-of-sequence token; labels on the answer, or on all (`train_on_prompt`).

    An item longer than `data.cutoff` tokens is cut as `data.truncation` says, and counted. Raises ItemError naming task
    and item where nothing would be left to learn: the answer does not fit, or it alone counts and is cut off whole; and
    for an item that is beyond the `limits` of the model: it would end in an IndexError from its depths.
    """
    examples, shortened, answers_cut = [], 0, 0
    end = cast(int, tokenizer.eos_token_id)
    for task, pool in items.items():
        prefixes = [train_prefix(item, data.template) for item in pool]
        coded = code(tokenizer, prefixes, [item["output"] for item in pool])
        for number, text in enumerate(coded):
            kept = _cut(text.ids, text.answer, data, end, f"training item {number} of {task}")
            _refuse_beyond(kept.ids, limits, f"training item {number} of {task}")
            learnt = len(kept.ids) if data.train_on_prompt else kept.answer
            shortened += kept.dropped > 0
            answers_cut += kept.answer_dropped
            # nothing predicts the first token
            labels = [IGNORED] * (len(kept.ids) - learnt) + list(kept.ids[len(kept.ids) - learnt :])
            examples.append(Example(task=task, ids=kept.ids, labels=(IGNORED, *labels[1:])))
    return Encoded(examples, shortened, answers_cut)


@dataclass(frozen=True)
class _Cut:
    """One item within the cutoff."""

    ids: tuple[int, ...]  # with the end-of-sequence token, if it has one
    answer: int  # how many of them, at the end, are answer or end of sequence
    dropped: int  # text tokens that were cut off
    answer_dropped: bool  # some of them the answer's


def _cut(ids: list[int], answer: int, data: Data, end: int, where: str) -> _Cut:
    """`ids`, of which the last `answer` are the answer's, by the rules `truncation`, `eos` and `cutoff` of `data`."""
    ended = data.eos == "always" or (len(ids) < data.cutoff and ids[-1] != end)
    dropped = max(0, len(ids) + ended - data.cutoff)
    tail = (end,) if ended else ()
    too_long = (
        f"{where}: {len(ids)} tokens, of which the answer has {answer}, do not fit into data.cutoff = {data.cutoff}"
    )
    if data.truncation == "prompt":
        if dropped and len(ids) - dropped < answer + 1:
            raise ItemError(f"{too_long}: the answer would be cut; raise data.cutoff")
        return _Cut((*ids[dropped:], *tail), answer + ended, dropped, False)
    if dropped >= answer and not data.train_on_prompt:
        raise ItemError(f"{too_long}: the whole answer would be cut off, and loss is on it alone; raise data.cutoff")
    kept = tuple(ids[: len(ids) - dropped])
    return _Cut((*kept, *tail), max(0, answer - dropped) + ended, dropped, dropped > 0)


def _refuse_beyond(ids: Sequence[int], limits: Limits, where: str) -> None:
    if limits.exceeded(len(ids)):
        raise ItemError(
            f"{where}: {len(ids)} tokens exceed the model's {limits.positions} positions; lower data.cutoff to that"
        )
    if (foreign := limits.foreign(ids)) is not None:
        raise ItemError(
            f"{where}: token {foreign} has no embedding, the model has {limits.rows}; give the tokenizer that belongs "
            "to the model, or resize its embeddings (resize_token_embeddings) and save it"
        )


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

    Examples are those of one task after those of another, as `encode` has them.

    The items of one optimiser step are sorted by length before they are cut into micro-batches: less padding, and
    since the loss is a mean over the step's tokens, the same gradient.
    """

    def __init__(
        self, examples: Sequence[Any], optim: Optim, seed: int, pad: int, multiple: int = 1, form: Llava | None = None
    ) -> None:
        self.examples, self.pad, self.multiple, self.form = examples, pad, multiple, form
        if optim.task_batch_sizes:
            self._steps = steps_by_task(Counter(example.task for example in examples), optim, seed)
        else:
            mixed = order(len(examples), seed, optim.steps(len(examples)) * optim.batch_size)
            self._steps = [mixed[at : at + optim.batch_size] for at in range(0, len(mixed), optim.batch_size)]
        self.steps, self._parts = len(self._steps), optim.batch_size // optim.micro_batch_size

    @property
    def indices(self) -> list[int]:
        """The items of all steps, one step after another."""
        return [index for step in self._steps for index in step]

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
        return self.batch([self.examples[index] for index in self.items_of(place)])

    def batch(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Examples as a micro-batch."""
        return self.form.collate(examples) if self.form else collate(examples, self.pad, self.multiple)

    def items_of(self, place: int) -> list[int]:
        """Indices of the items in micro-batch number `place`."""
        step, part = divmod(place, self._parts)
        # ties broken by place in the step, so the order is one and the same everywhere
        chosen = sorted(self._steps[step], key=lambda index: len(self.examples[index].ids))
        micro = len(chosen) // self._parts
        return chosen[part * micro : (part + 1) * micro]


def collate(examples: Sequence[Example], pad: int, multiple: int = 1) -> dict[str, Tensor]:
    """Tensors (B, T) `input_ids`, `attention_mask`, `position_ids` and `labels`, padded on the left.

    T is the longest item's number of tokens, rounded up to a multiple of `multiple`.
    With padding on the left all answers end at the same place, so logits are only needed for the last few positions.
    """
    length = -(-max(len(example.ids) for example in examples) // multiple) * multiple
    gaps = [length - len(example.ids) for example in examples]
    ids_BT = torch.tensor([[pad] * gap + list(example.ids) for gap, example in zip(gaps, examples, strict=True)])
    mask_BT = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps])
    labels_BT = torch.tensor(
        [[IGNORED] * gap + list(example.labels) for gap, example in zip(gaps, examples, strict=True)]
    )
    # positions count from the first real token: an item's result does not depend on its neighbours
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT, "labels": labels_BT}
