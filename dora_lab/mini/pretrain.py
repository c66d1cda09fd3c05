"""How the embedded base is made: corpus, tokenizer, pretraining; `make mini-base` runs it, `base/record.json` records it."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_lab.mini import corpus

HERE = Path(__file__).parent
SEED = 0
CONTEXT = 256  # tokens
READING_FIRST = 30_000  # documents that mostly ask for what they say themselves: picking is learned before recalling
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2304,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": True,
}


def documents(start: int, count: int) -> Iterator[corpus.Segments]:
    """Documents `start` to `start + count`; each a function of the seed and its own number alone."""
    for i in range(start, start + count):
        yield corpus.document(Random(f"{SEED}/{i}"), reading=0.9 if i < READING_FIRST else 0.3)


def make_tokenizer(n_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,304 tokens in which every digit stands alone, as in LLaMA's."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?[A-Za-z]+| ?[^A-Za-z\d\s]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["".join(t for t, _ in d) for d in documents(READING_FIRST, n_documents)]
    tokenizer.train_from_iterator([*texts, *(t + "." for t in corpus.OFFICE for _ in range(300))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        padding_side="left", model_max_length=SIZES["max_position_embeddings"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def pack(tokenizer: PreTrainedTokenizerFast, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents as one stream of token ids (uint16) and loss weights (float32), each `<s> … </s>`."""
    segments: list[str] = []
    weights: list[float] = []
    ends: list[int] = []
    for document in documents(start, count):
        segments += [t for t, _ in document]
        weights += [w for _, w in document]
        ends.append(len(segments))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(segments, add_special_tokens=False)
    ids: list[int] = []
    weight: list[float] = []
    first = 0
    for end in ends:
        ids.append(1)
        weight.append(0.0)  # where the next document begins cannot be guessed
        for j in range(first, end):
            ids += encoded[j].ids
            weight += [weights[j]] * len(encoded[j].ids)
        ids.append(2)
        weight.append(1.0)
        first = end
    return np.asarray(ids, np.uint16), np.asarray(weight, np.float32)


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: a linear rise, then level, then over the last 40 % down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - 0.6 * steps) / (0.4 * steps)
    return 1.0 if done < 0 else 0.02 + 0.98 * (1 - done)


def pretrain(
    tokens: float, out: Path, batch: int = 8, learning_rate: float = 0.008, threads: int = 2, minutes: float = math.inf
) -> None:
    """Pretrain from scratch on `tokens` tokens (or for `minutes`), write the folder `out` with its record.

    Hidden matrices by Muon, the rest by AdamW. Checkpoints every 250 steps; a later call with the same `out` goes on.
    """
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    else:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(out)
    config = LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = LlamaForCausalLM(config).train()
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = int(tokens / (batch * CONTEXT))
    ids, weights, next_document, step = np.zeros(0, np.uint16), np.zeros(0, np.float32), 0, 0
    need = batch * CONTEXT
    saved = out / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        ids, weights, next_document, step = state["ids"], state["weights"], state["next_document"], state["step"]
    began, log, seen = time.time(), [], step * need
    hits: list[float] = []  # share of deciding tokens guessed, per step since the last log row
    while step < steps:
        if (time.time() - began) / 60 > minutes:
            break
        while len(ids) < need:
            more_ids, more_weights = pack(tokenizer, next_document, 2000)
            ids, weights = np.concatenate([ids, more_ids]), np.concatenate([weights, more_weights])
            next_document += 2000
        x = torch.from_numpy(ids[:need].astype(np.int64)).view(batch, CONTEXT)
        w = torch.from_numpy(weights[:need]).view(batch, CONTEXT)[:, 1:]
        ids, weights = ids[need:], weights[need:]
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        loss = (losses * w.flatten()).sum() / w.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += need
        deciding = w.flatten() == corpus.DECIDING
        hits.append((logits.flatten(0, 1).argmax(-1) == x[:, 1:].flatten())[deciding].float().mean().item())
        if step % 100 == 0:
            row = {"step": step, "tokens": seen, "loss": round(loss.item(), 4), "seconds": round(time.time() - began, 1),
                   "deciding_accuracy": round(float(np.mean(hits)), 4)}  # fmt: skip
            hits.clear()
            log.append(row)
            print(json.dumps(row), flush=True)
        if step % 250 == 0:
            torch.save({"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "ids": ids,
                        "weights": weights, "next_document": next_document, "step": step}, saved)  # fmt: skip
    save(model, out, {
        "tokens": seen, "steps": step, "batch": batch, "context": CONTEXT, "peak_learning_rate": learning_rate,
        "seed": SEED, "threads": threads, "documents": next_document, "seconds": round(time.time() - began, 1),
        "parameters": sum(p.numel() for p in model.parameters()), "machine": platform.processor() or platform.machine(),
        "packages": {"torch": torch.__version__}, "log": log[::10] + log[-1:],
    })  # fmt: skip
    saved.unlink(missing_ok=True)


def save(model: LlamaForCausalLM, out: Path, record: dict[str, Any]) -> None:
    """Write the base in bfloat16 with a record of how it was made."""
    model.to(torch.bfloat16).save_pretrained(out)
    weights = (out / "model.safetensors").read_bytes()
    record["sha256"] = hashlib.sha256(weights).hexdigest()
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=30e6)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.008)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf)
    pretrain(**vars(parser.parse_args()))
