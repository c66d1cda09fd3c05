"""What an update of tier small costs here, beside a plain loop and transformers' Trainer with PEFT at their defaults.

    python -m experiments.small_speed [--results DIR] [--threads N] [--rounds N]

SmolLM2-135M's shape with random weights, LoRA and DoRA of rank 32 on five kinds, updates of 16 items of 40 to 150
tokens of which the last four are the answer: the same items for all. Contenders live in one process and take their
updates in turn, in mixed order; the table (`analysis/tables/small_speed.py`) shows medians of ratios within a round.
Processor seconds are counted: what else runs on the machine counts less. Memory is the peak of an update above the
model, optimiser and data at rest, each contender in a process of its own.

    lab         this lab's update: items sorted by length, logits of answers alone; micro-batches of 4, or all 16
    plain       this lab's layers in a loop that anybody would write: all 16 padded to the longest, logits of all tokens
    trainer     transformers' Trainer and PEFT's layers, all 16 padded to the longest

and scores the four options of as many questions by the base, as protocol `cloze` does:

    shared      this lab's way: the prompt is read once (`evaluation.reuse`)
    lm-eval     lm-eval's own: every option with its prompt

It trains nothing to keep, so it has no specs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_lab.forms.decoder import Decoder, Example
from dora_lab.forms.form import IGNORED
from dora_lab.io.atomic import write_text
from dora_lab.launch.trial import products
from dora_lab.methods.inject import inject
from dora_lab.runs import provenance
from dora_lab.spec import Method, Optim
from dora_lab.training.batches import MicroBatches
from experiments.speed import in_a_process

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
RANK, UPDATE, MICRO = 32, 16, 4
LENGTHS, ANSWER = (40, 150), 4
ROUNDS = 5
CONTENDERS = (
    *(f"{who}/{method}" for method in ("lora", "dora") for who in ("lab-4", "lab-16", "plain", "trainer")),
    "lab-4/dora-dropout", "trainer/dora-dropout", "shared/options", "lm-eval/options",
)  # fmt: skip
OPTIONS, OPTION = 4, (1, 8)  # of a question, and tokens of one
DROPOUT = 0.05


def items(updates: int) -> list[Example]:
    """Random items of as many updates."""
    draw = random.Random(0)
    found = []
    for _ in range(updates * UPDATE):
        ids = tuple(draw.randrange(3, SHAPE["vocab_size"]) for _ in range(draw.randint(*LENGTHS)))
        labels = (IGNORED,) * (len(ids) - ANSWER) + ids[-ANSWER:]
        found.append(Example(task="", ids=ids, labels=labels))
    return found


def contender(name: str, shape: dict[str, Any] | None = None) -> Callable[[list[Example]], Any]:
    """What makes one update of the contender on 16 items, or scores the options of as many questions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**(shape or SHAPE)))
    who, _, method = name.partition("/")
    if method == "options":
        return _options(model, reuse=who == "shared")
    kind, _, dropped = method.partition("-")
    dropout = DROPOUT if dropped else 0.0
    if who == "trainer":
        return _trainer(model, kind, dropout)
    inject(model, Method(name=kind, rank=RANK, alpha=2.0 * RANK, dropout=dropout, target_modules=TARGETS), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-4, fused=True)
    form, micro = Decoder(pad=0), int(who.partition("-")[2] or UPDATE)
    optim = Optim(learning_rate=1e-4, warmup_steps=0, batch_size=UPDATE, micro_batch_size=micro, epochs=1.0)

    def update(some: list[Example]) -> None:
        if who == "plain":
            batch = form.collate(some, [0] * len(some))
            labels_BT = batch.pop("labels")
            logits_BTV = model(**batch, use_cache=False).logits
            shifted = logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
            F.cross_entropy(*shifted, ignore_index=IGNORED).backward()
        else:
            batches = MicroBatches(some, optim, 0, form)
            for place in range(len(batches)):
                (form.loss(model, batches[place]) / (UPDATE * ANSWER)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def _trainer(model: Any, kind: str, dropout: float) -> Callable[[list[Example]], None]:
    """`Trainer.train` of one step."""
    import tempfile

    import peft
    from transformers import Trainer, TrainingArguments

    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=list(TARGETS), use_dora=kind == "dora"
    )
    adapted = peft.get_peft_model(model, config)

    def collate(some: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        most = max(len(one["input_ids"]) for one in some)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        return {
            name: torch.tensor([one[name] + [value] * (most - len(one[name])) for one in some])
            for name, value in fill.items()
        }

    def update(some: list[Example]) -> None:
        rows = [
            {"input_ids": [*one.ids], "attention_mask": [1] * len(one.ids), "labels": [*one.labels]} for one in some
        ]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=UPDATE, max_steps=1, learning_rate=1e-4, use_cpu=True,
                save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            )  # fmt: skip
            Trainer(adapted, arguments, collate, cast(Any, rows)).train()

    return update


