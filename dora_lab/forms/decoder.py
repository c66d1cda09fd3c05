"""Causal language models: prompt and answer are one text; padding is on the left, so that all answers end together.

Shape suffixes: B items of a micro-batch, T tokens of the longest of them, K last positions, V vocabulary.
"""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab.forms.form import IGNORED, Encoded, Form, Pools, refuse_beyond
from dora_lab.spec import Data
from dora_lab.tasks import ItemError, train_prefix
from dora_lab.tasks.limits import NO_LIMITS, Limits
from dora_lab.tasks.tokens import code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
class Decoder(Form):
    """How causal models are fed."""

    pad: int  # id of the padding token
    multiple: int = 1  # of it the length of a batch is one

    def encode(self, items: Pools, data: Data, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
        return encode(items, data, tokenizer, limits)

    def collate(self, examples: Sequence[Any], epochs: Sequence[int]) -> dict[str, Tensor]:
        return collate(examples, self.pad, self.multiple)

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return labelled(batch)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return answer_loss(model, batch)


def labelled(batch: Mapping[str, Tensor]) -> int:
    """How many tokens have a label."""
    return int(batch["labels"].ne(IGNORED).sum())


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy in nats, summed over the labelled tokens of a batch that is padded on the left."""
    labels_BT = batch["labels"]
    first = int(labels_BT.ne(IGNORED).any(0).nonzero()[0, 0])  # answers end together
    keep = labels_BT.shape[1] - first + 1  # and the position before the first of them, which predicts it
    rest = {name: value for name, value in batch.items() if name != "labels"}
    logits_BKV = model(**rest, logits_to_keep=keep, use_cache=False).logits
    return F.cross_entropy(
        logits_BKV[:, -keep:-1].float().flatten(0, 1),
        labels_BT[:, first:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def encode(
    items: Pools,
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
            refuse_beyond(kept.ids, limits, f"training item {number} of {task}")
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
