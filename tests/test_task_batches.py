"""Steps of one task each (`optim.task_batch_sizes`): what is in them, their order, and that a run resumes exactly."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import KillAt, Killed, StopAt, go, rows
from tiny import arc_items, make_spec, save_data, save_model

from dora_lab.forms.decoder import Decoder, Example
from dora_lab.launch import plan
from dora_lab.spec import SpecError
from dora_lab.training.batches import MicroBatches, order, steps_by_task
from dora_lab.training.fit import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = {"boolq": 12, "ARC-Easy": 30}
ENDS: dict[str, Any] = {"stopped at 7": lambda stop: StopAt(7, stop), "killed at 9": lambda stop: KillAt(9)}


def optim(**changes: Any) -> Any:
    spec = make_spec(optim__task_batch_sizes="boolq=4, ARC-Easy=10", optim__batch_size=8, optim__micro_batch_size=4)
    return replace(spec.optim, **{"epochs": 2.0} | changes)


def task_of(index: int) -> str:
    return "boolq" if index < COUNTS["boolq"] else "ARC-Easy"


def examples() -> list[Example]:
    lengths = random.Random(0)
    return [
        Example(task=task_of(index), ids=tuple(range(lengths.randint(3, 9))), labels=())
        for index in range(sum(COUNTS.values()))
    ]


def test_a_step_is_of_one_task_and_an_epoch_has_every_item_once() -> None:
    steps = steps_by_task(COUNTS, optim(), seed=0)
    assert len(steps) == 2 * (3 + 3)
    for step in steps:
        (task,) = {task_of(index) for index in step}
        assert len(step) == {"boolq": 4, "ARC-Easy": 10}[task]
    for epoch in (steps[:6], steps[6:]):
        assert sorted(index for step in epoch for index in step) == [*range(42)]
    turns = [[task_of(step[0]) for step in epoch] for epoch in (steps[:6], steps[6:])]
    assert turns[0] != turns[1] and turns[0] != sorted(turns[0]) and steps[:6] != steps[6:]


def test_steps_come_from_seed_and_epoch_alone() -> None:
    first = steps_by_task(COUNTS, optim(), seed=0)
    random.seed(1)
    torch.manual_seed(1)
    assert steps_by_task(COUNTS, optim(), seed=0) == first
    assert steps_by_task(COUNTS, optim(), seed=1) != first
    assert steps_by_task(COUNTS, optim(epochs=3.0), seed=0)[:12] == first  # how long it goes on changes nothing before
    # a task's items do not depend on what other tasks there are
    alone = steps_by_task({"boolq": 12}, optim(task_batch_sizes=("boolq=4",)), seed=0)
    assert alone == [step for step in first if task_of(step[0]) == "boolq"]
    alike = steps_by_task({"a": 9, "b": 9}, optim(task_batch_sizes=("a=9", "b=9"), epochs=1.0), seed=0)
    assert min(alike) != [index - 9 for index in max(alike)]  # each task has an order of its own


@pytest.mark.parametrize("epochs", [0.5, 1.0, 1.75, 3.0])
def test_the_last_step_of_a_task_is_filled(epochs: float) -> None:
    steps = steps_by_task({"a": 10, "b": 7}, optim(task_batch_sizes=("a=4", "b=2"), epochs=epochs), seed=0)
    sizes = Counter(("a" if step[0] < 10 else "b", len(step)) for step in steps)
    assert sizes == {("a", 4): -(-10 * epochs // 4), ("b", 2): -(-7 * epochs // 2)}
    times = Counter(index for step in steps for index in step)
    for task in (range(10), range(10, 17)):  # no item twice more often than another
        assert max(times[index] for index in task) - min(times[index] for index in task) <= 1


def test_tasks_have_to_be_those_that_there_are() -> None:
    for sizes in (("boolq=4",), ("boolq=4", "ARC-Easy=10", "piqa=4"), ("boolq=4", "arc=10")):
        with pytest.raises(SpecError, match=r"task_batch_sizes names .*; trained are boolq, ARC-Easy: name each"):
            MicroBatches(examples(), optim(task_batch_sizes=sizes), 0, Decoder(0))


def test_micro_batches_cover_each_step() -> None:
    some = examples()
    batches = MicroBatches(some, optim(), 0, Decoder(0))
    assert len(batches) == 2 * batches.steps == 24
    for step, wanted in enumerate(steps_by_task(COUNTS, optim(), seed=0)):
        one, two = batches.items_of(2 * step), batches.items_of(2 * step + 1)
        assert len(one) == len(two) and sorted(one + two) == sorted(wanted)
        lengths = [len(some[index].ids) for index in one + two]
        assert lengths == sorted(lengths)
    mixed = MicroBatches(some, optim(task_batch_sizes=()), 0, Decoder(0))
    assert mixed.indices == order(42, 0, 88) and mixed.steps == 11  # as before there were steps of one task
    assert mixed.sha256() != batches.sha256()


def test_a_plan_says_what_a_step_is() -> None:
    spec = make_spec(optim__task_batch_sizes="boolq=4, ARC-Easy=10", data__train_items=40)
    (line, total, *_) = plan.lines([spec], {}, None, None, None)
    assert (
        "4 epochs of all items in steps of one task, learning rate 0.005, batch boolq=4, ARC-Easy=10" in line
        and total == "1 specs"
    )


@pytest.mark.parametrize("end", ENDS)
def test_resume_is_the_same_as_one_go(end: str, tmp_path: Path) -> None:
    inputs = save_model(tmp_path / "model"), save_data(tmp_path / "data", train=12)
    (inputs[1] / "ARC-Easy" / "train.json").write_text(json.dumps(arc_items(30)), encoding="utf-8")
    spec = make_spec(optim__task_batch_sizes="boolq=4, ARC-Easy=10", optim__epochs=2.0)
    whole = go(spec, tmp_path / "whole", *inputs)
    stop = threading.Event()
    with pytest.raises((Interrupted, Killed)):
        go(spec, tmp_path / "cut", *inputs, callbacks=[ENDS[end](stop)], stop=stop)
    cut = go(spec, tmp_path / "cut", *inputs)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert rows(tmp_path / "cut", spec, "metrics") == rows(tmp_path / "whole", spec, "metrics")
    assert len(rows(tmp_path / "whole", spec, "metrics")) == 12
