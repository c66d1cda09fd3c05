"""Template and protocol cloze: what is asked, what is trained, and scores against logits in float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import arc_items, boolq_items, make_spec, save_data, save_model

from dora_lab.evaluation.evaluate import evaluate
from dora_lab.forms.decoder import encode
from dora_lab.forms.form import IGNORED
from dora_lab.io.errors import LoadError
from dora_lab.launch.experiments import load_experiment
from dora_lab.launch.select import chosen
from dora_lab.models.base import model_and_tokenizer
from dora_lab.runs.directory import RunDir
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Spec, SpecError, validate
from dora_lab.tasks import ItemError, load_task, prompt
from dora_lab.tasks.cloze import as_cloze
from dora_lab.tasks.sources import items as read

pytestmark = pytest.mark.usefixtures("one_thread")


def cloze(**changes: Any) -> Spec:
    return make_spec(data__template="cloze", evaluation__protocols="cloze", **changes)


def item(question: str, *texts: str, right: int = 0) -> dict[str, str]:
    labels = [f"answer{number + 1}" for number in range(len(texts))]
    listed = " ".join(f"{label.capitalize()}: {text}" for label, text in zip(labels, texts, strict=True))
    text = (
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {'/'.join(labels)}"
    )
    return {
        "instruction": text,
        "input": "",
        "output": f"the correct answer is {labels[right]}",
        "answer": labels[right],
    }


def test_the_question_alone_and_the_text_of_its_answer() -> None:
    arc, boolq = load_task("ARC-Easy"), load_task("boolq")
    (found,) = as_cloze(arc, [item("Is it: Answer1: or not?", "one: a", "two", "three", right=1)])
    assert (found["instruction"], found["output"]) == ("Is it: Answer1: or not?", " two")
    assert found["texts"] == ["one: a", "two", "three"] and found["options"] == ["answer1", "answer2", "answer3"]
    (found,) = as_cloze(boolq, boolq_items(1))
    assert found["texts"] == ["true", "false"] and found["output"] == f" {found['answer']}"
    assert prompt(found, "cloze") == f"Question: {found['instruction']}\nAnswer:"
    assert "Please" not in found["instruction"] and "format" not in found["instruction"]


def test_one_text_twice_is_left_out_and_a_missing_one_is_an_error() -> None:
    arc = load_task("ARC-Easy")
    good = item("Which?", "a", "b")
    assert as_cloze(arc, [item("Which?", "a", "b", "a"), good]) == as_cloze(arc, [good])
    broken = good | {"instruction": good["instruction"].replace("Answer2:", "Answer 2:")}
    with pytest.raises(ItemError, match=r"ARC-Easy, item 1: no text behind 'Answer2:'"):
        as_cloze(arc, [good, broken])


def test_scores_are_means_over_the_tokens_of_each_text(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer(cloze(), save_model(tmp_path / "model"))
    asked = {
        "ARC-Easy": as_cloze(load_task("ARC-Easy"), [
            item("Which is big?", "red", "a big blue question", "small", right=1), item("Which is red?", "red", "blue"),
        ]),
        "boolq": as_cloze(load_task("boolq"), boolq_items(3)),
    }  # fmt: skip
    spec, exact = cloze(), copy.deepcopy(model).double()
    with RunDir.open(tmp_path, spec) as run:
        evaluate(spec, model, tokenizer, asked, run)
        rows = {row["task"]: row for row in read_stream(run.path, "eval")}
        for task, pool in asked.items():
            samples = [json.loads(line) for line in (run.samples / f"{task}.cloze.jsonl").read_text().splitlines()]
            choices, hits = [], 0
            for one, sample in zip(pool, samples, strict=True):
                means = []
                for text in one["texts"]:
                    start = len(tokenizer(prompt(one, "cloze"))["input_ids"])
                    ids = torch.tensor([tokenizer(f"{prompt(one, 'cloze')} {text}")["input_ids"]])
                    with torch.no_grad():
                        logs = exact(ids).logits[0].log_softmax(-1)
                    scored = [float(logs[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])]
                    means.append(sum(scored) / len(scored))
                assert list(sample["output"].values()) == pytest.approx(means, rel=1e-4)
                gold = one["options"].index(one["answer"])
                choices.append(-torch.tensor(means, dtype=torch.float64).log_softmax(0)[gold].item())
                hits += max(range(len(means)), key=means.__getitem__) == gold
            assert rows[task]["choice_nll"] == pytest.approx(sum(choices) / len(choices), rel=1e-4)
            assert rows[task]["value"] == pytest.approx(hits / len(pool))
            assert rows[task]["chance"] == pytest.approx(sum(1 / len(one["texts"]) for one in pool) / len(pool))


def test_what_is_trained_is_what_is_scored(tmp_path: Path) -> None:
    spec = cloze()
    _, tokenizer = model_and_tokenizer(spec, save_model(tmp_path / "model"))
    pool = as_cloze(load_task("ARC-Easy"), arc_items(3))
    for one, example in zip(pool, encode({"ARC-Easy": pool}, spec.data, tokenizer).examples, strict=True):
        learnt = [label for label in example.labels if label != IGNORED]
        assert tokenizer.decode(learnt[:-1]) == one["output"] and learnt[-1] == tokenizer.eos_token_id


def test_template_and_protocol_go_together(tmp_path: Path) -> None:
    for changes in ({"data__template": "cloze"}, {"evaluation__protocols": "cloze"}):
        with pytest.raises(SpecError, match=r"evaluation.protocols = .*just with data.template cloze"):
            validate(make_spec(**({"evaluation__protocols": "generate"} | changes)))
    mixed = cloze(data__name="commonsense_170k", data__eval_name="llm_adapters")
    folder = save_data(tmp_path / "data")
    (folder / "commonsense_170k.json").write_text(json.dumps(arc_items(4)))
    with pytest.raises(LoadError, match="does not say of which task an item is"):
        read(mixed, folder)


def test_an_experiment_made_for_a_folder_keeps_its_numbers_of_items(tmp_path: Path) -> None:
    small, folder = load_experiment("small"), save_data(tmp_path / "data")
    with pytest.raises(SpecError, match=r"has no test items of .*openbookqa"):
        chosen(small, "small", data_dir=folder)
    for task in small.TASKS:
        (folder / task).mkdir(exist_ok=True)
        (folder / task / "test.json").write_text("[]")
    spec = chosen(small, None, data_dir=folder)[0]
    assert (spec.tier, spec.data.train_items, spec.data.test_items) == ("small", 1600, 250) and spec.data.sha256
