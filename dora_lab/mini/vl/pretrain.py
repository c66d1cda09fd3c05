"""How the base of VL-BART's mini tier is made: `make mini-vl-base`; record: `base/record.json`.

As BART's, its pretraining is text alone, here and in its second part (`merged`); `align` then gives it the place where
pictures begin. What it knows of pictures beyond that it learns in fine-tuning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from dora_lab.mini.vl import corpus

HERE = Path(__file__).parent
PICKING_FIRST = 16_384  # documents that only ask for a word about one thing: the rest builds on that
BATCH, POOL = 32, 32  # documents of a step; steps whose documents are sorted by length together
GUIDED = 0.8  # share of the steps in which heads are shown where to look
SIZES: dict[str, Any] = {
    "d_model": 96,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 256,
    "init_std": 0.05,
    "dropout": 0.0,
}
MASK = AddedToken("<mask>", lstrip=True, rstrip=True, special=True)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", MASK]  # bart-base's words for them; ids 0 to 4


def make_tokenizer(n_documents: int = 5_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the world is one token, wherever it stands, and every digit is alone.

    A folder that has a tokenizer keeps it: `pretrain` makes one only where there is none.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d| ?[A-Za-z]+| ?[^A-Za-z\d\s]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    documents = [corpus.document(number, picking=False) for number in range(n_documents)]
    texts = [text for d in documents for text in ("".join(t for t, _ in d.told), d.answer)]
    prompts = [
        f"{task}: true false yes no {number}" for task in ("vqa", "gqa", "nlvr", "caption") for number in range(6)
    ]
    tokenizer.train_from_iterator([*texts, *prompts * 50], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token=MASK, model_max_length=SIZES["max_position_embeddings"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Batch(NamedTuple):
    """B documents, S tokens of the encoder, T of the decoder, two steps of evidence."""

    ids_BS: Tensor
    things_BS: Tensor  # bits of what a token is about
    prose_BS: Tensor
    labels_BT: Tensor  # -100 beyond the end
    evidence_B2: Tensor
    kinds: list[str]


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[corpus.Document]) -> Batch:
    """Documents as tensors; a token is about what its first letter is about."""
    texts = ["".join(text for text, _ in d.told) for d in documents]
    backend = tokenizer.backend_tokenizer
    told, said = backend.encode_batch(texts), backend.encode_batch_fast([d.answer for d in documents])
    S, T = max(len(e.ids) for e in told), max(len(e.ids) for e in said)
    ids, labels = np.full((len(told), S), 1), np.full((len(told), T), -100)
    things, prose = np.zeros((len(told), S), np.int64), np.zeros((len(told), S), bool)
    evidence = np.zeros((len(told), 2), np.int64)
    for row, (d, e, answer) in enumerate(zip(documents, told, said, strict=True)):
        lengths = [len(text) for text, _ in d.told]
        about = np.repeat([bits for _, bits in d.told], lengths)
        at = np.asarray([end - 1 for _, end in e.offsets[1:-1]])  # last letters: a first one may be a shared blank
        ids[row, : len(e.ids)] = e.ids
        things[row, 1 : len(at) + 1] = about[at]
        prose[row, 1 : len(at) + 1] = at >= sum(lengths[: d.questions])
        labels[row, : len(answer.ids)] = answer.ids
        evidence[row, : len(d.evidence)] = d.evidence
    arrays = (torch.from_numpy(array) for array in (ids, things, prose, labels, evidence))
    return Batch(*arrays, kinds=[d.kind for d in documents])


def batches(tokenizer: PreTrainedTokenizerFast, first: int) -> Iterator[Batch]:
    """Batches from document `first` on, which is a multiple of a pool; of one length each, as far as that goes."""
    size = BATCH * POOL
    while True:
        pool = [corpus.document(number, number < PICKING_FIRST) for number in range(first, first + size)]
        pool.sort(key=lambda d: sum(len(text) for text, _ in d.told))
        order = list(range(0, size, BATCH))
        Random(f"pool/{first}").shuffle(order)
        yield from (encode(tokenizer, pool[at : at + BATCH]) for at in order)
        first += size


def guidance(output: Any, batch: Batch) -> Tensor:
    """A loss that shows heads where to look: with the answers' loss alone, picking by name stays at chance.

    In the encoder's first two layers one head looks from a word of the prose at the words about the same thing, in its
    middle two from a name in the question at what is told of it; in the decoder's last three one head for each step of
    the evidence looks at that. Guided attention as in Deshpande and Narasimhan, 2020 (arXiv 2010.02399); all the words
    of a sentence count alike, because a head that is free to choose looks at the name, which is known, alone.
    """
    shared_BSS = (batch.things_BS[:, :, None] & batch.things_BS[:, None]).ne(0) & batch.prose_BS[:, None]
    loss = torch.zeros(())
    for layer, attention_BHSS in enumerate(output.encoder_attentions[:4]):
        from_BS = batch.prose_BS if layer < 2 else ~batch.prose_BS
        loss = loss + apart(attention_BHSS[:, 0], shared_BSS & from_BS[:, :, None])
    said_BT = batch.labels_BT.ne(-100)
    said_BT[:, 0] = False  # <s>
    for head in (0, 1):
        looked_BS = (batch.things_BS & batch.evidence_B2[:, head, None]).ne(0) & batch.prose_BS
        for attention_BHTS in output.cross_attentions[3:]:
            loss = loss + apart(attention_BHTS[:, head], said_BT[:, :, None] & looked_BS[:, None])
    return loss


def apart(attention_BQK: Tensor, wanted_BQK: Tensor) -> Tensor:
    """How far attention is from even over the wanted keys (Kullback and Leibler), mean of the queries that have any."""
    n_BQ = wanted_BQK.sum(2)
    logs_BQ = (attention_BQK.float().clamp_min(1e-6).log() * wanted_BQK).sum(2)
    due_BQ = n_BQ > 0
    apart = -logs_BQ[due_BQ] / n_BQ[due_BQ] - n_BQ[due_BQ].float().log()
    return apart.sum() / max(1, len(apart))


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over 200 steps, level, over the last 40 % down to 2 %."""
    left = (steps - step) / (0.4 * steps)
    return min(1.0, (step + 1) / 200, 0.02 + 0.98 * left)


