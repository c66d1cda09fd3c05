"""Where a text's tokens turn from prompt to answer: one rule, for what is trained and for what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Coded:
    """A prompt with its answer in tokens, as the tokenizer cuts the whole text."""

    ids: list[int]
    answer: int  # how many of them, at the end, are the answer's
    joined: str  # the end of the prompt that the first of these has in it, too; "" if it begins with the answer

    @property
    def context(self) -> list[int]:
        """The tokens before the answer's."""
        return self.ids[: len(self.ids) - self.answer]


def code(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]) -> list[Coded]:
    """Each prompt with its answer in tokens.

    A token is the answer's if it reaches past the prompt, also where it begins inside it (" the" after an indent).
    The whole text is cut at once: a prompt by itself may end in other tokens.
    """
    if not prompts:
        return []
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    coded = cast(Any, tokenizer(texts, return_offsets_mapping=True))
    found = []
    for prompt, ids, offsets in zip(prompts, coded["input_ids"], coded["offset_mapping"], strict=True):
        begins = [start for start, stop in offsets if stop > len(prompt)]
        found.append(Coded(ids, len(begins), prompt[begins[0] :] if begins else ""))
    return found
