"""Likelihoods of several continuations of one prompt, which is read once: its keys and values serve all of them.

The same numbers as of whole texts but for rounding, whatever is beside a prompt in its batch. Shape suffixes: P prompts
of a batch, N continuations of them, T tokens of the longest prompt, C of the longest continuation, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of its continuation, neither empty


def keeps_prompts(model: PreTrainedModel) -> bool:
    """Whether what a model keeps of a prompt is keys and values alone; a recurrence keeps a state of all it read."""
    return not model._is_stateful and not model.config.is_encoder_decoder


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int, pad: int, tick: Callable[[], None]
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats of the continuation, whether it is the greedy one) of each pair, in order.

    batch_size: prompts, and then continuations, per forward; pad: id of any token; tick: called before each forward.
    """
    prompts = sorted({tuple(prompt) for prompt, _ in pairs}, key=lambda ids: (-len(ids), ids))
    asked: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        asked.setdefault(tuple(prompt), []).append(place)
    found: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        tick()
        kept = _read(model, batch, pad)
        wanted = [(row, place) for row, prompt in enumerate(batch) for place in asked[prompt]]
        wanted.sort(key=lambda one: len(pairs[one[1]][1]))  # stable: less padding, and one order everywhere
        for at in range(0, len(wanted), batch_size):
            part = wanted[at : at + batch_size]
            if max(len(pairs[place][1]) for _, place in part) > 1:
                tick()
            scores = _score(model, kept, [row for row, _ in part], [pairs[place][1] for _, place in part], pad)
            found |= dict(zip((place for _, place in part), scores, strict=True))
    return [found[place] for place in range(len(pairs))]


@dataclass(frozen=True)
class _Kept:
    """What is kept of a batch of prompts."""

    cache: DynamicCache
    mask_PT: Tensor  # 1 where a token stands, 0 where the left is padded
    next_PV: Tensor  # log-probabilities of the token behind each prompt


def _read(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> _Kept:
    length = max(map(len, prompts))
    ids_PT = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask_PT = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    cache = DynamicCache()  # of whole prompts, also where a layer looks back only so far
    logits_PV = model(
        input_ids=ids_PT, attention_mask=mask_PT, position_ids=(mask_PT.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    return _Kept(cache, mask_PT, logits_PV.float().log_softmax(-1))


def _score(
    model: PreTrainedModel, kept: _Kept, rows: Sequence[int], texts: Sequence[Sequence[int]], pad: int
) -> list[tuple[float, bool]]:
    """Of each continuation (token ids) of the prompt in a row of the batch."""
    rows_N = torch.tensor(rows, device=model.device)
    first_N = torch.tensor([ids[0] for ids in texts], device=model.device)
    next_NV = kept.next_PV[rows_N]
    sum_N = next_NV.gather(1, first_N[:, None])[:, 0]
    greedy_N = next_NV.argmax(-1) == first_N
    longest = max(map(len, texts))
    if longest > 1:
        read = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in texts], device=model.device)
        real_NC = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts], device=model.device)
        mask_NT = kept.mask_PT[rows_N]
        places_NC = mask_NT.sum(1, keepdim=True) + torch.arange(longest - 1, device=model.device)
        logits_NCV = model(
            input_ids=read[:, :-1], attention_mask=torch.cat([mask_NT, real_NC[:, :-1]], 1), position_ids=places_NC,
            past_key_values=_of_rows(kept.cache, rows_N), use_cache=True,
        ).logits  # fmt: skip
        log_NC = logits_NCV.float().log_softmax(-1).gather(2, read[:, 1:, None])[..., 0]
        counted_NC = real_NC[:, 1:].bool()
        sum_N = sum_N + log_NC.masked_fill(~counted_NC, 0.0).sum(1)
        greedy_N &= ((logits_NCV.argmax(-1) == read[:, 1:]) | ~counted_NC).all(1)
    return list(zip(sum_N.tolist(), greedy_N.tolist(), strict=True))


def _of_rows(cache: DynamicCache, rows_N: Tensor) -> DynamicCache:
    """A cache of these rows; what is written into it does not reach the first."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(rows_N)
    return found
