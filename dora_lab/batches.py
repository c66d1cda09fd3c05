"""Training items as batches: tokens, which of them carry loss, and an order that comes from (seed, epoch) alone.

Shape suffixes: B items of a micro-batch, T tokens of the longest of them (padded on the left).
"""

from __future__ import annotations

import array
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dora_lab.spec import Data, Optim
from dora_lab.tasks import ItemError, train_prefix, train_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without loss


@dataclass(frozen=True)
class Example:
    """One tokenised item: token ids and, for each, its label (the id itself, or IGNORED)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """Tokenised items and how many of them did not fit into `data.cutoff` tokens as they were."""

    examples: list[Example]
    shortened: int  # the head of the prompt was cut off; the answer never is


def encode(items: dict[str, list[dict[str, Any]]], data: Data, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenise items: template, answer and end-of-sequence token; labels on the answer, or on all (`train_on_prompt`).

    An item longer than `data.cutoff` tokens loses the head of its prompt and is counted. Raises ItemError naming task
    and item where even the answer would not fit.
    """
    examples, shortened = [], 0
    end = cast(int, tokenizer.eos_token_id)
    for task, pool in items.items():
        texts = [train_text(item, data.template) for item in pool]
        if not texts:
            continue
        coded = cast(Any, tokenizer(texts, return_offsets_mapping=True))
        for number, (item, ids, offsets) in enumerate(
            zip(pool, coded["input_ids"], coded["offset_mapping"], strict=True)
        ):
            # a token that reaches past the prefix predicts the answer, also where it begins inside the prefix
            prefix = len(train_prefix(item, data.template))
            answers = [stop > prefix for _, stop in offsets]
            labels = [
                token if data.train_on_prompt or answer else IGNORED for token, answer in zip(ids, answers, strict=True)
            ]
            example = Example(ids=(*ids, end), labels=(*labels, end))
            if len(example.ids) > data.cutoff:
                example = _shorten(example, data.cutoff, f"training item {number} of {task}", sum(answers))
                shortened += 1
            # nothing predicts the first token
            examples.append(Example(ids=example.ids, labels=(IGNORED, *example.labels[1:])))
    return Encoded(examples, shortened)


def _shorten(example: Example, cutoff: int, where: str, answer: int) -> Example:
    if answer + 2 > cutoff:
        raise ItemError(
            f"{where}: {len(example.ids)} tokens, of which the answer has {answer + 1}, do not fit into data.cutoff = "
            f"{cutoff}: the answer would be cut; raise data.cutoff"
        )
    return Example(ids=example.ids[-cutoff:], labels=example.labels[-cutoff:])


def total_steps(items: int, optim: Optim) -> int:
    """Optimiser steps of a run: epochs x items, in full batches (the last is filled from the next epoch's order)."""
    return max(1, math.ceil(items * optim.epochs / optim.batch_size))


def order(items: int, seed: int, length: int) -> list[int]:
    """The first `length` item indices of the run: one permutation per epoch, each from (seed, epoch) alone."""
    indices: list[int] = []
    epoch = 0
    while len(indices) < length:
        epoch_order = list(range(items))
        random.Random(f"{seed} {epoch}").shuffle(epoch_order)
        indices += epoch_order
        epoch += 1
    return indices[:length]


class MicroBatches(Dataset[dict[str, Tensor]]):
    """All micro-batches of a run in training order; one dataset entry is one of them, ready for the model.

    The items of one optimiser step are sorted by length before they are cut into micro-batches: less padding, and
    since the loss is a mean over the step's tokens, the same gradient.
    """

    def __init__(self, examples: Sequence[Example], optim: Optim, seed: int, pad: int) -> None:
        self.examples, self.optim, self.pad = examples, optim, pad
        self.steps = total_steps(len(examples), optim)
        self.indices = order(len(examples), seed, self.steps * optim.batch_size)

    def __len__(self) -> int:
        return len(self.indices) // self.optim.micro_batch_size

    def sha256(self) -> str:
        """Hash of what is trained on: the tokens and labels of every item, and their order."""
        content = hashlib.sha256(array.array("q", self.indices).tobytes())
        for example in self.examples:
            content.update(array.array("q", [len(example.ids), *example.ids, *example.labels]).tobytes())
        return content.hexdigest()

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return collate([self.examples[index] for index in self.items_of(place)], self.pad)

    def items_of(self, place: int) -> list[int]:
        """Indices of the items in micro-batch number `place`."""
        size, micro = self.optim.batch_size, self.optim.micro_batch_size
        step, part = divmod(place, size // micro)
        chosen = self.indices[step * size : (step + 1) * size]
        # ties broken by place in the step, so the order is one and the same everywhere
        chosen = sorted(chosen, key=lambda index: len(self.examples[index].ids))
        return chosen[part * micro : (part + 1) * micro]


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Tensors (B, T) `input_ids`, `attention_mask`, `position_ids` and `labels`, padded on the left.

    With padding on the left all answers end at the same place, so logits are only needed for the last few positions.
    """
    length = max(len(example.ids) for example in examples)
    gaps = [length - len(example.ids) for example in examples]
    ids_BT = torch.tensor([[pad] * gap + list(example.ids) for gap, example in zip(gaps, examples, strict=True)])
    mask_BT = torch.tensor([[0] * gap + [1] * (length - gap) for gap in gaps])
    labels_BT = torch.tensor(
        [[IGNORED] * gap + list(example.labels) for gap, example in zip(gaps, examples, strict=True)]
    )
    # positions count from the first real token: an item's result does not depend on its neighbours
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT, "labels": labels_BT}
