"""LLaVA trained, end to end on a tiny folder: steps of one modality, rates, what moves and what does not, resume."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_spec
from tiny_llava import COLOURS, save_image, save_llava, save_mix
from torch import Tensor
from transformers import TrainerCallback

from dora_lab import inject, load_adapter, save_adapter
from dora_lab.forms.llava import Llava
from dora_lab.models.llava import open_llava
from dora_lab.runs.directory import RunDir
from dora_lab.runs.record import run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Spec
from dora_lab.tasks.conversations import read_conversations
from dora_lab.tasks.sources import Items
from dora_lab.training.batches import MicroBatches
from dora_lab.training.fit import Interrupted, train
from dora_lab.training.trained_weights import trained_weights

pytestmark = pytest.mark.usefixtures("one_thread")

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def spec_of(**changes: Any) -> Spec:
    """Table 12's protocol, in small: DoRA on the language model, the projector at a tenth of the rate."""
    return make_spec(**{
        "data__name": "llava_v1_5_mix665k", "data__cutoff": 256, "data__truncation": "right", "method__dropout": 0.0,
        "method__target_modules": LEAVES, "method__scope": "language_model",
        "method__also_train": ("multi_modal_projector",), "optim__groups": ("multi_modal_projector=0.1",),
        "optim__task_batch_sizes": ("image=4", "text=4"), "optim__batch_size": 4, "optim__micro_batch_size": 2,
        "optim__schedule": "cosine", "optim__learning_rate": 5e-2, "optim__epochs": 20.0, "probe": None,
    } | changes)  # fmt: skip


class Seen(TrainerCallback):
    """The rates of the groups at every step; sets an event after one, as a signal would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rates: list[set[float]] = []
        self.stop, self.stop_at = threading.Event(), stop_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self.rates.append({group["lr"] for group in about["optimizer"].param_groups if group["params"]})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop_at:
            self.stop.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("llava")
    save_llava(where / "model")
    save_mix(where / "data")
    return where


def items(folder: Path) -> Items:
    return Items(train=read_conversations(folder / "data" / "llava_v1_5_mix665k.json", folder / "data"))


def go(spec: Spec, folder: Path, root: Path, seen: Seen) -> tuple[Any, Any, dict[str, Any]]:
    model, processor = open_llava(folder / "model")
    inject(model, spec.method, spec.seed)
    with RunDir.open(root, spec) as run:
        found = train(spec, model, processor, items(folder), run, seen.stop, callbacks=[seen], checkpoint_steps=5)
    return model.eval(), processor, found


def test_it_learns_and_what_it_learnt_is_saved(folder: Path, tmp_path: Path) -> None:
    spec, seen = spec_of(optim__epochs=40.0), Seen()
    model, processor, found = go(spec, folder, tmp_path, seen)
    assert found["steps"] == 120 and found["shortened"] == 0  # 8 items with an image, 4 without, 4 a step
    losses = [row["loss"] for row in read_stream(run_path(tmp_path, spec), "metrics")]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])  # its head is frozen, random and small: it cannot be sure
    assert sorted(max(seen.rates, key=max)) == pytest.approx([5e-3, 5e-2])  # the projector's, the adapter's
    # the tower and the base are as they were, the projector is not
    before = dict(open_llava(folder / "model")[0].named_parameters())
    trained = trained_weights(model)
    for name, weight in model.named_parameters():
        place = name.replace(".base.", ".")
        if "projector" in name:
            assert name in trained and not torch.equal(weight, before[place]), name
        elif name in before:
            assert name not in trained and torch.equal(weight, before[name]), name
    assert not any("vision_tower" in name for name in trained)
    # what it answers, of images that it has not seen
    form = Llava(processor)
    shown = [save_image(tmp_path / f"{colour}.png", colour, (33, 21)) for colour in [*COLOURS][:2]]
    questions = [{"text": "<image>\nWhat colour is it?", "image": image, "where": ""} for image in shown]
    answers = form.answers(model, questions, 2, 4)
    assert answers == ["red", "green"]
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(open_llava(folder / "model")[0], tmp_path / "adapter").eval()
    assert form.answers(again, questions, 2, 4) == answers  # type: ignore[arg-type]
    first = form.encode(items(folder).train, spec.data).examples
    assert form.nll(again, first, 4) == form.nll(model, first, 4)  # type: ignore[arg-type]


def test_every_step_is_of_one_modality_and_reads_its_images(folder: Path) -> None:
    spec = spec_of()
    assert spec.optim is not None
    form = Llava(open_llava(folder / "model")[1])
    examples = form.encode(items(folder).train, spec.data).examples
    batches = MicroBatches(examples, spec.optim, 0, form)
    for step in range(batches.steps):
        places = [2 * step, 2 * step + 1]
        (kind,) = {examples[index].task for place in places for index in batches.items_of(place)}
        for place in places:
            assert ("pixel_values" in batches[place]) == (kind == "image")
    other = MicroBatches([*examples[:-1], examples[0]], spec.optim, 0, form)
    assert batches.sha256() != other.sha256() == other.sha256()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(optim__epochs=3.0)
    whole = trained_weights(go(spec, folder, tmp_path / "whole", Seen())[0])
    with pytest.raises(Interrupted):
        go(spec, folder, tmp_path / "cut", Seen(stop_at=5))
    model, _, found = go(spec, folder, tmp_path / "cut", Seen())
    assert found["resumed_from"] == 5
    after: dict[str, Tensor] = trained_weights(model)
    assert whole.keys() == after.keys() and all(torch.equal(whole[name], after[name]) for name in whole)
