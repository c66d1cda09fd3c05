"""The protocol of the released code, field by field: prompts as tokens, cutoff, padding, split, optimiser, merge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spaces import llama_like
from tiny import boolq_items, make_spec, save_data, save_model
from transformers import TrainingArguments

from dora_lab.evaluation.evaluate import evaluate
from dora_lab.forms.decoder import Decoder, collate, encode
from dora_lab.forms.form import IGNORED
from dora_lab.launch.experiments import load_experiment
from dora_lab.methods.inject import adapted, inject, merge
from dora_lab.models.base import model_and_tokenizer
from dora_lab.runs.directory import RunDir
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Method, Spec
from dora_lab.tasks import ItemError, prompt, sources, train_text
from dora_lab.training.batches import MicroBatches

pytestmark = pytest.mark.usefixtures("one_thread")
PAPER: Spec = load_experiment("commonsense").specs("paper")[0]
ITEM = {"instruction": "Please answer true", "input": "", "output": "the correct answer is true", "answer": "true"}
HEAD = [1, 103, 105, 107, 117, 121, 130, 106, 133, 18, 138, 106, 146, 121, 158, 167, 168, 173, 18]  # <s> ... request.
RUN_16, RUN_15, TWO, ONE, NEWLINE = 248, [247, 246, 245, 3], 245, 3, 4
INSTRUCTION, RESPONSE = [244, 184, 30], [244, 202, 30]  # "###", "▁Instruction" or "▁Response", ":"
ASKED, ANSWER = [232, 218, 221], [168, 214, 218, 105, 221]  # "▁Please▁answer▁true", "▁the▁correct▁answer▁is▁true"


def prepared(pad: str = "zero", unk: bool = True) -> Any:
    from dora_lab.models.base import _prepare_tokenizer

    tokenizer = llama_like(unk)
    _prepare_tokenizer(tokenizer, pad, Path("here"))
    return tokenizer


def test_token_ids_of_the_published_training_text() -> None:
    ids = [*HEAD, TWO, NEWLINE, NEWLINE, RUN_16, *INSTRUCTION, NEWLINE, *RUN_15, *ASKED, NEWLINE, RUN_16, NEWLINE,
           RUN_16, *RESPONSE, NEWLINE, *RUN_15, *ANSWER, 2]  # fmt: skip
    (example,) = encode({"boolq": [ITEM]}, PAPER.data, prepared()).examples
    assert list(example.ids) == ids
    assert list(example.labels) == [IGNORED, *ids[1:]]  # loss on the prompt too; nothing predicts the first token
    answer = replace(PAPER.data, train_on_prompt=False)
    (example,) = encode({"boolq": [ITEM]}, answer, prepared()).examples
    assert [label for label in example.labels if label != IGNORED] == [*ANSWER, 2]


def test_token_ids_of_the_published_evaluation_prompt() -> None:
    """It ends in one run of 16 spaces; in training the last of them belonged to the answer's first word."""
    ids = [*HEAD, ONE, NEWLINE, NEWLINE, RUN_16, *INSTRUCTION, NEWLINE, *RUN_15, *ASKED, NEWLINE, NEWLINE, RUN_16,
           *RESPONSE, NEWLINE, RUN_16]  # fmt: skip
    tokenizer = prepared()
    assert tokenizer(prompt(ITEM, "published"))["input_ids"] == ids
    assert tokenizer(train_text(ITEM, "published"))["input_ids"][: len(ids)] != ids


def of_length(tokens: int) -> dict[str, str]:
    """An item whose published training text has that many tokens, the first one included."""
    bare = len(llama_like()(train_text(ITEM, "published"))["input_ids"])
    return ITEM | {"instruction": ITEM["instruction"] + " true" * (tokens - bare)}


@pytest.mark.parametrize(
    ("tokens", "kept", "ended"), [(254, 254, True), (255, 255, True), (256, 256, False), (300, 256, False)]
)
def test_published_cutoff_and_end(tokens: int, kept: int, ended: bool) -> None:
    """256 tokens, cut on the right; the end-of-sequence token only where there is room."""
    item = of_length(tokens)
    text = llama_like()(train_text(item, "published"))["input_ids"]
    assert len(text) == tokens
    coded = encode({"boolq": [item]}, PAPER.data, prepared())
    assert list(coded.examples[0].ids) == text[:kept] + [2] * ended
    assert (coded.shortened, coded.answers_cut) == (int(tokens > 256), int(tokens > 256))


def test_corrected_cutoff_keeps_the_answer_and_its_end() -> None:
    data = replace(PAPER.data, truncation="prompt", eos="always")
    for tokens in (255, 256, 300):
        coded = encode({"boolq": [of_length(tokens)]}, data, prepared())
        assert len(coded.examples[0].ids) == 256 and coded.examples[0].ids[-6:] == (*ANSWER, 2)
        assert (coded.shortened, coded.answers_cut) == (int(tokens > 255), 0)
    masked = replace(PAPER.data, train_on_prompt=False)
    with pytest.raises(ItemError, match=r"training item 0 of boolq: 300 tokens.*whole answer would be cut off"):
        encode({"boolq": [of_length(300)]}, masked, prepared())
    coded = encode({"boolq": [of_length(258)]}, masked, prepared())
    assert [label for label in coded.examples[0].labels if label != IGNORED] == ANSWER[:3]


