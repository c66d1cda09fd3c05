"""Runs of a model that sees clips, end to end: rows, what cutoffs take, scores, resume to the byte, two processes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filmed import ASKED, LEARNT, SHAPE, save_clips
from pictured import save_bart
from test_pictured_processes import TWO, run, samples

from analysis.tables import video_text as table
from dora_lab.io.errors import LoadError
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.launch.select import chosen
from dora_lab.metrics import score
from dora_lab.report.card import card
from dora_lab.runs.errors import ResumeError
from dora_lab.runs.item_values import unpack
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_rows, read_stream
from dora_lab.runs.survey import iter_runs
from dora_lab.spec import Spec, derive
from dora_lab.tasks import ItemError
from dora_lab.tasks.value import hash_annotations
from dora_lab.training.fit import Interrupted
from experiments import video_text

pytestmark = pytest.mark.usefixtures("one_thread")
CHOICES = "[Q] what colour? [TS] (0.5-2.25) ([0, 2.5]) [Choices] a0: red. a1: blue. a2: green. a3: grey. a4: ."
SENTENCES = (
    f"[Subs] ann talks. bob talks. {CHOICES} tvqa: how2qa: tvc: yc2c: ",
    "a blue thing here. a green ring here.",
)
LIMIT = 52  # tokens of a text; the tiny model has 64 positions
SMALL = {
    "data.feature_shape": f"{SHAPE[0]},{SHAPE[1]}", "data.cutoff": "64",
    "data.cutoffs": ",".join(f"{task}={LIMIT}/20" for task in LEARNT + ASKED), "optim.batch_size": "4",
    "optim.micro_batch_size": "2", "optim.epochs": "1", "optim.task_batch_sizes": ",".join(f"{t}=4" for t in LEARNT),
    "evaluation.batch_size": "4", "evaluation.max_new_tokens": "8",
}  # fmt: skip
ADAPTED = {"method.rank": "4", "method.alpha": "4"}
ROWS = dict(zip(video_text.ROWS, video_text.specs("paper"), strict=False))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    where = tmp_path_factory.mktemp("filmed")
    return Paths(where / "results", save_clips(where / "data"), save_bart(where / "bart", SENTENCES))


def small(row: str, **changes: Any) -> Spec:
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return derive(ROWS[row], SMALL | ({} if row == "FT" else ADAPTED) | named)


def rows(paths: Paths, spec: Spec, stream: str = "eval") -> list[dict[str, Any]]:
    return read_rows(run_path(paths.results, spec), stream)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table_from_start_to_end(row: str, paths: Paths) -> None:
    spec = small(row)
    assert run_spec(spec, paths) == "complete"
    folder = run_path(paths.results, spec)
    record = read_record(folder)
    assert record["status"] == "complete" and record["training"]["steps"] == 3 + 3 + 6 + 3
    assert record["training"]["unanswered"] == 0 and len(record["inputs"]["features"]["sha256"]) == 64
    assert record["inputs"]["items"]["train"] == {"tvqa": 12, "how2qa": 12, "tvc": 24, "yc2c": 12}
    assert record["inputs"]["items"]["test"] == dict.fromkeys(ASKED, 6)
    assert (record["params"]["trainable"] == record["params"]["total"]) == (row == "FT")
    probed = {(found["module"].split(".")[1], found["kind"]) for found in rows(paths, spec, "probe")}
    assert probed == {(side, kind) for side in ("encoder", "decoder") for kind in ("q_proj", "v_proj")}
    found = {told["task"]: told for told in rows(paths, spec)}
    assert [*found] == [*ASKED]
    for task, told in found.items():
        assert told["metric"] == ("accuracy" if "qa" in task else "cider_d")
        assert told["n"] == 6 and told["answer_nll"] > 0
        single = unpack("score", told["per_item"]["score"])
        assert told["value"] == pytest.approx(single.mean(), abs=1e-6)
        lines = (folder / "samples" / f"{task}.generate.jsonl").read_text().splitlines()
        kept = [json.loads(line) for line in lines]
        said = {sample["id"]: sample["output"] for sample in kept}
        for metric, summary in told["rules"].items():  # scored again from the samples alone
            assert score(metric, kept, said, task).summary == summary
        if "qa" in task:
            labels = {f"a{number}" for number in range(5 if task == "tvqa_val" else 4)}
            assert told["n_unparsed"] == sum(text not in labels for text in said.values())
            assert told["chance"] == 1 / len(labels)
        # questions lose their last choices and the word of their task, none loses its own words
        assert (0 < told["n_shortened"] <= 6) == ("qa" in task) and told["n_questions_cut"] == 0
    assert set(found["tvc_val"]["rules"]) == {"cider_d_ascii", "cider_d"}
    first = json.loads((folder / "samples" / "tvc_val.generate.jsonl").read_text().split("\n")[1])
    assert first["prompt"] == "[Subs] ann talks. [TS] ([0.0, 2.5]) tvc: " and len(first["references"]) == 2
    assert run_spec(spec, paths) == "skipped"


def test_questions_that_are_cut_are_said_in_record_row_and_card(paths: Paths, tmp_path: Path) -> None:
    here = Paths(tmp_path, paths.data_dir, paths.model_dir)
    spec = small("DoRA", data__tasks="tvqa,tvqa_val", optim__task_batch_sizes="tvqa=4", probe="none",
                 evaluation__task_beams="", data__cutoffs="tvqa=10/20,tvqa_val=10/20")  # fmt: skip
    run_spec(spec, here)
    ((_, record),) = iter_runs(tmp_path)
    told = rows(here, spec)[0]
    assert record["training"]["shortened"] == 12 and 0 < record["training"]["questions_cut"] <= 12
    assert told["n_shortened"] == 6 and 0 < told["n_questions_cut"] <= 6
    text = card(run_path(here.results, spec))
    assert f"- {record['training']['questions_cut']} training items lost words of their question to a cutoff" in text
    assert f"- tvqa_val: 6 of its 6 texts were cut to fit, {told['n_questions_cut']} of them in their question" in text


def test_the_table_has_validation_under_its_name_and_the_papers_rows_apart(paths: Paths, tmp_path: Path) -> None:
    specs = [small("FT"), small("LoRA, matched"), small("DoRA"), small("DoRA", seed="1")]
    for spec in specs:
        run_spec(spec, paths)
        source = run_path(paths.results, spec)
        shutil.copytree(source, tmp_path / source.relative_to(paths.results))
    text, data = (next(p for p in table.build(tmp_path) if p.suffix == end).read_text() for end in (".md", ".csv"))
    ours, _, printed = text.partition(table.PAPER)
    head = next(line for line in ours.splitlines() if line.startswith("| Method"))
    for column in ("TVQA val", "How2QA val", "TVC val", "YC2C val", "Question cut %", "Unparsed %"):
        assert f" {column} " in head
    names = [line.split("|")[1].strip() for line in ours.splitlines() if line.startswith(("| FT", "| LoRA", "| DoRA"))]
    assert names == ["FT", "LoRA, matched", "DoRA"]
    assert "| Table 3 | DoRA | 5.19 | 76.3 | 74.1 | 45.8 | 145.4 | 85.4 |" in printed
    assert "| Table 3 | LoRA | 5.17 | 75.5 | 72.9 | 44.6 | 140.9 | 83.5 |" in printed
    assert "| Table 3 | FT | 100.00 | 76.3 | 73.9 | 45.7 | 154.0 | 87.5 |" in printed
    found = {row["name"]: row for row in csv.DictReader(io.StringIO(data))}
    told = [rows(paths, spec) for spec in specs[2:]]
    values = [100 * sum(row["value"] for row in run) / 4 for run in told]
    assert found["DoRA"]["seeds"] == "2" and float(found["DoRA"]["average"]) == pytest.approx(sum(values) / 2)
    cut = [row["n_shortened"] for run in told for row in run]
    assert float(found["DoRA"]["cut"]) == pytest.approx(100 * sum(cut) / (8 * 6))
    assert float(found["DoRA"]["question_cut"]) == 0 < sum(cut)  # choices and words of tasks alone
    unparsed = [row["n_unparsed"] for run in told for row in run if row["metric"] == "accuracy"]
    assert float(found["DoRA"]["unparsed"]) == pytest.approx(100 * sum(unparsed) / (4 * 6))
    assert table.build(tmp_path / "none") == []


def test_it_learns_what_only_the_frames_say(paths: Paths) -> None:
    spec = small("FT", data__tasks="tvqa,tvqa_val", optim__task_batch_sizes="tvqa=6", optim__learning_rate="0.003",
                 probe="none", optim__batch_size="6", optim__micro_batch_size="6", optim__epochs="120",
                 optim__weight_decay="0", optim__groups="", data__cutoffs="", evaluation__task_beams="")  # fmt: skip
    run_spec(spec, paths)
    (told,) = rows(paths, spec)
    losses = [row["loss"] for row in rows(paths, spec, "metrics")]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert told["value"] > 0.9 and told["n_unparsed"] == 0  # one label for all: a third


def test_a_run_that_was_stopped_is_the_same_to_the_byte(paths: Paths, tmp_path: Path) -> None:
    spec = small("DoRA")
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
    names = ["metrics.jsonl", "probe.jsonl", "eval.jsonl", "adapter/adapter_model.safetensors"]
    for name in [*names, *(f"samples/{task}.generate.jsonl" for task in ASKED)]:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_is_wrong_is_said_before_training(paths: Paths, tmp_path: Path) -> None:
    for changes, words in (
        ({"evaluation__max_new_tokens": "64"}, r"evaluation\.max_new_tokens = 64: the model has 64 positions"),
        ({"data__feature_shape": "6,4"}, r"are \(\d, 5\) in float\d\d, expected \(frames, 4\)"),
        (
            {"data__cutoffs": "", "data__cutoff": "100"},
            r"item \d+ of tvqa_val: \d+ tokens exceed the model's 64 positions",
        ),
        (
            {"data__validation_items": "8", "evaluation__split": "validation", "evaluation__task_beams": ""},
            "^tvc: its validation items are for learning and have no references .*; leave it out of data.tasks",
        ),
    ):
        with pytest.raises((ItemError, LoadError), match=words):
            run_spec(small("DoRA", **changes), Paths(tmp_path / words[:8], paths.data_dir, paths.model_dir))


def test_a_run_goes_on_with_its_own_features_alone(paths: Paths, tmp_path: Path) -> None:
    data = save_clips(tmp_path / "data")
    here, spec, stop = Paths(tmp_path / "results", data, paths.model_dir), small("LoRA, matched"), threading.Event()

    def at(phase: str, done: int, of: int, loss: float | None) -> None:
        if phase == "train" and done == 5:
            stop.set()

    with pytest.raises(Interrupted):
        run_spec(spec, here, Runtime(stop=stop, progress=at))
    file = data / "video" / "vis_features" / "yc2" / "clip-vit" / "train_003.npz"
    with np.load(file) as held:
        features = held["features"]
    np.savez(file, features=features[::-1])
    with pytest.raises(ResumeError, match=r"features\.sha256"):
        run_spec(spec, here)


def test_a_folder_of_its_own_data_is_taken(paths: Paths) -> None:
    (spec,) = chosen(video_text, "paper", ["method=ft", "seed=0"], (), paths.data_dir, paths.model_dir)
    assert spec.data.tasks == LEARNT + ASKED and spec.model.name == "bart"
    assert paths.data_dir is not None and spec.data.sha256 == hash_annotations(paths.data_dir / "video")


def test_over_two_processes_as_over_one(tmp_path: Path) -> None:
    base = save_bart(tmp_path / "bart", SENTENCES)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dropout": 0.0}))  # what is dropped hangs on the process
    folders = save_clips(tmp_path / "data"), base
    changes = SMALL | ADAPTED | {"data.padding": "masked"}  # the second one is told how long each clip is
    for name, launch in (("one", ()), ("two", TWO)):
        done = run(tmp_path / name, folders, launch, "video_text", changes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("1 runs: 1 complete") == 1
        # three sets of clips, read by one process
        assert [(tmp_path / name / str(rank)).exists() for rank in (0, 1)] == [True, False]
        assert (tmp_path / name / "0").read_text() == "x" * 3
    (path, one), (other, two) = (next(iter_runs(tmp_path / name)) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["spec_id"] == two["spec_id"]
    assert one["inputs"] == two["inputs"]
    losses = [[row["loss"] for row in read_stream(run, "metrics")] for run in (path, other)]
    assert len(losses[0]) == 15 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    said = samples(path)
    assert said == samples(other) and said.keys() == {f"{task}.generate" for task in ASKED}
    assert any(text for texts in said.values() for text in texts)


def test_what_one_process_cannot_read_ends_both(tmp_path: Path) -> None:
    folders = save_clips(tmp_path / "data"), save_bart(tmp_path / "bart", SENTENCES)
    (folders[0] / "video" / "vis_features" / "how2" / "clip-vit" / "train_001.npz").write_bytes(b"PK")
    done = run(tmp_path / "two", folders, TWO, "video_text", SMALL | ADAPTED)
    assert done.returncode != 0 and "the features of 'train_001' cannot be read" in done.stdout + done.stderr
    ((_, record),) = iter_runs(tmp_path / "two")
    assert record["status"] == "failed" and "train_001.npz" in record["error"]
