"""The second part of the text base's pretraining: sentences of which all words are read at one place.

A picture shows all that there is to see of a thing in one token; prose says it in eight, and a base that has read prose
alone looks for a thing's colour at a word beside that of its shape. So it reads prose once more, most of it with the
embeddings of a sentence's words added up. This is text, too: no picture, and nothing of how features are made, is in
it.

Shape suffixes: B documents, S tokens, N places, T tokens of the decoder, V words, D width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import BartForConditionalGeneration, PreTrainedTokenizerFast

from dora_lab.mini.vl.pretrain import (
    BATCH,
    GUIDED,
    HERE,
    POOL,
    Batch,
    Learned,
    batches,
    gate,
    guidance,
    learn,
    optimizers,
    rate,
    save,
    update,
)  # fmt: skip

SHARE = 0.8  # of the steps; in the others every word has its own place, so that nothing is forgotten


def merge(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch by places, each sentence at one, and which tokens are read at each place (B, N, S).

    What says which picture a sentence is about ("left image:") is read with the sentence, too.
    """
    real_BS = batch.ids_BS.ne(1)
    marks_BS = batch.prose_BS & batch.things_BS.eq(0)
    begins_BS = ~batch.prose_BS | ~_before(batch.prose_BS) | batch.things_BS.ne(_before(batch.things_BS))
    place_BS = (begins_BS & real_BS).cumsum(1) - 1
    picture_BS = (marks_BS & ~_before(marks_BS)).cumsum(1)
    read_BNS = place_BS[:, None].eq(torch.arange(int(place_BS.max()) + 1)[None, :, None]) & real_BS[:, None]
    things_BN, picture_BN = ((read_BNS * bits_BS[:, None]).amax(2) for bits_BS in (batch.things_BS, picture_BS))
    prose_BN = (read_BNS & batch.prose_BS[:, None]).any(2)
    own_BNS = picture_BN[:, :, None].eq(picture_BS[:, None]) & marks_BS[:, None]
    read_BNS = read_BNS | (own_BNS & (prose_BN & things_BN.ne(0))[:, :, None])
    return batch._replace(things_BS=things_BN, prose_BS=prose_BN), read_BNS


def _before(values_BS: Tensor) -> Tensor:
    """At each token, what the one before it has."""
    return pad(values_BS[:, :-1], (1, 0))


def inputs(model: BartForConditionalGeneration, batch: Batch, read_BNS: Tensor) -> dict[str, Tensor]:
    """What the encoder is given: the sums of the words' embeddings (B, N, D), and which places there are (B, N)."""
    words_BSD = model.get_input_embeddings()(batch.ids_BS)
    return {"inputs_embeds": read_BNS.to(words_BSD.dtype) @ words_BSD, "attention_mask": read_BNS.any(2).long()}


def learn_merged(model: BartForConditionalGeneration, batch: Batch, guided: bool) -> Learned:
    """As `pretrain.learn`, of sentences at one place each; the encoder's last layer says all words of a place."""
    places, read_BNS = merge(batch)
    with torch.autocast("cpu", torch.bfloat16):
        given = inputs(model, batch, read_BNS)
        output = model(**given, labels=batch.labels_BT, use_cache=False, output_attentions=guided)
        said_BNV = model.lm_head(output.encoder_last_hidden_state)
    logs_BNS = said_BNV.float().log_softmax(2).gather(2, batch.ids_BS[:, None].expand(-1, said_BNV.shape[1], -1))
    words_BN = -(logs_BNS * read_BNS).sum(2) / read_BNS.sum(2).clamp_min(1)
    logits_BTV, said_BT = output.logits.float(), batch.labels_BT.ne(-100)
    losses_BT = cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT, reduction="none")
    loss = (losses_BT.sum(1) / said_BT.sum(1)).mean()
    (loss + 0.3 * words_BN[places.prose_BS].mean() + (0.1 * guidance(output, places) if guided else 0.0)).backward()
    return Learned(loss.item(), (logits_BTV.argmax(2).eq(batch.labels_BT) | ~said_BT).all(1).tolist())


def go_on(steps: int, folder: Path, learning_rate: float = 0.001, threads: int = 1, questions: int = 1000) -> None:
    """Train the base of `folder` for `steps` batches that it has not read, and write it again with its record."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    record = json.loads((folder / "record.json").read_text())
    if "merged" in record:
        raise SystemExit(f"{folder}: this base had its second part; run dora_lab.mini.vl.pretrain first")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BartForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.train()
    both, rng, began = optimizers(model, learning_rate), Random("merged"), time.time()
    first = -(-record["steps"] // POOL) * POOL * BATCH
    stream = batches(tokenizer, first)
    log, right = list[dict[str, Any]](), defaultdict[str, list[bool]](list)
    for step in range(steps):
        batch, merged, guided = next(stream), rng.random() < SHARE, step < GUIDED * steps
        learning = partial(learn_merged if merged else learn, model, batch, guided)
        found = update(model, both, learning_rate * rate(step, steps), learning)
        for kind, hit in zip(batch.kinds, found.right, strict=True):
            if merged:
                right[kind].append(hit)
        if (step + 1) % 100 == 0:
            row = {"step": step + 1, "loss": round(found.value, 4), "seconds": round(time.time() - began, 1)}
            log.append(row | {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())})
            right.clear()
            print(json.dumps(log[-1]), flush=True)
    second = {
        "steps": steps, "batch": BATCH, "share": SHARE, "peak_learning_rate": learning_rate, "first_document": first,
        "threads": threads, "seconds": round(time.time() - began, 1), "began_from": record["sha256"],
        "gate": gate(model, tokenizer, questions, at_one_place),
        "packages": {"torch": torch.__version__}, "log": log[::5] + log[-1:],
    }  # fmt: skip
    save(model, folder, {**record, "gate": gate(model, tokenizer, questions), "merged": second})


def at_one_place(model: BartForConditionalGeneration, batch: Batch) -> dict[str, Any]:
    """What `pretrain.answers` lets a model read: each sentence at one place."""
    given = inputs(model, batch, merge(batch)[1])
    encoded = cast(Any, model).get_encoder()(**given)
    return {"encoder_outputs": encoded, "attention_mask": given["attention_mask"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=HERE / "base")
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--questions", type=int, default=1000)
    torch.set_flush_denormal(True)  # for all of a process: not in a function that another program may call
    go_on(**vars(parser.parse_args()))
