"""What a model still knows of the text that its base was pretrained on: held-out documents, nats per token.

Of bases whose corpus is here: the embedded one and those that `mini.pretrain` made.
Shape suffixes: N windows, T tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.io.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIRST = 1_000_000  # number of the first held-out document; pretraining took those from 0 on
WINDOWS, CONTEXT = 16, 256  # 4,096 tokens, in windows as long as those of pretraining


def held_out(base: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (N, T) of documents that a base was not pretrained on.

    Raises LoadError for a base without the record of `mini.pretrain`: what its text was is not known here.
    """
    from dora_lab.mini.pretrain import documents

    try:
        record = read_object(base, "record.json")
        seed, taken = int(record["seed"]), int(record["documents"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        raise LoadError(
            f"{base}: evaluation.text is 'pretraining', and the base has no record.json that says what it was "
            "pretrained on; set evaluation.text to none"
        ) from None
    if taken > FIRST:
        raise LoadError(f"{base}: pretrained on {taken} documents, of which {FIRST} on are held out; use fewer")
    ids: list[int] = []
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for document in documents(FIRST, WINDOWS * CONTEXT, seed):
        text = "".join(segment[0] for segment in document)
        ids += [bos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos]  # type: ignore[list-item]
        if len(ids) >= WINDOWS * CONTEXT:
            break
    return torch.tensor(ids[: WINDOWS * CONTEXT]).view(WINDOWS, CONTEXT)


@torch.no_grad()
def nll(model: PreTrainedModel, ids_NT: Tensor) -> float:
    """Mean of -log p over the tokens but the first of each window, in nats; the model is left as it was."""
    trains = model.training
    model.eval()
    ids_NT = ids_NT.to(model.device)
    sums = [
        cross_entropy(model(input_ids=row_T[None]).logits[0, :-1].double(), row_T[1:], reduction="sum").item()
        for row_T in ids_NT
    ]
    model.train(trains)
    return sum(sums) / (ids_NT.shape[0] * (ids_NT.shape[1] - 1))


def about(ids_NT: Tensor) -> dict[str, Any]:
    """What the record says of the text: how many tokens are scored, and the hash of all of them."""
    scored = ids_NT.shape[0] * (ids_NT.shape[1] - 1)
    return {"tokens": scored, "sha256": hashlib.sha256(ids_NT.contiguous().numpy().tobytes()).hexdigest()}