def make_model(words: int) -> BartForConditionalGeneration:
    """A BART of the base's sizes with so many words; random."""
    config = BartConfig(**SIZES, vocab_size=words, forced_eos_token_id=None)
    config._attn_implementation = "eager"  # the guided heads' probabilities are needed
    return BartForConditionalGeneration(config)


def optimizers(model: BartForConditionalGeneration, learning_rate: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the hidden matrices, AdamW for all else."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "shared" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n or "shared" in n]
    return (
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    )


def pretrain(
    steps: int, out: Path, learning_rate: float = 0.003, threads: int = 1, seed: int = 0, questions: int = 1000
) -> None:
    """Pretrain from scratch for `steps` batches and write the folder `out` with its record.

    Checkpoints every 250 steps; a later call with the same `out` goes on. The seed draws the initial weights. The gate
    is in the record: shares of right answers to `questions` unread questions of each kind.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tokenizer.json").exists():
        make_tokenizer().save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = make_model(len(tokenizer)).train()
    both = optimizers(model, learning_rate)
    step, log, saved, spent = 0, list[dict[str, Any]](), out / "checkpoint.pt", 0.0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        for optimizer, held in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        step, log, spent = state["step"], state["log"], state["seconds"]
    began = time.time() - spent
    right: defaultdict[str, list[bool]] = defaultdict(list)
    stream = batches(tokenizer, step // POOL * POOL * BATCH)
    for _ in range(step % POOL):
        next(stream)
    while step < steps:
        batch, guided = next(stream), step < GUIDED * steps
        loss = update(model, both, learning_rate * rate(step, steps), partial(learn, model, batch, guided))
        step += 1
        for kind, hit in zip(batch.kinds, loss.right, strict=True):
            right[kind].append(hit)
        if step % 100 == 0:
            row = {"step": step, "loss": round(loss.value, 4), "seconds": round(time.time() - began, 1)}
            row |= {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}
            right.clear()
            log.append(row)
            print(json.dumps(row), flush=True)
        if step % 250 == 0:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in both], "step": step}
            torch.save(state | {"log": log, "seconds": time.time() - began}, saved)
    save(model, out, {
        "steps": steps, "batch": BATCH, "peak_learning_rate": learning_rate, "seed": seed, "threads": threads,
        "documents": steps * BATCH, "seconds": round(time.time() - began, 1), "questions": questions,
        "gate": gate(model, tokenizer, questions), "parameters": sum(p.numel() for p in model.parameters()),
        "machine": platform.processor() or platform.machine(), "packages": {"torch": torch.__version__},
        "log": log[::10] + log[-1:],
    })  # fmt: skip
    saved.unlink(missing_ok=True)


class Learned(NamedTuple):
    value: float
    right: list[bool]  # each document: is every token of the answer the likeliest, given those before it?


def own_words(model: BartForConditionalGeneration, output: Any, batch: Batch) -> Tensor:
    """Loss of each word of the prose, said from what the encoder's last layer has at its place.

    Without it the encoder keeps what the first questions ask for (colour, shape) and loses size and place, layer by
    layer, so that a decoder that looks at the right sentence still reads nothing there.
    """
    logits_NV = model.lm_head(output.encoder_last_hidden_state[batch.prose_BS])
    return torch.nn.functional.cross_entropy(logits_NV.float(), batch.ids_BS[batch.prose_BS])


def learn(model: BartForConditionalGeneration, batch: Batch, guided: bool) -> Learned:
    """Forward and backward of one batch: mean over documents of the mean over their tokens, and what it is shown."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            input_ids=batch.ids_BS, attention_mask=batch.ids_BS.ne(1), labels=batch.labels_BT, use_cache=False,
            output_attentions=guided,
        )  # fmt: skip
        words = own_words(model, output, batch)
    logits_BTV, said_BT = output.logits.float(), batch.labels_BT.ne(-100)
    losses_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), batch.labels_BT, reduction="none")
    loss = (losses_BT.sum(1) / said_BT.sum(1)).mean()
    (loss + 0.3 * words + (0.1 * guidance(output, batch) if guided else 0.0)).backward()
    right_B = (logits_BTV.argmax(2).eq(batch.labels_BT) | ~said_BT).all(1)
    return Learned(loss.item(), right_B.tolist())