def _options(model: Any, reuse: bool) -> Callable[[list[Example]], list[tuple[float, bool]]]:
    """Likelihoods of the options of questions, whose prompts are the items'."""
    from dora_lab import mini
    from dora_lab.evaluation.lm_eval_model import Model, quiet
    from dora_lab.models.open import open_tokenizer

    with quiet():
        wrapped = Model(model.eval(), open_tokenizer(mini.folder()), UPDATE, lambda: None, reuse=reuse)

    def asked(some: list[Example]) -> list[tuple[float, bool]]:
        draw = random.Random(len(some[0].ids))
        texts = [
            [*draw.choices(range(3, model.config.vocab_size), k=draw.randint(*OPTION))]
            for _ in range(OPTIONS * len(some))
        ]
        prompts = [list(item.ids[:-ANSWER]) for item in some for _ in range(OPTIONS)]
        with quiet():
            return wrapped._loglikelihood_tokens(
                [(("", str(n)), *pair) for n, pair in enumerate(zip(prompts, texts, strict=True))], disable_tqdm=True
            )

    return asked


def seconds(rounds: int, shape: dict[str, Any] | None = None) -> dict[str, list[float]]:
    """Processor seconds of an update of every contender, round by round: the same items for all in a round."""
    there = {name: contender(name, shape) for name in CONTENDERS}
    found: dict[str, list[float]] = {name: [] for name in there}
    pool, mixed = items(rounds + 1), random.Random(0)
    for turn in range(rounds + 1):  # the first one allocates
        some = pool[turn * UPDATE : (turn + 1) * UPDATE]
        for name in mixed.sample(list(there), len(there)):
            start = time.process_time()
            there[name](some)
            if turn:
                found[name].append(time.process_time() - start)
    return found


def peak(name: str) -> int:
    """Bytes that an update needs above what is there before it."""
    update, some = contender(name), items(1)
    update(some)
    provenance.reset_peak_memory()
    before = provenance.peak_memory_bytes()
    update(some)
    return provenance.peak_memory_bytes() - before


def main(argv: list[str] | None = None) -> None:
    """Measure all contenders and write results/bench/small_speed.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/local"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.one:
        print(peak(options.one))
        return
    rate = products("cpu", options.threads)["float32"]
    pool = items(options.rounds + 1)[UPDATE:]
    about = {
        "tokens": [sum(len(x.ids) for x in pool[at : at + UPDATE]) for at in range(0, len(pool), UPDATE)],
        "shape": SHAPE, "rank": RANK, "threads": options.threads, "product_flops": rate,
        "machine": provenance.machine(), "packages": provenance.packages() | {"peft": version("peft")},
        "code": provenance.code(),
    }  # fmt: skip
    taken = seconds(options.rounds)
    command = [sys.executable, "-m", "experiments.small_speed", "--threads", str(options.threads), "--one"]
    rows = [
        about | {"contender": name, "seconds": taken[name], "bytes": in_a_process([*command, name])} for name in taken
    ]
    file = options.results / "bench" / "small_speed.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    print(file)


if __name__ == "__main__":
    main()
