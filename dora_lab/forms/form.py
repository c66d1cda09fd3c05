"""What a form is: how the models of one family are fed while they are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from dora_lab.spec import Data
from dora_lab.tasks import ItemError
from dora_lab.tasks.limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without loss
Pools = Mapping[str, list[dict[str, Any]]]  # items by task


class Example(Protocol):
    """One tokenised item."""

    @property
    def task(self) -> str: ...

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens that are read: items of about as many go together."""
        ...

    def content(self) -> bytes:
        """What is learnt, for a hash."""
        ...


@dataclass(frozen=True)
class Encoded:
    """Tokenised items, and how many of them did not fit into the spec's cutoffs as they were."""

    examples: list[Any]
    shortened: int  # something was cut off
    answers_cut: int = 0  # of these, the answer lost something too: only where the spec cuts on the right, as released
    unanswered: int = 0  # items of pictures for which no answer has a score
    questions_cut: int = 0  # of the shortened items, those whose question lost something


class Form(ABC):
    """How the models of one family are fed."""

    @abstractmethod
    def encode(self, items: Pools, data: Data, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Encoded:
        """Tokenise items; raises ItemError naming task and item for one that cannot be learnt or is beyond limits."""

    def learnt(self, encoded: Encoded) -> Encoded:
        """What of it is trained on; raises ItemError where that is nothing."""
        return encoded

    def rests(self, examples: Sequence[Any]) -> bool:
        """Whether batches of these may leave out something that is trained: it gets no gradient, and does not move."""
        return False

    @abstractmethod
    def collate(self, examples: Sequence[Any], epochs: Sequence[int]) -> dict[str, Tensor]:
        """A micro-batch; epochs: the pass over the items that each example is of, from 0.

        Among its tensors are `labels` and `attention_mask`, 1 at every token that is read.
        """

    @abstractmethod
    def count(self, batch: Mapping[str, Tensor]) -> int:
        """What the summed loss of an optimiser step is divided by: tokens or items."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch, to be divided by the `count` of its step."""


def refuse_beyond(ids: Sequence[int], limits: Limits, where: str) -> None:
    """Raises ItemError for tokens that the model cannot take."""
    if limits.exceeded(len(ids)):
        raise ItemError(
            f"{where}: {len(ids)} tokens exceed the model's {limits.positions} positions; lower data.cutoff to that"
        )
    if (foreign := limits.foreign(ids)) is not None:
        raise ItemError(
            f"{where}: token {foreign} has no embedding, the model has {limits.rows}; give the tokenizer that belongs "
            "to the model, or resize its embeddings (resize_token_embeddings) and save it"
        )
