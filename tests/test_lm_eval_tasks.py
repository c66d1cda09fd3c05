"""The task definitions for lm-eval say what the lab itself does, prompt by prompt and answer by answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import arc_items, boolq_items, make_spec, save_model

from dora_lab.evaluation.evaluate import evaluate
from dora_lab.models.base import model_and_tokenizer
from dora_lab.runs.directory import RunDir
from dora_lab.tasks import Task, family, load_task, prompt, read_items, table_1
from dora_lab.tasks.commonsense.lm_eval import FOLDER
from dora_lab.tasks.commonsense.lm_eval import items as loader
from dora_lab.tasks.commonsense.lm_eval.write import definitions, lm_eval_name
from dora_lab.tasks.task import FIELDS

VARIANTS = [("published", ""), ("clean", "_clean")]
OUTPUTS = [
    "the correct answer is {first}",
    "{second} or {first}?",
    "",
    "no answer",
    "{FIRST}",
    "{first}\n\n### Response:\n{second}",
    "{first} ### Response:",
    "### Response: {second}\n### Response: it is {first}, not {second}",
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test file for every task, of items of our own."""
    folder = tmp_path_factory.mktemp("data")
    for task in family("commonsense"):
        made = {"boolq": boolq_items(5), "ARC-Easy": arc_items(5)}.get(task.name) or own(task, 5)
        (folder / task.folder).mkdir()
        (folder / task.folder / "test.json").write_text(json.dumps(made))
    return folder


def own(task: Task, count: int) -> list[dict[str, Any]]:
    labels = task.labels[: round(1 / task.chance)]
    return [
        {
            "instruction": f"Is {{it}} {n}? {{{{ }}}} {{% %}}\n\nAnswer format: {'/'.join(labels)}",
            "input": "",
            "output": f"the correct answer is {labels[n % len(labels)]}",
            "answer": labels[n % len(labels)],
        }
        for n in range(count)
    ]


def loaded(names: list[str], data_dir: Path | None) -> dict[str, Any]:
    manager = TaskManager(
        include_path=str(FOLDER), include_defaults=False, metadata={"data_dir": str(data_dir)} if data_dir else {}
    )
    return manager.load(names)["tasks"]


def test_definitions_are_those_of_the_tasks() -> None:
    """Written from them (`make lm-eval-tasks`), no more and no fewer; the loader that travels along reads our items."""
    assert {file.name: file.read_text() for file in FOLDER.glob("dora_*.yaml")} == definitions()
    assert loader.FIELDS == FIELDS


@pytest.mark.parametrize(("template", "suffix"), VARIANTS)
def test_prompts_targets_and_patterns_are_the_labs(template: str, suffix: str, data_dir: Path) -> None:
    assert loaded([f"dora_commonsense{suffix}"], data_dir).keys() == {
        lm_eval_name(task.name, suffix) for task in table_1()
    }
    found = loaded([lm_eval_name(task.name, suffix) for task in family("commonsense")], data_dir)
    for task in family("commonsense"):
        theirs = found[lm_eval_name(task.name, suffix)]
        items = json.loads((data_dir / task.folder / "test.json").read_text())
        docs = list(theirs.test_docs())
        assert [theirs.doc_to_text(doc).encode() for doc in docs] == [prompt(item, template).encode() for item in items]
        assert [theirs.doc_to_target(doc) for doc in docs] == [item["answer"] for item in items]
        first, second = task.labels[:2]
        texts = [text.format(first=first, second=second, FIRST=first.upper()) for text in OUTPUTS]
        (steps,) = theirs._filters
        answers = [[text] for text in texts]
        for step in steps.filters:
            answers = list(step().apply(answers, docs))
        assert [answer or None for answer in answers] == [task.parse(text) for text in texts]
        assert theirs.config.generation_kwargs == {
            "until": [], "max_gen_toks": 32, "do_sample": False, "num_beams": 4,
        }  # fmt: skip


