"""A tiny training with the lab's trainer, in one go and stopped and resumed: weights have to be equal, bit by bit."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from dora_lab import Method, inject
from dora_lab.runs.directory import RunDir
from dora_lab.spec import Data, Evaluation, Model, Optim, Spec
from dora_lab.tasks.sources import Items
from dora_lab.training.fit import Interrupted, train
from dora_lab.training.trained_weights import trained_weights
from experiments.gpu.visit import Visit

STOP = 7  # of 12 steps; the checkpoints are every four
ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ("q_proj", "v_proj")}


class StopAt(TrainerCallback):
    """Asks for an end after a step, as a signal would."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer."""
        if state.global_step + 1 == STOP:
            self.stop.set()


def compare(visit: Visit, name: str) -> dict[str, Any]:
    """Whether the resumed run's trained weights are those of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = _train(visit, name, Path(folder) / "whole")
        _, stopped = _train(visit, name, Path(folder) / "parts", threading.Event())
        parts, resumed = _train(visit, name, Path(folder) / "parts")
    different = [key for key in whole if not torch.equal(whole[key], parts[key])]
    worst = max((whole[key] - parts[key]).abs().max().item() for key in whole)
    ok = not different and stopped is None and resumed is not None
    return {"resumed_from": resumed, "different": len(different), "of": len(whole), "worst": worst, "ok": ok}


def _train(
    visit: Visit, name: str, root: Path, stop: threading.Event | None = None
) -> tuple[dict[str, Tensor], int | None]:
    """(trained weights, the step it was resumed from); no weights where it was stopped."""
    spec = _spec(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(visit.device)
    inject(model, spec.method, spec.seed)
    items = Items(train={"boolq": [_item(number) for number in range(24)]})
    callbacks = [StopAt(stop)] if stop else []
    with RunDir.open(root, spec) as run:
        try:
            done = train(spec, model, _tokenizer(), items, run, stop=stop, callbacks=callbacks, checkpoint_steps=4)
        except Interrupted:
            return {}, None
        weights = {key: value.detach().cpu().clone() for key, value in trained_weights(model).items()}
        return weights, done["resumed_from"]


def _spec(name: str) -> Spec:
    spec = Spec(
        experiment="gpu_visit",
        tier="mini",
        seed=0,
        model=Model(name="tiny"),
        data=Data(name="llm_adapters", tasks=("boolq",)),
        method=Method(name="dora", **ADAPTER),  # type: ignore[arg-type]
        optim=Optim(learning_rate=5e-3, warmup_steps=2, batch_size=8, micro_batch_size=4, epochs=4.0),
        evaluation=Evaluation(protocols=("loglikelihood",), max_new_tokens=12, batch_size=8),
        probe=None,
    )
    return spec if name == "dora" else replace(spec, method=Method(name=name))


def _item(number: int) -> dict[str, Any]:
    answer = "true" if number % 2 else "false"
    asked = f"Please answer with true or false, question: is the {'red' if number % 2 else 'blue'} one {number} big?"
    words = {"instruction": f"{asked}\n\nAnswer format: true/false", "input": "", "answer": answer}
    return words | {"output": f"the correct answer is {answer}"}


def _tokenizer() -> Any:
    """Byte by byte; nothing to load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
