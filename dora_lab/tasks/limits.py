"""What a model can take: how many tokens in a row, and which token ids. Asked before a training."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the names that configurations have for it; one that has none of them (Bloom, Mamba) has no last position
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length")


@dataclass(frozen=True)
class Limits:
    """The limits of one model."""

    positions: int | None  # tokens of a text at most; None: no limit but the memory
    rows: int  # of its input embeddings: token ids are below it

    def exceeded(self, tokens: int) -> bool:
        """Whether a text of that many tokens is too long."""
        return self.positions is not None and tokens > self.positions

    def foreign(self, ids: Iterable[int]) -> int | None:
        """A token id that the model has no embedding of, or None: looked up, it ends in an IndexError or worse."""
        worst = max(ids, default=0)
        return worst if worst >= self.rows else None


NO_LIMITS = Limits(None, sys.maxsize)  # of no model


def limits(model: PreTrainedModel) -> Limits:
    """The limits that a model's configuration and embeddings say."""
    config: Any = model.config.get_text_config()
    said = [value for name in POSITIONS if isinstance(value := getattr(config, name, None), int) and value > 0]
    embeddings: Any = model.get_input_embeddings()
    return Limits(said[0] if said else None, embeddings.weight.shape[0])
