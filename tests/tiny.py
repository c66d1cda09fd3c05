"""A tiny random model with its tokenizer, and items in the LLM-Adapters layout, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = """Below is an instruction that describes a task . Write a response appropriately completes the request ###
Instruction : Response the correct answer true false Please question is red blue big small Answer format"""


# words, numbers, punctuation with the line ends after it: as Llama-3, Qwen2 and cl100k cut
JOINING = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_tokenizer(split: Any = None, words: str = WORDS) -> Any:
    """A byte-level tokenizer of `words`; `split` cuts texts into pieces, None: as GPT-2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([words] * 20, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def joining_tokenizer() -> Any:
    """One that has a token for ":" and the line end after it."""
    from tokenizers import Regex, pre_tokenizers

    return byte_tokenizer(pre_tokenizers.Split(Regex(JOINING), "isolated"), WORDS + "\n\n### Response:\n")


def save_model(folder: Path, seed: int = 0, positions: int = 512, hidden: int = 32, tokenizer: Any = None) -> Path:
    """A random Llama of a few thousand parameters with a byte-level tokenizer, saved as a hub model would be."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def boolq_items(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Items in the shape of BoolQ: odd ones are true."""
    answers = ["true" if (start + n) % 2 else "false" for n in range(count)]
    return [
        {
            "instruction": "Please answer the following question with true or false, question: is the "
            f"{'red' if answer == 'true' else 'blue'} one number {start + n} big{' or small' * (n % 3)}?\n\n"
            "Answer format: true/false",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for n, answer in enumerate(answers)
    ]


def arc_items(count: int) -> list[dict[str, Any]]:
    """Items in the shape of ARC-Easy, with three or four answers."""
    items = []
    for n in range(count):
        labels = [f"answer{k}" for k in range(1, 4 + n % 2)]
        offered = " ".join(f"{label.capitalize()}: thing {k}" for k, label in enumerate(labels))
        answer = labels[n % len(labels)]
        items.append(
            {
                "instruction": f"Please choose the correct answer to the question: Which is {n}?\n\n{offered}\n\n"
                f"Answer format: {'/'.join(labels)}",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return items


def save_data(folder: Path, train: int = 40, test: int = 12) -> Path:
    """A folder in the LLM-Adapters layout: boolq with train and test, ARC-Easy with test alone."""
    files = {
        "boolq/train.json": boolq_items(train),
        "boolq/test.json": boolq_items(test, start=1000),
        "ARC-Easy/test.json": arc_items(test),
    }
    for name, items in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(items), encoding="utf-8")
    return folder


def small_method(name: str, targets: tuple[str, ...], **changes: Any) -> Any:
    """A small setting of any method, from the fields that it says it reads."""
    from dora_lab.methods.catalog import entry_of
    from dora_lab.spec import Method

    small = {"rank": 4, "alpha": 8.0, "target_modules": targets}
    return Method(name=name, **({key: small[key] for key in small if key in entry_of(name).fields} | changes))  # type: ignore[arg-type]


def make_spec(**changes: Any) -> Any:
    """A 20-step DoRA run on those items; `changes` by dotted path, as for `derive`."""
    from dora_lab.spec import Data, Evaluation, Method, Model, Optim, Probe, Spec, derive

    spec = Spec(
        experiment="tiny",
        tier="mini",
        seed=0,
        model=Model(name="tiny"),
        data=Data(name="llm_adapters", tasks=("boolq", "ARC-Easy")),
        method=Method(name="dora", rank=4, alpha=8.0, dropout=0.1, target_modules=("q_proj", "v_proj")),
        optim=Optim(learning_rate=5e-3, warmup_steps=2, batch_size=8, micro_batch_size=4, epochs=4.0),
        probe=Probe(),
        evaluation=Evaluation(protocols=("generate", "loglikelihood"), max_new_tokens=12, batch_size=8),
    )
    return derive(spec, {name.replace("__", "."): value for name, value in changes.items()})
