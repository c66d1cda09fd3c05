"""Training: what carries loss, the order of data, resume, and runs that must not go on."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import boolq_items, make_spec, save_data, save_model
from torch import Tensor, nn
from transformers import TrainerCallback, get_scheduler

from dora_lab.forms.decoder import Decoder, collate, encode
from dora_lab.forms.form import IGNORED
from dora_lab.io.errors import LoadError
from dora_lab.methods.inject import inject
from dora_lab.models.base import model_and_tokenizer
from dora_lab.models.open import open_tokenizer
from dora_lab.probing.callback import DecompositionCallback
from dora_lab.runs.directory import RunDir
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError, sources
from dora_lab.tasks.limits import limits
from dora_lab.training.batches import MicroBatches, order
from dora_lab.training.checks import rate_reached
from dora_lab.training.fit import Interrupted, train
from dora_lab.training.trained_weights import trained_weights
from dora_lab.training.trainer import NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


def go(spec: Spec, root: Path, model_dir: Path, data_dir: Path, **options: Any) -> dict[str, Tensor]:
    """Train and return the trained weights; the stop event may be given as `stop`."""
    model, tokenizer = model_and_tokenizer(spec, model_dir)
    inject(model, spec.method, spec.seed)
    with RunDir.open(root, spec) as run:
        callbacks = [*options.pop("callbacks", ())]
        if spec.probe:
            files = load_file(model_dir)
            callbacks.append(
                DecompositionCallback(
                    lambda row: run.append("probe", row), spec.probe.fractions, initial=lambda name: files[name]
                )
            )
        train(spec, model, tokenizer, sources.items(spec, data_dir), run, callbacks=callbacks, **options)
        return trained_weights(model)


def load_file(model_dir: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file as read

    return read(model_dir / "model.safetensors")


def rows(root: Path, spec: Spec, stream: str) -> list[dict[str, Any]]:
    from dora_lab.runs.record import run_path

    found = read_stream(run_path(root, spec), stream)
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


class StopAt(TrainerCallback):
    """Sets the event after a step, as a signal would."""

    def __init__(self, step: int, stop: threading.Event) -> None:
        self.step, self.stop = step, stop

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            self.stop.set()


class Killed(BaseException):
    """Stands for a process that dies: nothing is saved."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def test_loss_is_on_the_answer_and_its_end(model_dir: Path) -> None:
    spec = make_spec()
    _, tokenizer = model_and_tokenizer(spec, model_dir)
    (example,) = encode({"boolq": boolq_items(1)}, spec.data, tokenizer).examples
    labelled = [token for token, label in zip(example.ids, example.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(labelled) == "the correct answer is false</s>"
    assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))
    (whole,) = encode({"boolq": boolq_items(1)}, make_spec(data__train_on_prompt="true").data, tokenizer).examples
    assert whole.labels[0] == IGNORED and list(whole.labels[1:]) == list(whole.ids[1:])


@pytest.mark.parametrize("template", ["clean", "published"])
def test_evaluation_prompt_begins_the_training_tokens(model_dir: Path, template: str) -> None:
    from dora_lab.tasks import train_prefix

    spec = make_spec(data__template=template)
    _, tokenizer = model_and_tokenizer(spec, model_dir)
    item = boolq_items(1)[0]
    (example,) = encode({"boolq": [item]}, spec.data, tokenizer).examples
    prompt = tokenizer(train_prefix(item, template).rstrip())["input_ids"]
    assert list(example.ids[: len(prompt)]) == prompt


def test_long_items_keep_their_answer_and_are_counted(model_dir: Path) -> None:
    spec = make_spec()
    _, tokenizer = model_and_tokenizer(spec, model_dir)
    (full,) = encode({"boolq": boolq_items(1)}, spec.data, tokenizer).examples
    cut = encode({"boolq": boolq_items(1)}, make_spec(data__cutoff=len(full.ids) - 5).data, tokenizer)
    assert cut.shortened == 1
    assert cut.examples[0].ids == full.ids[5:]
    with pytest.raises(ItemError, match=r"training item 0 of boolq: .* the answer would be cut; raise data.cutoff"):
        encode({"boolq": boolq_items(1)}, make_spec(data__cutoff=3).data, tokenizer)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_reached_is_that_of_the_schedule(schedule: str) -> None:
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    for warmup in range(8):
        optim = replace(make_spec().optim, warmup_steps=warmup, schedule=schedule)
        for steps in range(1, 12):
            made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=optim.learning_rate)
            schedules = get_scheduler(name, made, num_warmup_steps=warmup, num_training_steps=steps)
            rates = []
            for _ in range(steps):
                rates.append(schedules.get_last_lr()[0])
                made.step()
                schedules.step()
            assert rate_reached(optim, steps) == pytest.approx(max(rates))


def test_items_beyond_the_model_are_named(model_dir: Path) -> None:
    spec = make_spec(data__cutoff=600)
    model, tokenizer = model_and_tokenizer(spec, model_dir)
    items = boolq_items(3)
    items[2]["instruction"] = "red " * 580 + items[2]["instruction"]
    with pytest.raises(ItemError, match=r"training item 2 of boolq: 600 tokens exceed the model's 512 positions"):
        encode({"boolq": items}, spec.data, tokenizer, limits(model))
    tokenizer.add_tokens(["blue"])
    with pytest.raises(ItemError, match=rf"training item 0 of boolq: token {len(tokenizer) - 1} has no embedding"):
        encode({"boolq": boolq_items(3)}, spec.data, tokenizer, limits(model))