def test_padding_is_on_the_left_with_token_zero_to_a_multiple_of_eight() -> None:
    examples = encode({"boolq": [of_length(n) for n in (60, 66, 71)]}, PAPER.data, prepared()).examples
    batch = collate(examples, 0, 8)
    assert batch["input_ids"].shape == (3, 72)
    assert batch["input_ids"][0, :11].tolist() == [0] * 11 and batch["input_ids"][0, 11] == 1
    assert batch["labels"][0, :12].eq(IGNORED).all() and batch["attention_mask"].sum(1).tolist() == [61, 67, 72]
    assert PAPER.optim is not None and PAPER.data.pad_to_multiple_of == 8
    batches = MicroBatches(examples * 16, PAPER.optim, 0, Decoder(0, PAPER.data.pad_to_multiple_of))
    assert all(batches[place]["input_ids"].shape[1] % 8 == 0 for place in range(len(batches)))


def test_token_zero_may_be_an_ordinary_one() -> None:
    """Llama 3 has "!" there: a text that holds it must not change, and it must not reach a saved answer."""
    own, zero = prepared("own", unk=False), prepared("zero", unk=False)
    assert (own.pad_token, zero.pad_token, zero.pad_token_id) == ("</s>", "!", 0)
    for text in ("Hi! true!", "!", prompt(ITEM, "published")):
        assert own(text)["input_ids"] == zero(text)["input_ids"]
        assert zero.decode(zero(text)["input_ids"], skip_special_tokens=True) == text


def test_held_out_items_are_those_of_the_released_split(tmp_path: Path) -> None:
    """datasets' train_test_split(test_size=120, shuffle=True, seed=42) of the items in file order."""
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(boolq_items(400)))
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(boolq_items(2)))
    spec = replace(PAPER, data=replace(PAPER.data, tasks=("boolq",)))
    items = sources.items(spec, tmp_path)
    names = [item["instruction"] for item in boolq_items(400)]
    held = [names.index(item["instruction"]) for item in items.validation["commonsense_170k"]]
    train = [names.index(item["instruction"]) for item in items.train["commonsense_170k"]]
    assert len(held) == 120 and len(train) == 280 and sorted(held + train) == list(range(400))
    order = np.random.default_rng(42).permutation(400).tolist()  # what that function draws, said without it
    assert (held, train) == (order[:120], order[120:])
    assert held[:6] == [302, 50, 72, 270, 232, 44]
    assert sources.items(replace(spec, seed=1), tmp_path) == items
    few = sources.items(replace(spec, data=replace(spec.data, train_items=30)), tmp_path)
    assert few.train["commonsense_170k"] == items.train["commonsense_170k"][:30]


def test_every_field_of_the_paper_tier() -> None:
    for spec in load_experiment("commonsense").specs("paper"):
        assert spec.optim is not None and spec.method.rank is not None
        assert (spec.model.dtype, spec.model.pad) == ("float16", "zero")
        data = spec.data
        assert (data.name, data.eval_name, data.validation_items) == ("commonsense_170k", "llm_adapters", 120)
        assert (data.template, data.train_on_prompt, data.cutoff) == ("published", True, 256)
        assert (data.truncation, data.eos, data.holdout, data.pad_to_multiple_of) == ("right", "if_shorter", "mixed", 8)
        assert (data.train_items, data.test_items) == (None, None)
        method = spec.method
        assert method.target_modules == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
        assert (method.alpha, method.dropout, method.dropout_form) == (2.0 * spec.method.rank, 0.05, "published")
        assert method.detach_norm and not method.rslora
        optim = spec.optim
        assert (optim.batch_size, optim.micro_batch_size, optim.epochs, optim.warmup_steps) == (16, 16, 3.0, 100)
        assert (optim.schedule, optim.weight_decay, optim.max_grad_norm) == ("linear", 0.0, 1.0)
        assert (optim.keep, optim.eval_steps) == ("best_loss", 80)
        evaluation = spec.evaluation
        assert (evaluation.protocols, evaluation.split, evaluation.weights) == (("generate",), "test", "merged")
        assert (evaluation.num_beams, evaluation.max_new_tokens) == (4, 32)


def test_trainer_arguments_of_the_paper_tier(tmp_path: Path) -> None:
    from dora_lab.training.trainer import training_arguments

    model, _ = model_and_tokenizer(make_spec(), save_model(tmp_path / "model"))
    arguments = training_arguments(PAPER, 31_932, tmp_path, model, None)
    assert arguments.fp16 and not arguments.bf16
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.weight_decay) == (3e-4, 100, 0.0)
    assert (arguments.lr_scheduler_type, arguments.max_grad_norm, arguments.max_steps) == ("linear", 1.0, 31_932)
    assert (arguments.gradient_accumulation_steps, arguments.eval_steps) == (1, 80)


