"""Protocol "builtin": lm-eval's own tasks, from a cache of data sets such as `datasets` keeps; no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter
from tiny import make_spec, save_data, save_model

from dora_lab.report.card import card
from dora_lab.runs.record import run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Method, SpecError, derive, to_dict
from dora_lab.tasks import table_1

COMMIT = "c" * 40
COUNT = 5
SETS: dict[str, tuple[str, str, str, Any]] = {  # our task: data set, configuration, split, its n-th row
    "boolq": ("aps/super_glue", "boolq", "validation", lambda n: {
        "passage": f"The {n} is big and red.", "question": f"is the {n} red", "label": n % 2,
    }),
    "piqa": ("baber/piqa", "default", "validation", lambda n: {
        "goal": f"Please find number {n}", "sol1": "big red", "sol2": "a small blue one", "label": n % 2,
    }),
    "social_i_qa": ("lighteval/siqa", "default", "validation", lambda n: {
        "context": f"One is {n}.", "question": "Is it?", "answerA": "true", "answerB": "false", "answerC": "one",
        "label": str(n % 3 + 1),
    }),
    "hellaswag": ("Rowan/hellaswag", "default", "validation", lambda n: {
        "ind": n, "activity_label": "Red", "ctx_a": f"A number {n}", "ctx_b": "is big", "ctx": f"A number {n} is big",
        "endings": ["or small", "or red", "or blue", "or one"], "source_id": "", "split": "val", "split_type": "",
        "label": str(n % 4),
    }),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", lambda n: {
        "sentence": f"The red number {n} is big but _ is small.", "option1": "blue", "option2": "red",
        "answer": str(n % 2 + 1),
    }),
    "ARC-Easy": ("allenai/ai2_arc", "ARC-Easy", "test", lambda n: {
        "id": str(n), "question": f"Is {n} big?", "answerKey": "ABC"[n % 3],
        "choices": {"text": ["red", "blue", "small"], "label": ["A", "B", "C"]},
    }),
    "ARC-Challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", lambda n: {
        "id": str(n), "question": f"Is {n} one?", "choices": {"text": ["red", "a big one"], "label": ["1", "2"]},
        "answerKey": "12"[n % 2],
    }),
    "openbookqa": ("allenai/openbookqa", "main", "test", lambda n: {
        "id": str(n), "question_stem": f"The {n} is", "answerKey": "ABCD"[n % 4],
        "choices": {"text": ["big", "small", "red", "blue"], "label": ["A", "B", "C", "D"]},
    }),
}  # fmt: skip
COMPARE = """
import json, sys
import lm_eval
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": sys.argv[1], "dtype": "float32", "device": "cpu"}, tasks=sys.argv[2:],
    batch_size=4, bootstrap_iters=0,
)
print(json.dumps(found["results"]))
"""


def test_every_task_names_lm_evals_own() -> None:
    assert {task.name for task in table_1()} == SETS.keys()
    assert all(task.builtin for task in table_1())


def test_other_items_are_refused() -> None:
    with pytest.raises(SpecError, match="test with protocol builtin"):
        derive(make_spec(), {"evaluation.protocols": "builtin", "evaluation.split": "validation"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `datasets` after each of the data sets was loaded once."""
    root = tmp_path_factory.mktemp("cache")
    for path, configuration, split, row in SETS.values():
        name = path.split("/")[1]
        folder = root / path.replace("/", "___") / configuration / "0.0.0" / COMMIT
        folder.mkdir(parents=True)
        rows = datasets.Dataset.from_list([row(n) for n in range(COUNT)])
        splits = {}
        for place in ("train", split):
            with ArrowWriter(features=rows.features, path=str(folder / f"{name}-{place}.arrow")) as writer:
                for each in rows:
                    writer.write(each)
                writer.finalize()
            splits[place] = datasets.SplitInfo(place, num_examples=COUNT, dataset_name=name)
        datasets.DatasetInfo(
            builder_name=name, dataset_name=name, config_name=configuration, version="0.0.0", features=rows.features,
            splits=datasets.SplitDict(splits),
        ).write_to_directory(str(folder))  # fmt: skip
    return root


def python(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=os.environ | environment
    )


RUN = """
import json, sys
from pathlib import Path
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.spec import from_dict
run_spec(from_dict(json.loads(sys.argv[1])), Paths(*map(Path, sys.argv[2:])))
"""


def run(spec: Any, results: Path, model: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    data = save_data(results / "data")
    return python("-c", RUN, json.dumps(to_dict(spec)), str(results), str(data), str(model), cache=cache)


def test_the_numbers_are_lm_evals(model: Path, cache: Path, tmp_path: Path) -> None:
    spec = replace(
        make_spec(evaluation__protocols="builtin", data__tasks=",".join(SETS)),
        method=Method(name="base"), optim=None, probe=None,
    )  # fmt: skip
    done = run(spec, tmp_path, model, cache)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [str(task.builtin) for task in table_1()]
    theirs = python("-c", COMPARE, str(model), *names, cache=cache)
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    wanted = json.loads(theirs.stdout.splitlines()[-1])
    rows = {row["lm_eval_task"]: row for row in read_stream(run_path(tmp_path, spec), "eval")}
    assert rows.keys() == set(names)
    for name, row in rows.items():
        assert row["value"] == pytest.approx(wanted[name]["acc,none"])
        norm = wanted[name].get("acc_norm,none")
        assert row["accuracy_norm"] == (None if norm is None else pytest.approx(norm))
        assert (row["n"], row["n_unparsed"], row["protocol"]) == (COUNT, None, "builtin")
        assert (row["dataset"], row["dataset_revision"]) == (SETS[row["task"]][0], COMMIT)
    assert len({row["value"] for row in rows.values()}) > 1
    assert rows["winogrande"]["chance"] == 0.5 and rows["openbookqa"]["chance"] == 0.25
    told = card(run_path(tmp_path, spec))
    assert f"- builtin ARC-Easy: lm-eval's task arc_easy, version 1.0, on allenai/ai2_arc at {COMMIT}" in told
    lines = (run_path(tmp_path, spec) / "samples" / "winogrande.builtin.jsonl").read_text().splitlines()
    sample = json.loads(lines[1])
    assert sample["options"] == ["The red number 1 is big but blue", "The red number 1 is big but red"]
    assert (sample["gold"], len(sample["output"])) == (1, 2)


def test_data_that_is_not_there_is_told_before_training(model: Path, tmp_path: Path) -> None:
    done = run(make_spec(evaluation__protocols="builtin"), tmp_path, model, tmp_path / "none")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "lm-eval's task 'boolq' reads aps/super_glue from the hub; it could not be loaded" in message
    assert "load_dataset('aps/super_glue', 'boolq')" in message and str(tmp_path / "none") in message
    assert not list(tmp_path.rglob("metrics.jsonl"))