def test_a_padding_token_without_an_embedding_is_refused(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = open_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(LoadError, match=rf"pad token '\[PAD\]' has id {len(tokenizer) - 1}, the model has"):
        model_and_tokenizer(make_spec(), folder)
    model, found = model_and_tokenizer(make_spec(model__pad="zero"), folder)
    assert found.pad_token_id == model.config.pad_token_id == 0


def test_order_comes_from_seed_and_epoch_alone() -> None:
    torch.manual_seed(5)
    first = order(10, seed=1, length=25)
    torch.manual_seed(6)
    assert order(10, seed=1, length=25) == first
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))
    assert first[:10] != first[10:20]
    assert order(10, seed=2, length=25) != first
    assert order(10, seed=1, length=7) == first[:7]


def test_micro_batches_cover_each_step(model_dir: Path) -> None:
    spec = make_spec()
    _, tokenizer = model_and_tokenizer(spec, model_dir)
    examples = encode({"boolq": boolq_items(40)}, spec.data, tokenizer).examples
    assert spec.optim is not None
    batches = MicroBatches(examples, spec.optim, 0, Decoder(0))
    assert batches.steps == 20
    for step in range(batches.steps):
        both = batches.items_of(2 * step) + batches.items_of(2 * step + 1)
        assert sorted(both) == sorted(batches.indices[8 * step : 8 * step + 8])
        assert [len(examples[i].ids) for i in both] == sorted(len(examples[i].ids) for i in both)


def test_padding_does_not_reach_the_logits(model_dir: Path) -> None:
    spec = make_spec()
    model, tokenizer = model_and_tokenizer(spec, model_dir)
    examples = encode({"boolq": boolq_items(3)}, spec.data, tokenizer).examples
    together = {name: value for name, value in collate(examples, 0).items() if name != "labels"}
    with torch.no_grad():
        logits = model(**together).logits
        for place, example in enumerate(examples):
            alone = {name: value for name, value in collate([example], 0).items() if name != "labels"}
            torch.testing.assert_close(logits[place, -len(example.ids) :], model(**alone).logits[0])


def test_micro_batch_size_does_not_change_the_gradient(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    changes = {"method__dropout": 0.0}
    whole = go(make_spec(**changes, optim__micro_batch_size=8), tmp_path, model_dir, data_dir)
    parts = go(make_spec(**changes, optim__micro_batch_size=2), tmp_path, model_dir, data_dir)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dora", "ft"])
@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_resume_is_the_same_as_one_go(name: str, end: str, model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    spec = make_spec() if name == "dora" else full_fine_tuning()
    whole = go(spec, tmp_path / "whole", model_dir, data_dir, checkpoint_steps=4)
    stop = threading.Event()
    breaking: TrainerCallback = StopAt(11, stop) if end == "stopped" else KillAt(11)
    with pytest.raises(Interrupted if end == "stopped" else Killed):
        go(spec, tmp_path / "parts", model_dir, data_dir, checkpoint_steps=4, callbacks=[breaking], stop=stop)
    parts = go(spec, tmp_path / "parts", model_dir, data_dir, checkpoint_steps=4)
    assert all(torch.equal(whole[weight], parts[weight]) for weight in whole)
    for stream in ("metrics", "probe"):
        assert rows(tmp_path / "whole", spec, stream) == rows(tmp_path / "parts", spec, stream)
    assert [row["step"] for row in rows(tmp_path / "parts", spec, "metrics")] == list(range(1, 21))


def full_fine_tuning() -> Spec:
    from dataclasses import replace

    from dora_lab.spec import Method

    return replace(make_spec(), method=Method(name="ft"))


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest"])
def test_damaged_checkpoint_is_passed_over(damage: str, model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    from dora_lab.runs.record import run_path

    spec = make_spec()
    whole = go(spec, tmp_path / "whole", model_dir, data_dir, checkpoint_steps=4)
    with pytest.raises(Killed):
        go(spec, tmp_path / "parts", model_dir, data_dir, checkpoint_steps=4, callbacks=[KillAt(11)])
    newest = run_path(tmp_path / "parts", spec) / "checkpoints" / "checkpoint-8"
    if damage == "changed":
        file = newest / "optimizer.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        (newest / ("optimizer.pt" if damage == "missing" else "manifest.json")).unlink()
    parts = go(spec, tmp_path / "parts", model_dir, data_dir, checkpoint_steps=4)
    assert all(torch.equal(whole[weight], parts[weight]) for weight in whole)


class Poison(TrainerCallback):
    """Makes a trained weight NaN before a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        assert model is not None
        if state.global_step == 3:
            weight = next(weight for weight in model.parameters() if weight.requires_grad)
            weight.data.fill_(float("nan"))


def test_nan_loss_ends_in_failed(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    from dora_lab.runs.record import read_record, run_path

    spec = make_spec(probe="none")
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 4, training items \["):
        go(spec, tmp_path, model_dir, data_dir, callbacks=[Poison()])
    record = read_record(run_path(tmp_path, spec))
    assert record["status"] == "failed"
    assert record["error"].startswith("NonFiniteError: loss is nan at step 4")
    assert [row["step"] for row in rows(tmp_path, spec, "metrics")] == [1, 2, 3]


def test_best_validation_loss_is_kept(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    spec = make_spec(
        data__validation_items=8, optim__eval_steps=4, optim__keep="best_loss", optim__learning_rate=0.3, probe="none"
    )
    model, tokenizer = model_and_tokenizer(spec, model_dir)
    inject(model, spec.method, spec.seed)
    with RunDir.open(tmp_path, spec) as run:
        summary = train(spec, model, tokenizer, sources.items(spec, data_dir), run)
        losses = {row["step"]: row["eval_loss"] for row in read_stream(run.path, "metrics") if "eval_loss" in row}
    assert list(losses) == [4, 8, 12, 16]
    assert losses[summary["kept_step"]] == min(losses.values())
