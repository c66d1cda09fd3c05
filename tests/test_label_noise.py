"""Training labels drawn anew, and the items that were trained on as the items scored."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dora_lab.io.errors import LoadError
from dora_lab.spec import Evaluation, Spec, SpecError, spec_id, validate
from dora_lab.tasks import load_task, sources
from experiments import commonsense


def spec(**changes: Any) -> Spec:
    whole = commonsense.trained("lora", 8, 0.01, 0)
    return replace(whole, data=replace(whole.data, **changes))


def changed(clean: sources.Pools, noisy: sources.Pools) -> dict[str, list[int]]:
    return {
        name: [place for place, (a, b) in enumerate(zip(clean[name], noisy[name], strict=True)) if a != b]
        for name in clean
    }


def test_a_share_of_each_task_has_a_label_of_its_own_options() -> None:
    clean, noisy = (sources.items(spec(label_noise=share)).train for share in (0.0, 0.2))
    for name, places in changed(clean, noisy).items():
        chances = [1 / len(load_task(name).options(item)) for item in clean[name]]
        expected = 0.2 * sum(1 - chance for chance in chances)  # a new label may be the right one
        assert abs(len(places) - expected) < 4 * math.sqrt(0.2 * len(chances) * 0.25), name
        for place in places:
            before, after = clean[name][place], noisy[name][place]
            assert after["answer"] in load_task(name).options(before) and after["answer"] != before["answer"]
            assert after["output"] == f"the correct answer is {after['answer']}"
            assert {k: v for k, v in after.items() if k not in ("answer", "output")} == {
                k: v for k, v in before.items() if k not in ("answer", "output")
            }


def test_random_labels_say_nothing_about_the_answer() -> None:
    noisy, clean = (sources.items(spec(label_noise=share)).train for share in (1.0, 0.0))
    for name, pool in clean.items():
        right = sum(a["answer"] == b["answer"] for a, b in zip(pool, noisy[name], strict=True)) / len(pool)
        chance = load_task(name).chance
        assert abs(right - chance) < 4 * math.sqrt(chance * (1 - chance) / len(pool)), name


def test_the_items_of_fewer_are_the_first_of_more_and_so_is_their_noise() -> None:
    few, many = (sources.items(spec(label_noise=0.2, train_items=items)).train for items in (256, 1024))
    assert all(many[name][: len(pool)] == pool for name, pool in few.items())
    clean = sources.items(spec(train_items=256)).train
    assert 0 < sum(map(len, changed(clean, few).values())) < 0.2 * 256


def test_nothing_that_is_scored_is_changed_and_old_ids_stay() -> None:
    clean, noisy = (sources.items(spec(label_noise=share, validation_items=80)) for share in (0.0, 1.0))
    assert clean.test == noisy.test and clean.validation == noisy.validation
    assert spec_id(commonsense.trained("lora", 8, 0.0083, 0)) == spec_id(spec_of_record())
    assert spec_id(spec(label_noise=0.0)) == spec_id(spec()) != spec_id(spec(label_noise=0.5))
    with pytest.raises(SpecError, match=r"data\.label_noise = 1\.5: must be in \[0, 1\]"):
        validate(spec(label_noise=1.5))


def spec_of_record() -> Spec:
    """The first LoRA run of the committed campaign, read from its record's spec."""
    from dora_lab.runs.survey import survey
    from dora_lab.spec import from_dict

    results = Path(__file__).resolve().parents[1] / "results"
    specs = [from_dict(record["spec"]) for _, record in survey(results, "commonsense").runs]
    return next(
        one for one in specs
        if (one.method.name, one.method.rank, one.seed, one.evaluation.split, one.data.name)
        == ("lora", 8, 0, "test", "mini2")
    )  # fmt: skip


def test_cloze_items_get_the_text_of_another_option(tmp_path: Path) -> None:
    item = {
        "instruction": "Please choose the correct answer to the question: Which is red?\n\n"
        "Answer1: snow Answer2: blood\n\nAnswer format: answer1/answer2",
        "input": "", "output": "the correct answer is answer2", "answer": "answer2",
    }  # fmt: skip
    numbered = [item | {"instruction": item["instruction"].replace("red", f"red {i}")} for i in range(40)]
    for split in ("train", "test"):
        (tmp_path / "ARC-Easy").mkdir(exist_ok=True)
        (tmp_path / "ARC-Easy" / f"{split}.json").write_text(json.dumps(numbered))
    asked = replace(
        spec(name="llm_adapters", tasks=("ARC-Easy",), template="cloze", label_noise=1.0, train_items=None),
        evaluation=Evaluation(protocols=("cloze",)),
    )
    pool = sources.items(replace(asked, data=replace(asked.data, train_items=40)), tmp_path).train["ARC-Easy"]
    assert {(one["answer"], one["output"]) for one in pool} == {("answer1", " snow"), ("answer2", " blood")}


def test_a_mix_without_tasks_is_refused() -> None:
    with pytest.raises(LoadError, match=r"commonsense_170k.*label_noise needs another source"):
        sources._relabelled({sources.MIX: []}, spec(label_noise=0.5).data)


def test_the_items_trained_on_are_scored_with_their_labels() -> None:
    asked = spec(label_noise=1.0, train_items=64)
    asked = replace(asked, evaluation=replace(asked.evaluation, split="train"))
    validate(asked)
    found = sources.items(asked)
    assert found.split("train") == sources.items(spec(label_noise=1.0, train_items=64)).train and not found.test
    base = replace(asked, method=replace(asked.method, name="base", rank=None, alpha=None, target_modules=()),
                   optim=None, probe=None)  # fmt: skip
    assert sources.items(base).split("train") == found.train