def update(
    model: BartForConditionalGeneration,
    optimizers: tuple[torch.optim.Optimizer, ...],
    learning_rate: float,
    learnt: Callable[[], Learned],
) -> Learned:
    """A step at a rate by the gradients that `learnt` leaves."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    found = learnt()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


Read = Callable[[BartForConditionalGeneration, Batch], dict[str, Any]]  # what `generate` is given to read a batch


def as_prose(model: BartForConditionalGeneration, batch: Batch) -> dict[str, Any]:
    """Every word at a place of its own."""
    return {"input_ids": batch.ids_BS, "attention_mask": batch.ids_BS.ne(1)}


@torch.no_grad()
def gate(
    model: BartForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, count: int, read: Read = as_prose
) -> dict[str, float]:
    """Share of right answers to `count` unread questions of each kind about prose, generated greedily."""
    model.eval()
    kinds = [kind for kind in corpus.SHARES if kind not in corpus.OPEN]
    return {kind: sum(answers(model, tokenizer, kind, count, read)) / count for kind in kinds}


@torch.no_grad()
def answers(
    model: BartForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    count: int,
    read: Read = as_prose,
) -> list[bool]:
    """Is the generated answer to each question of a kind the right one?"""
    documents = [corpus.exam(kind, number) for number in range(count)]
    found: list[bool] = []
    for at in range(0, count, 100):
        some = documents[at : at + 100]
        given = read(model, encode(tokenizer, some))
        said = cast(Any, model).generate(**given, max_new_tokens=8, num_beams=1, do_sample=False)
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        found += [text.strip() == d.answer for text, d in zip(texts, some, strict=True)]
    return found


def save(model: BartForConditionalGeneration, out: Path, record: dict[str, Any]) -> None:
    """Write the base in bfloat16 with a record of how it was made."""
    cast(Any, model).to(torch.bfloat16).save_pretrained(out)
    seal(out, record)


def seal(out: Path, record: dict[str, Any]) -> None:
    """Write the record, with the hash of the weights as they are now."""
    record["sha256"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=1000)
    torch.set_flush_denormal(True)  # for all of a process: not in a function that another program may call
    pretrain(**vars(parser.parse_args()))