@pytest.mark.parametrize(("template", "suffix"), VARIANTS)
def test_scores_are_the_labs_item_by_item(template: str, suffix: str, data_dir: Path, tmp_path: Path) -> None:
    spec = make_spec(
        data__template=template,
        evaluation__num_beams=4,
        evaluation__max_new_tokens=32,
        evaluation__protocols="generate",
    )
    model, tokenizer = model_and_tokenizer(spec, save_model(tmp_path / "model", positions=1024))
    items = {name: json.loads((data_dir / name / "test.json").read_text()) for name in ("boolq", "ARC-Easy")}
    with RunDir.open(tmp_path, spec) as run:
        evaluate(spec, model, tokenizer, items, run)
        ours = {
            name: [json.loads(line) for line in (run.samples / f"{name}.generate.jsonl").read_text().splitlines()]
            for name in items
        }
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata={"data_dir": str(data_dir)})
    names = {"boolq": f"dora_boolq{suffix}", "ARC-Easy": f"dora_arc_easy{suffix}"}
    result: Any = simple_evaluate(
        HFLM(model, tokenizer=tokenizer, batch_size=3, max_length=1024),
        tasks=list(names.values()),
        task_manager=manager,
        bootstrap_iters=0,
    )
    for name, theirs in names.items():
        samples = sorted(result["samples"][theirs], key=lambda sample: sample["doc_id"])
        assert [sample["arguments"][0][0] for sample in samples] == [sample["prompt"] for sample in ours[name]]
        assert [sample["resps"][0][0].strip() for sample in samples] == [sample["output"] for sample in ours[name]]
        assert [sample["filtered_resps"][0] or None for sample in samples] == [
            sample["parsed"] for sample in ours[name]
        ]
        unparsed = sum(sample["parsed"] is None for sample in ours[name]) / len(samples)
        assert result["results"][theirs]["unparsed,first"] == unparsed


def test_group_averages_over_tasks_from_the_command_line_alone(data_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "travelled", ignore=shutil.ignore_patterns("__pycache__"))
    model = save_model(tmp_path / "model", positions=1024)
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
         "--device", "cpu", "--batch_size", "8", "--include_path", str(folder), "--tasks", "dora_commonsense",
         "--metadata", json.dumps({"data_dir": str(data_dir)}), "--limit", "2", "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").glob("**/results_*.json")
    results = json.loads(file.read_text())["results"]
    for metric in ("exact_match,first", "unparsed,first"):
        values = [row[metric] for name, row in results.items() if name != "dora_commonsense"]
        assert len(values) == 8
        assert results["dora_commonsense"][metric] == pytest.approx(sum(values) / 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"does not exist; fetch it"),
        ("[{", r"not JSON"),
        ("[]", r"expected a list of items"),
        (json.dumps([boolq_items(1)[0] | {"answer": None}]), r"item 0, field 'answer': missing or not text"),
        (json.dumps([boolq_items(1)[0] | {"input": "a passage"}]), r"field 'input': must be empty"),
        (json.dumps([boolq_items(1)[0] | {"answer": "True"}]), r"field 'answer': 'True' is not one .* true/false"),
        (json.dumps([boolq_items(1)[0] | {"answer": "true "}]), r"field 'answer': 'true ' is not one"),
        (json.dumps([arc_items(1)[0] | {"answer": "answer1"}]), r"field 'instruction': .* is not followed by labels"),
    ],
)
def test_bad_files_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    if content is not None:
        (tmp_path / "boolq" / "test.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        loaded(["dora_boolq"], tmp_path)


@pytest.mark.parametrize(
    "said", ["answer1 / answer2 / answer3.", "answer1/answer2", "answer1", "answer1/answer1", "a/b"]
)
@pytest.mark.parametrize("answer", ["answer1", "answer3", "Answer1"])
def test_items_are_taken_where_the_lab_takes_them(said: str, answer: str, tmp_path: Path) -> None:
    item = arc_items(1)[0] | {"answer": answer, "output": f"the correct answer is {answer}"}
    item["instruction"] = f"Which?\n\nAnswer format: {said}"
    file = tmp_path / "ARC-Easy" / "test.json"
    file.parent.mkdir()
    file.write_text(json.dumps([item]))
    taken = []
    for read in (lambda: loaded(["dora_arc_easy"], tmp_path), lambda: read_items(file, load_task("ARC-Easy"))):
        try:
            taken.append(bool(read()))
        except ValueError:
            taken.append(False)
    right = said in ("answer1 / answer2 / answer3.", "answer1/answer2") and answer in said
    assert taken == [right, right]


def test_the_data_folder_is_asked_for() -> None:
    with pytest.raises(ValueError, match="need the folder of test files"):
        loaded(["dora_boolq"], None)