def test_one_process_uses_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four in view the Trainer would take four micro-batches at a time, and drop three."""
    from dora_lab.training.trainer import training_arguments

    model, _ = model_and_tokenizer(make_spec(), save_model(tmp_path / "model"))
    prepare = TrainingArguments.__post_init__

    def with_four(self: TrainingArguments) -> None:
        prepare(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_four)
    arguments = training_arguments(PAPER, 31_932, tmp_path, model, None)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 1)


def test_magnitudes_start_from_the_norms_of_the_float16_weights(tmp_path: Path) -> None:
    spec = replace(
        make_spec(model__dtype="float16"), method=Method(name="dora", rank=4, alpha=8.0, target_modules=("q_proj",))
    )
    model, _ = model_and_tokenizer(spec, save_model(tmp_path / "model"))
    inject(model, spec.method, 0)
    for _, layer in adapted(model):
        assert layer.weight is not None and layer.weight.dtype == torch.float16
        assert all(part.dtype == torch.float32 for part in (layer.magnitude, layer.lora_A, layer.lora_B))
        torch.testing.assert_close(layer.magnitude, layer.weight.float().norm(dim=1), rtol=1e-6, atol=0)
        released = torch.linalg.norm(layer.weight, dim=1)  # in float16, as released
        torch.testing.assert_close(layer.magnitude, released.float(), rtol=2**-10, atol=0)


def trained(folder: Path, dtype: str) -> tuple[Any, Any]:
    """A DoRA model that has moved from its base."""
    spec = make_spec(model__dtype=dtype, method__target_modules="q_proj,k_proj,v_proj,up_proj,down_proj")
    model, tokenizer = model_and_tokenizer(spec, save_model(folder / "model", positions=1024))
    inject(model, spec.method, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in adapted(model):
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))
            layer.magnitude.mul_(1 + 0.1 * torch.rand(layer.magnitude.shape, generator=generator))
    return model.eval(), tokenizer


def texts(model: Any, tokenizer: Any, root: Path, **changes: Any) -> tuple[list[str], list[dict[str, Any]]]:
    spec = make_spec(
        data__template="published", evaluation__num_beams=4, evaluation__max_new_tokens=32,
        evaluation__protocols="generate", **changes,
    )  # fmt: skip
    with RunDir.open(root, spec) as run:
        evaluate(spec, model, tokenizer, {"boolq": boolq_items(9)}, run)
        lines = (run.samples / "boolq.generate.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return [json.loads(line)["output"] for line in lines], read_stream(run.path, "eval")


def test_batches_of_1_4_and_8_give_the_same_texts(tmp_path: Path) -> None:
    model, tokenizer = trained(tmp_path, "float32")
    alone = texts(model, tokenizer, tmp_path, evaluation__batch_size=1)
    assert len(set(alone[0])) > 1
    for size in (4, 8):
        assert texts(model, tokenizer, tmp_path, evaluation__batch_size=size) == alone
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(50)  # an ordinary token: it is masked, and not in an answer
    assert texts(model, tokenizer, tmp_path / "other", evaluation__batch_size=4) == alone


# largest difference of a logit between merged and unmerged, as a part of the largest logit: the merge rounds the weight
# once more in narrow types
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merged_and_unmerged_agree(dtype: str, tmp_path: Path) -> None:
    model, tokenizer = trained(tmp_path, dtype)
    ids = tokenizer([prompt(item, "published") for item in boolq_items(4)], return_tensors="pt", padding=True)
    with torch.no_grad():
        unmerged = model(**ids).logits.float()
        spoken = texts(model, tokenizer, tmp_path) if dtype == "float32" else None
        merge(model, keep=False)
        merged = model(**ids).logits.float()
    real = ids["attention_mask"].bool()
    assert (unmerged - merged)[real].abs().max() < TOLERANCE[dtype] * unmerged[real].abs().max()
    if spoken:
        assert texts(model, tokenizer, tmp_path / "merged") == spoken


def test_the_run_merges_as_its_spec_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dora_lab.launch import stages
    from dora_lab.launch.run import run_spec
    from dora_lab.launch.runtime import Paths

    calls: list[str] = []
    real = stages.merge
    monkeypatch.setattr(stages, "merge", lambda model, **how: (calls.append("merged"), real(model, **how)))
    save_model(tmp_path / "model")
    save_data(tmp_path / "data", test=2)
    for dtype, weights, wanted in (("float32", "unmerged", 0), ("bfloat16", "merged", 1), ("bfloat16", "exact", 0)):
        calls.clear()
        spec = make_spec(
            model__dtype=dtype,
            evaluation__weights=weights,
            optim__epochs=0.2,
            optim__warmup_steps=0,
            evaluation__protocols="generate",
            probe="none",
        )
        run_spec(spec, Paths(tmp_path, tmp_path / "data", tmp_path / "model"))
        assert len(calls) == wanted, (dtype, weights)
