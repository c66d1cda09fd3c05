"""How the base of visual_instruction's mini tier is made: `make mini-llava-base`; record: `base/record.json`.

As LLaVA-1.5's: an encoder of pictures and a language model that know nothing of each other, and a projector that is
trained to describe pictures with both of them frozen (stage 1). Stage 2 is the experiment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dora_lab.mini.llava import pretrain_chat, pretrain_vision, talk
from dora_lab.mini.llava.draw import pixels
from dora_lab.mini.llava.pretrain_chat import ASSISTANT, SYSTEM, USER
from dora_lab.mini.llava.views import View, sentences, view

HERE = Path(__file__).parent
IMAGE, TOKENS = "<image>", pretrain_vision.PATCHES**2
BATCH = 16  # pictures of a step of stage 1


def join(encoder: Any, words: Any, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA of an encoder and a language model, its projector random."""
    sizes: dict[str, Any] = {"vision_config": encoder.config, "text_config": words.config, "image_seq_length": TOKENS}
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    # the last layer, which the encoder was taught at; LLaVA reads the one before it
    sizes |= {"image_token_id": image, "vision_feature_layer": -1, "tie_word_embeddings": True}
    config = LlavaConfig(**sizes)
    model = LlavaForConditionalGeneration(config)
    held = cast(Any, model).model
    held.vision_tower.load_state_dict(encoder.state_dict())
    held.language_model.load_state_dict(words.model.state_dict())
    model.tie_weights()
    return model


def described(number: int) -> tuple[View, str]:
    """A view of stage 1 and what is said of it."""
    seen = view("described", number)
    return seen, talk.describe(sentences(seen, Random(f"described/{number}"))).answer


def shown(tokenizer: PreTrainedTokenizerFast, numbers: list[int]) -> dict[str, Tensor]:
    """Pictures with their descriptions to be learnt, (B, T); padded on the right."""
    asked = f"<s>{SYSTEM}{USER}{IMAGE * TOKENS}\n{talk.DESCRIBE}{ASSISTANT}"
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    pictures = []
    for number in numbers:
        seen, text = described(number)
        prompt, answer = (
            tokenizer(part, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            for part in (asked, f" {text}</s>")
        )
        ids.append(torch.cat([prompt, answer]))
        labels.append(torch.cat([torch.full_like(prompt, -100), answer]))
        pictures.append(pixels(seen.pieces, f"described/{number}"))
    pad = nn.utils.rnn.pad_sequence
    ids_BT = pad(ids, True, cast(int, tokenizer.pad_token_id))
    return {
        "input_ids": ids_BT, "attention_mask": ids_BT.ne(cast(int, tokenizer.pad_token_id)).long(),
        "labels": pad(labels, True, -100), "pixel_values": pretrain_vision.as_input(pictures),
    }  # fmt: skip


def project(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, learning_rate: float
) -> dict[str, Any]:
    """Train the projector alone, in place; returns the record."""
    model.requires_grad_(False)
    projector = cast(Any, model).model.multi_modal_projector
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, weight_decay=0.0)
    began, log = time.time(), list[dict[str, Any]]()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20, 0.02 + 0.98 * (steps - step) / (0.6 * steps))
        inputs = shown(tokenizer, list(range(step * BATCH, (step + 1) * BATCH)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = cast(Any, model)(**inputs, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0:
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "seconds": round(time.time() - began, 1)})
            print(json.dumps(log[-1]), flush=True)
    told = {"steps": steps, "batch": BATCH, "peak_learning_rate": learning_rate}
    return told | {"seconds": round(time.time() - began, 1), "log": log[::4] + log[-1:]}


def pretrain(
    out: Path, vision_steps: int = 600, chat_steps: int = 1400, projector_steps: int = 200, questions: int = 100,
    seed: int = 0, threads: int = 1,
) -> None:  # fmt: skip
    """Make all parts and write the folder `out` with its record; a later call with the same `out` goes on
    from the encoder, and from every hundredth step of the language model."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "vision.pt"
    if not saved.exists():
        encoder, readers, vision = pretrain_vision.pretrain(vision_steps, seed=seed)
        vision["gate"] = pretrain_vision.gate(encoder, readers)
        print(json.dumps(vision["gate"]), flush=True)
        torch.save({"model": encoder.state_dict(), "record": vision}, saved)
    held = torch.load(saved)
    encoder, vision = CLIPVisionModel(CLIPVisionConfig(**pretrain_vision.CONFIG)), held["record"]
    encoder.load_state_dict(held["model"])
    words, tokenizer, chat = pretrain_chat.pretrain(chat_steps, seed=seed, out=out)
    chat["gate"] = pretrain_chat.gate(words, tokenizer, questions)
    torch.manual_seed(seed)
    words.set_attn_implementation("sdpa")
    model = join(encoder, words, tokenizer)
    projector = project(model, tokenizer, projector_steps, 0.003)
    save(model, tokenizer, out, {
        "seed": seed, "threads": threads, "parameters": sum(p.numel() for p in model.parameters()),
        "machine": platform.processor() or platform.machine(), "packages": {"torch": torch.__version__},
        "vision": vision, "chat": chat, "projector": projector,
    })  # fmt: skip
    for part in ("vision.pt", "chat.pt"):
        (out / part).unlink(missing_ok=True)


def save(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict[str, Any]
) -> None:
    """Write the base in float16 with a record of how it was made."""
    cast(Any, model).to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    record["sha256"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--vision-steps", type=int, default=600)
    parser.add_argument("--chat-steps", type=int, default=1400)
    parser.add_argument("--projector-steps", type=int, default=200)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_flush_denormal(True)  # for all of a process: not in a function that another program may call
    pretrain(**vars(parser.parse_args()))
