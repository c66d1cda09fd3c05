"""Held-out text of a base's pretraining: which documents, and their NLL against a plain loop in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_spec, save_data, save_model
from transformers import AutoModelForCausalLM

from dora_lab import mini
from dora_lab.evaluation import text
from dora_lab.io.errors import LoadError
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.mini.pretrain import documents
from dora_lab.models.open import open_tokenizer
from dora_lab.runs.record import read_record, run_path
from dora_lab.spec import Data, Evaluation, Spec
from experiments import commonsense

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_nll_is_that_of_a_plain_loop_and_the_documents_are_new() -> None:
    tokenizer = open_tokenizer(mini.folder())
    ids = text.held_out(mini.folder(), tokenizer)
    assert ids.shape == (text.WINDOWS, text.CONTEXT)
    told = "".join(part[0] for part in next(documents(text.FIRST, 1)))
    assert tokenizer.decode(ids.flatten()).startswith(f"<s>{told}</s><s>")
    model = AutoModelForCausalLM.from_pretrained(mini.folder(), dtype="float32").train()
    found = text.nll(model, ids)
    assert model.training
    exact, losses = model.double().eval(), []
    for window in ids:
        with torch.no_grad():
            logits = exact(input_ids=window[None]).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, window[t]].item() for t in range(1, len(window))]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert text.about(ids)["tokens"] == len(losses)


def _spec(method: str) -> Spec:
    spec: Any = commonsense.trained(method, 4, 1e-2, 0)
    data = Data(name="mini", tasks=("boolq",), train_items=32, test_items=4)
    optim = replace(spec.optim, warmup_steps=0, batch_size=8)
    return replace(spec, data=data, optim=optim, probe=None, evaluation=Evaluation(text="pretraining"))


def test_a_run_keeps_it_before_and_after(tmp_path: Path) -> None:
    spec = _spec("lora")
    run_spec(spec, Paths(tmp_path))
    told = read_record(run_path(tmp_path, spec))["text_nll"]
    ids = text.held_out(mini.folder(), open_tokenizer(mini.folder()))
    base = AutoModelForCausalLM.from_pretrained(mini.folder(), dtype="float32")
    assert told["before"] == pytest.approx(text.nll(base, ids), rel=1e-6)
    assert told["after"] != told["before"] and told["after"] == pytest.approx(told["before"], rel=0.2)
    assert {name: told[name] for name in ("tokens", "sha256")} == text.about(ids)


def test_a_base_of_unknown_text_is_refused_before_training(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model"), save_data(tmp_path / "data")
    spec = make_spec(evaluation__text="pretraining")
    with pytest.raises(LoadError, match=r"no record\.json that says what it was\s+pretrained on"):
        run_spec(spec, Paths(tmp_path / "results", data, model))
