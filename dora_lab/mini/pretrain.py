"""How the embedded base is made: corpus, tokenizer, pretraining; `make mini-base`; record: `base/record.json`."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dora_lab.mini import corpus

HERE = Path(__file__).parent
CONTEXT = 256  # tokens
PICKING_FIRST = 16_000  # documents that ask for nothing but the label of a text they name: the rest builds on that
LETTERS = 400  # steps at the end, half of whose documents are requests answered in sentences
GUIDED = 0.8  # share of the steps in which four heads are shown where to look
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2304,
    "max_position_embeddings": 1024,
    "initializer_range": 0.08,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": True,
}


def documents(start: int, count: int, seed: int = 0) -> Iterator[corpus.Segments]:
    """Documents `start` to `start + count`; each a function of the seed and its own number alone."""
    for i in range(start, start + count):
        yield corpus.document(Random(f"{seed}/{i}"), reading=0.2, only_picking=i < PICKING_FIRST)


def make_tokenizer(n_documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,304 tokens in which every digit stands alone, as in LLaMA's.

    From the documents of seed 0, whatever the base's own seed: bases of several seeds read the same tokens.
    """
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
    texts = ["".join(t for t, *_ in d) for d in documents(PICKING_FIRST, n_documents)]
    tokenizer.train_from_iterator([*texts, *(t + "." for t in corpus.OFFICE for _ in range(300))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        padding_side="left", model_max_length=SIZES["max_position_embeddings"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def letters(count: int, seed: int = 0) -> Iterator[corpus.Segments]:
    """The documents of the last steps: letters, and as many sheets as before so that nothing is forgotten."""
    for i in range(count):
        rng = Random(f"{seed}/letters/{i}")
        yield corpus.document(rng, reading=0.2) if i % 2 else [s for _ in range(4) for s in corpus.letter(rng)]


def pack(tokenizer: PreTrainedTokenizerFast, sheets: Iterable[corpus.Segments]) -> np.ndarray:
    """Documents, each `<s> … </s>`, as one stream of shape (3, tokens): token ids, loss weights, options.

    The options row is 0 except on a listed option and the digit that picks it, and on a judged value and its verdict:
    each pair shares one positive number.
    """
    segments: list[str] = []
    marks: list[tuple[float, int]] = []
    ends: list[int] = []
    lists = 0
    for document in sheets:
        for text, weight, *option in document:
            at = int(option[0]) if option else 0
            lists += at == 1 and weight != corpus.DECIDING  # a list begins with its first option
            segments.append(text)
            marks.append((weight, 8 * (lists % 1000) + at if at else 0))
        ends.append(len(segments))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(segments, add_special_tokens=False)
    out: list[tuple[float, float, float]] = []
    first = 0
    for end in ends:
        out.append((1, 0.0, 0))  # where the next document begins cannot be guessed: weight 0
        for j in range(first, end):
            out += [(i, *marks[j]) for i in encoded[j].ids]
        out.append((2, 1.0, 0))
        first = end
    return np.asarray(out, np.float32).T


def guidance(attentions: tuple[torch.Tensor, ...], x: torch.Tensor, options: torch.Tensor, deciding: torch.Tensor,
             digits: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """A loss that shows four heads where to look: with next-token loss alone, picking by label stays at chance.

    In the first layer one head looks at the previous token and one at the latest digit, so that a text knows its label;
    in the third and fourth layer one head each, where a digit or a verdict is due, looks at what it is about. Guided
    attention as in Deshpande and Narasimhan, 2020 (arXiv 2010.02399).

    Args:
        attentions: probabilities of each layer, (batch, heads, context, context).
        x, options, deciding: token ids, option numbers (see `pack`), whether it decides; (batch, context).
        digits: for each token of the vocabulary, is it a digit.
    """
    at = torch.arange(x.shape[1]).expand_as(x)
    latest = torch.where(digits[x], at, 0).cummax(1).values
    first = attentions[0].float()
    loss = -first[:, 0].gather(2, (at - 1).clamp(min=0)[..., None]).clamp_min(1e-6).log().mean()
    loss = loss - first[:, 1].gather(2, latest[..., None]).clamp_min(1e-6).log().mean()
    row, due = torch.nonzero(deciding & (options > 0), as_tuple=True)
    picked = (options[row] == options[row, due][:, None]) & (at[row] < due[:, None]) & ~deciding[row]
    known = picked.any(1) & (due > 0)
    for layer in attentions[2:]:
        looked = (layer.float()[row, 0, due - 1] * picked).sum(1)[known]
        loss = loss - looked.clamp_min(1e-6).log().sum() / max(1, len(looked))
    return loss


def weighted_loss(logits: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of the ids x, (batch, context); logits and weights are those of all positions but one."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def rate(step: int, steps: int, picking: int) -> float:
    """Share of the peak learning rate: 40 % while picking is learned, level, and over the last 40 % down to 2 %."""
    if step < picking:
        return 0.4 * min(1.0, (step + 1) / 100)
    done = (step - 0.6 * steps) / (0.4 * steps)
    return min(1.0, 0.4 + (step - picking) / 1000) if done < 0 else 0.02 + 0.98 * (1 - done)


def pretrain(
    tokens: float, out: Path, batch: int = 4, learning_rate: float = 0.005, threads: int = 1,
    minutes: float = math.inf, seed: int = 0,
) -> None:  # fmt: skip
    """Pretrain from scratch on `tokens` tokens (or for `minutes`), write the folder `out` with its record.

    Hidden matrices by Muon, the rest by AdamW. Checkpoints every 250 steps; a later call with the same `out` goes on.
    The seed draws the initial weights and the documents; the world that they tell of is the same.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    else:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(out)
    config = LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config._attn_implementation = "eager"  # the guided heads' probabilities are needed
    model = LlamaForCausalLM(config).train()
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = int(tokens / (batch * CONTEXT))
    stream, next_document, step, picking = np.zeros((3, 0), np.float32), 0, 0, 0
    digits = torch.tensor([t.isdigit() for t in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    need = batch * CONTEXT
    saved = out / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        stream, next_document, step, picking = (state[k] for k in ("stream", "next_document", "step", "picking"))
    began, log, seen = time.time(), [], step * need
    hits: list[list[float]] = []  # share of the deciding digits and words guessed, per step since the last log row
    while step < steps:
        if (time.time() - began) / 60 > minutes:
            break
        while stream.shape[1] < need:
            stream = np.concatenate([stream, pack(tokenizer, documents(next_document, 2000, seed))], 1)
            next_document += 2000
        x, weights, options = torch.from_numpy(stream[:, :need].copy()).view(3, batch, CONTEXT)
        x, options, deciding, w = x.long(), options.long(), weights == corpus.DECIDING, weights[:, 1:]
        stream = stream[:, need:]
        guided = step < GUIDED * steps
        if next_document <= PICKING_FIRST + 2000:
            picking = step + 1
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate(step, steps, picking)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=x, use_cache=False, output_attentions=guided)
        logits = output.logits[:, :-1].float()
        loss = weighted_loss(logits, x, w)
        (loss + 0.3 * guidance(output.attentions, x, options, deciding, digits) if guided else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += need
        right = logits.argmax(-1) == x[:, 1:]
        hits.append(
            [right[deciding[:, 1:] & kind].float().mean().item() for kind in (digits[x[:, 1:]], ~digits[x[:, 1:]])]
        )
        if step % 100 == 0:
            digit, word = np.nan_to_num(np.nanmean(hits, 0)).round(4).tolist()
            row = {"step": step, "tokens": seen, "loss": round(loss.item(), 4), "digits": digit, "words": word}
            row["seconds"] = round(time.time() - began, 1)
            hits.clear()
            log.append(row)
            print(json.dumps(row), flush=True)
        if step % 250 == 0:
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            state |= {"stream": stream, "next_document": next_document, "step": step, "picking": picking}
            torch.save(state, saved)
    answer_in_sentences(model, tokenizer, batch, seed)
    save(model, out, {
        "tokens": seen, "steps": step, "batch": batch, "context": CONTEXT, "peak_learning_rate": learning_rate,
        "seed": seed, "threads": threads, "documents": next_document, "seconds": round(time.time() - began, 1),
        "parameters": sum(p.numel() for p in model.parameters()), "machine": platform.processor() or platform.machine(),
        "packages": {"torch": torch.__version__}, "log": log[::10] + log[-1:],
    })  # fmt: skip
    saved.unlink(missing_ok=True)


def answer_in_sentences(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: int, seed: int = 0) -> None:
    """The last `LETTERS` steps: AdamW from 5e-4 down to zero, no guidance."""
    need = batch * CONTEXT
    stream = pack(tokenizer, letters(LETTERS * need // 150, seed))
    assert stream.shape[1] >= LETTERS * need, "too few letters"
    adam = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(LETTERS):
        adam.param_groups[0]["lr"] = 5e-4 * min((step + 1) / 50, 1 - step / LETTERS)
        x, w, _ = torch.from_numpy(stream[:, step * need : (step + 1) * need].copy()).view(3, batch, CONTEXT)
        x, w = x.long(), w[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x, use_cache=False).logits[:, :-1].float()
        loss = weighted_loss(logits, x, w)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            print(json.dumps({"letters": step + 1, "loss": round(loss.item(), 4)}), flush=True)


def save(model: LlamaForCausalLM, out: Path, record: dict[str, Any]) -> None:
    """Write the base in bfloat16 with a record of how it was made."""
    cast(Any, model).to(torch.bfloat16).save_pretrained(out)
    weights = (out / "model.safetensors").read_bytes()
    record["sha256"] = hashlib.sha256(weights).hexdigest()
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=24e6)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    pretrain(**vars(parser.parse_args()))
