"""A run of a model that sees pictures, end to end: rows, scores, resume to the byte."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from pictured import SHAPE, TASKS, save_bart, save_pictures

from dora_lab.io.errors import LoadError
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.launch.select import chosen
from dora_lab.metrics import score
from dora_lab.runs.errors import ResumeError
from dora_lab.runs.item_values import unpack
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_rows
from dora_lab.spec import Spec, derive
from dora_lab.tasks import ItemError
from dora_lab.tasks.vl_adapter import hash_annotations
from dora_lab.training.fit import Interrupted
from experiments import image_text
from experiments.image_text import specs

pytestmark = pytest.mark.usefixtures("one_thread")
SENTENCES = ("vqa: what colour?", "gpa: is it red?", "nlvr: both have one colour", "a blue thing here. a green ring.")
SMALL = {
    "data.feature_shape": f"{SHAPE[0]},{SHAPE[1]}", "data.visual_tokens": "4", "data.cutoff": "40",
    "data.cutoffs": "vqa=20/10,gqa=20/20", "optim.batch_size": "4", "optim.micro_batch_size": "2",
    "optim.epochs": "1", "optim.task_batch_sizes": ",".join(f"{task}=4" for task in TASKS),
    "evaluation.batch_size": "3", "evaluation.max_new_tokens": "8",
}  # fmt: skip
ADAPTED = {"method.rank": "4", "method.alpha": "4"}
ROWS = dict(zip(("ft", "lora_quoted", "lora", "dora", "dora_in_graph"), specs("paper"), strict=False))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    where = tmp_path_factory.mktemp("pictured")
    return Paths(where / "results", save_pictures(where / "data"), save_bart(where / "bart", SENTENCES))


def small(row: str, **changes: Any) -> Spec:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return derive(ROWS[row], SMALL | ({} if row == "ft" else ADAPTED) | named)


def rows(paths: Paths, spec: Spec, stream: str = "eval") -> list[dict[str, Any]]:
    return read_rows(run_path(paths.results, spec), stream)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table_from_start_to_end(row: str, paths: Paths) -> None:
    spec = small(row)
    assert run_spec(spec, paths) == "complete"
    folder = run_path(paths.results, spec)
    record = read_record(folder)
    assert record["status"] == "complete" and record["training"]["steps"] == 4 + 4 + 2 + 8
    assert record["training"]["unanswered"] == 1 and len(record["inputs"]["features"]["sha256"]) == 64
    assert record["inputs"]["items"]["train"] == {"vqa": 16, "gqa": 16, "nlvr2": 8, "coco_caption": 32}
    assert (record["params"]["trainable"] == record["params"]["total"]) == (row == "ft")
    probed = {(found["module"].split(".")[1], found["kind"]) for found in rows(paths, spec, "probe")}
    assert probed == {(side, kind) for side in ("encoder", "decoder") for kind in ("q_proj", "v_proj")}
    found = {told["task"]: told for told in rows(paths, spec)}
    assert [*found] == [*TASKS]
    for task, told in found.items():
        assert told["metric"] == ("cider_d" if task == "coco_caption" else "accuracy")
        assert told["n"] == 8 and told["answer_nll"] > 0
        single = unpack("score", told["per_item"]["score"])
        assert told["value"] == pytest.approx(single.mean(), abs=1e-6)
        nlls = unpack("answer_nll", told["per_item"]["answer_nll"])
        assert told["answer_nll"] == pytest.approx(nlls.mean(), rel=1e-3)
        # scored again from the samples alone
        lines = (folder / "samples" / f"{task}.generate.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        for metric, summary in told["rules"].items():
            again = score(metric, samples, {sample["id"]: sample["output"] for sample in samples}, task)
            assert again.summary == summary
    assert set(found["vqa"]["rules"]) == {"vqa_released", "vqa_both"} and "correct" in found["nlvr2"]
    prompts = {task: json.loads((folder / "samples" / f"{task}.generate.jsonl").read_text().split("\n")[0])["prompt"]
               for task in TASKS}  # fmt: skip
    word = (lambda text: "") if row == "ft" else (lambda text: text)
    assert prompts == {
        "vqa": word("vqa: ") + "what colour?", "gqa": word("gpa: ") + "is it red?",
        "nlvr2": word("nlvr: ") + "both have one colour", "coco_caption": word("caption: "),
    }  # fmt: skip
    assert run_spec(spec, paths) == "skipped"


def test_it_learns_what_only_the_pictures_say(paths: Paths) -> None:
    spec = small("ft", data__tasks="vqa", optim__task_batch_sizes="vqa=8", optim__learning_rate="0.003", probe="none",
                 optim__batch_size="8", optim__micro_batch_size="8", optim__epochs="120", optim__weight_decay="0",
                 optim__groups="", data__cutoffs="")  # fmt: skip
    run_spec(spec, paths)
    (told,) = rows(paths, spec)
    losses = [row["loss"] for row in rows(paths, spec, "metrics")]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert told["value"] > 0.9  # one colour for all: about a third


def test_a_run_that_was_stopped_is_the_same_to_the_byte(paths: Paths, tmp_path: Path) -> None:
    spec = small("dora")
    one, two = (Paths(tmp_path / name, paths.data_dir, paths.model_dir) for name in ("one", "two"))
    run_spec(spec, one)
    stop = threading.Event()

    def at(phase: str, done: int, of: int, loss: float | None) -> None:
        if phase == "train" and done == 6:
            stop.set()

    with pytest.raises(Interrupted):
        run_spec(spec, two, Runtime(stop=stop, progress=at))
    assert run_spec(spec, two) == "complete"
    first, second = run_path(one.results, spec), run_path(two.results, spec)
    assert read_record(second)["training"]["resumed_from"] == 7  # the step after the one whose loss was told
    for name in ("metrics.jsonl", "probe.jsonl", "eval.jsonl", "adapter/adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for task in TASKS:
        name = f"samples/{task}.generate.jsonl"
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_is_wrong_is_said_before_training(paths: Paths, tmp_path: Path) -> None:
    data = save_pictures(tmp_path / "data")
    here = Paths(tmp_path / "results", data, paths.model_dir)
    file = data / "vqa" / "v2_mscoco_val2014_annotations.json"
    told = json.loads(file.read_text())
    told["annotations"][-1]["answers"].pop()
    file.write_text(json.dumps(told))
    with pytest.raises(ItemError, match=r"vqa, test, item \d+, field 'answers': expected a list of 10 annotators"):
        run_spec(small("dora"), here)
    for changes, words in (
        ({"data__cutoff": "1024"}, None),
        ({"evaluation__max_new_tokens": "64"}, "evaluation.max_new_tokens = 64: the model has 64 positions"),
        ({"data__feature_shape": "9,6"}, "expected the columns id: string and features"),
        ({"data__visual_tokens": "16"}, "data.visual_tokens = 16: 9 regions are no square grid of at least that"),
    ):
        if words:
            with pytest.raises((ItemError, LoadError), match=words):
                run_spec(small("dora", **changes), paths)


def test_a_run_goes_on_with_its_own_features_alone(paths: Paths, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    data = save_pictures(tmp_path / "data")
    here, spec, stop = Paths(tmp_path / "results", data, paths.model_dir), small("lora"), threading.Event()

    def at(phase: str, done: int, of: int, loss: float | None) -> None:
        if phase == "train" and done == 5:
            stop.set()

    with pytest.raises(Interrupted):
        run_spec(spec, here, Runtime(stop=stop, progress=at))
    (file,) = (data / "features" / "VG").glob("*/*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "id", table.column("id").take(list(range(len(table)))[::-1])), file)
    with pytest.raises(ResumeError, match=r"features\.sha256"):
        run_spec(spec, here)


def test_a_folder_of_its_own_data_is_taken(paths: Paths) -> None:
    (spec,) = chosen(image_text, "paper", ["method=ft", "seed=0"], (), paths.data_dir, paths.model_dir)
    assert spec.data.tasks == TASKS and spec.model.name == "bart"
    assert paths.data_dir is not None and spec.data.sha256 == hash_annotations(paths.data_dir)
