"""The mini tier of visual_instruction: its rows and sweep, runs from end to end on an untrained base, its table."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import easy_vqa as easy_vqa_package
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from analysis import frame
from analysis.tables import visual_instruction as table
from dora_lab.evaluation import instructed
from dora_lab.evaluation.bounds import bounds
from dora_lab.forms.llava import Llava
from dora_lab.house import HOUSE
from dora_lab.io.errors import LoadError
from dora_lab.launch import select
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.mini.llava import families, pretrain, pretrain_chat, pretrain_vision
from dora_lab.models.llava import open_llava
from dora_lab.paper.registered import registered
from dora_lab.report.items import item_values
from dora_lab.runs import doctor
from dora_lab.runs.item_values import pack, unpack
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_rows
from dora_lab.spec import Data, Spec, SpecError, derive, validate
from dora_lab.tasks import easy_vqa, load_task, mini_llava, sources
from experiments import visual_instruction
from experiments.visual_instruction import MINI_TASKS, ROWS

FEW = {"optim.epochs": "0.02", "data.test_items": "12", "evaluation.batch_size": "12"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained, of the mini base's sizes."""
    place = tmp_path_factory.mktemp("base")
    tokenizer = pretrain_chat.make_tokenizer(500)
    torch.manual_seed(0)
    encoder = CLIPVisionModel(CLIPVisionConfig(**pretrain_vision.CONFIG))
    model = pretrain.join(encoder, pretrain_chat.make_model(len(tokenizer)), tokenizer)
    pretrain.save(model, tokenizer, place, {})
    return place


def small(row: str, blind: bool = False) -> Spec:
    made = visual_instruction.mini(row, 1e-3, 0)
    return derive(visual_instruction.blind(made) if blind else made, FEW)


def test_items_of_every_split() -> None:
    swept = visual_instruction.swept("dora", 1e-3, 100)
    found = sources.items(swept)
    assert found.counts() == {
        "train": {"image": families.SEEN, "text": families.TOLD}, "validation": {"vqav2_val": 256},
        "test": {"vqav2_val": 512},
    }  # fmt: skip
    files = {item["image"].read_bytes() for item in found.validation["vqav2_val"]}
    assert not files & {item["image"].read_bytes() for item in found.test["vqav2_val"]}
    tests = sources.items(visual_instruction.mini("dora", 1e-3, 0)).test
    assert {task: len(items) for task, items in tests.items()} == dict(
        zip(MINI_TASKS, (512, 512, 512, 384), strict=True)
    )


def test_a_source_is_known_by_its_pictures_too() -> None:
    shas = [mini_llava.sha256(name) for name in mini_llava.SOURCES]
    assert len({*shas}) == 2 and all(len(sha) == 64 for sha in shas)
    made = visual_instruction.mini("ft", 1e-3, 0)
    with pytest.raises(LoadError, match=r"content hash .*, the spec asks for 0000"):
        sources.items(derive(made, {"data.sha256": "0" * 64}))


def test_every_row_is_swept_alike_and_looks_at_what_it_is_trained_on_alone() -> None:
    specs = visual_instruction.sweep()
    rows = dict.fromkeys(((name, seed) for name in ROWS for seed in (100, 101, 102)), 5)
    assert Counter((one.method.name, one.seed) for one in specs) == rows
    assert {(one.evaluation.split, one.data.tasks) for one in specs} == {("validation", ("vqav2_val",))}
    for name, seed in rows:
        mine = [one for one in specs if (one.method.name, one.seed) == (name, seed)]
        grid = sorted(one.optim.learning_rate for one in mine)  # type: ignore[union-attr]
        assert [after / before for before, after in pairwise(grid)] == pytest.approx([3.0] * 4, rel=1e-3)
    for one in specs:  # the projector's own rate is the same in all
        assert one.optim is not None
        (pattern,) = one.optim.groups
        rate = one.optim.learning_rate * float(pattern.split("=")[1])
        assert rate == pytest.approx(visual_instruction.PROJECTOR_RATE, rel=1e-3)


def test_confirmation_has_every_row_a_base_and_the_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visual_instruction, "RATES", {})
    assert visual_instruction.confirmation() == [] and len(visual_instruction.reproduced()) == 2
    monkeypatch.setattr(visual_instruction, "RATES", dict.fromkeys(ROWS, 1e-3))
    made = Counter((one.method.name, one.data.name) for one in visual_instruction.confirmation())
    seen = dict.fromkeys(((name, "mini_llava") for name in ROWS), 10) | dict.fromkeys(
        ((name, "easy_vqa") for name in ROWS), 3
    )
    assert made == {**seen, ("base", "mini_llava"): 1, ("base", "easy_vqa"): 1, ("ft", "mini_llava_blind"): 3}
    assert [one.seed for one in visual_instruction.reproduced()] == [0, 0, 0]


def test_real_benchmarks_have_test_items_alone() -> None:
    validate(visual_instruction.swept("ft", 1e-3, 0))
    (paper, *_) = visual_instruction.paper()
    with pytest.raises(SpecError, match=r"evaluation.split = 'validation': must be test with llava"):
        derive(paper, {"evaluation.split": "validation"})


def test_what_is_claimed_is_of_its_rows() -> None:
    plan = registered("visual_instruction")
    assert plan is not None and plan.carrying == ("normalised", "answer_nll") and plan.tasks == MINI_TASKS
    ranks = {name: method.rank for name, method in ROWS.items()}
    assert all(ranks[term.method] == term.rank for claim in plan.claims for term in claim.terms)


def test_rows_from_start_to_end_and_their_table(base: Path, tmp_path: Path) -> None:
    """On an untrained base: nothing is right but what "Yes" says, POPE's F1 is that of one answer for all."""
    here = Paths(tmp_path, model_dir=base)
    specs = [small("ft"), small("dora"), small("ft", blind=True)]
    for made in specs:
        assert run_spec(made, here) == "complete"
        folder = run_path(tmp_path, made)
        record = read_record(folder)
        assert record["inputs"]["data"]["sha256"] == mini_llava.sha256(made.data.name)
        assert record["training"]["steps"] == 4  # three about pictures, one in prose
        rows = read_rows(folder, "eval")
        assert [row["task"] for row in rows] == [*MINI_TASKS]
        for row in rows:
            assert row["n"] == 12 and row["floor"] < row["ceiling"] == 1
            values = item_values(row, "normalised")
            assert (values * (1 - row["floor"]) + row["floor"]).tolist() == pytest.approx(
                item_values(row, "score").tolist(), abs=1e-6
            )
    assert list(doctor.examine(tmp_path)) == []
    assert run_spec(specs[0], here) == "skipped"
    table.build(tmp_path)
    text = (tmp_path / "tables" / "visual_instruction.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    shown = [dict(zip(lines[0], line, strict=True)) for line in lines[2:7]]
    assert [row["Method"].split(" ")[0] for row in shown] == ["FT", "DoRA", "Blind", "floor", "ceiling"]
    heads = ["mini-VQA", "mini-VizWiz", "mini-SQA", "mini-POPE"]
    assert [head for head in lines[0] if head.startswith("mini-")] == heads
    ours = pd.DataFrame(read_rows(run_path(tmp_path, specs[1]), "eval")).to_dict("records")
    wanted = 100 * np.mean([item_values(row, "normalised").mean() for row in ours])  # type: ignore[arg-type]
    assert shown[1]["Normalised"].replace("−", "-") == f"{wanted:.1f}"
    assert "The paper's table 12" in text
    by_task = text.partition("answer NLL by task")[2].splitlines()
    line = next(line for line in by_task if line.startswith("| DoRA"))  # the paper's come later
    wanted = [f"{row['answer_nll']:.3f}" for row in ours]
    assert [cell.strip().split(" ")[0] for cell in line.strip("|").split("|")[1:5]] == wanted
    of_mean = text.partition("normalised by task")[2].splitlines()
    line = next(line for line in of_mean if line.startswith("| DoRA")).replace("−", "-")
    wanted = [f"{100 * item_values(row, 'normalised').mean():.1f}" for row in ours]  # type: ignore[arg-type]
    assert [cell.strip() for cell in line.strip("|").split("|")[1:5]] == wanted
    line = next(line for line in of_mean if line.startswith("| floor"))
    assert [cell.strip() for cell in line.strip("|").split("|")[1:5]] == [f"{100 * row['floor']:.1f}" for row in ours]


def of_task(task: str, method: str, seed: int, right: int) -> dict[str, object]:
    """A row of the stream eval: of 20 items so many right, floor one half."""
    score = pack("score", np.arange(20) < right)
    told: dict[str, object] = {"task": task, "method": method, "label": method, "seed": seed, "floor": 0.5}
    return told | {"ceiling": 1.0, "n": 20, "per_item": {"score": score}}


def test_a_task_at_its_floor_in_every_row_is_found() -> None:
    """LoRA's POPE is above it in the mean, not by twice its standard error; FT's SQA is; a base is no row."""
    rights = {("pope", "ft"): (10, 10, 10), ("pope", "lora"): (9, 10, 13), ("science_qa", "ft"): (12, 12, 13)}
    rights |= {("science_qa", "lora"): (10, 10, 10), ("pope", "base"): (20, 20, 20)}
    rows = [of_task(*at, seed, right) for at, all_ in rights.items() for seed, right in enumerate(all_)]
    assert table.at_floor(pd.DataFrame(rows), ["pope", "science_qa"]) == ["pope"]


def test_no_task_that_is_registered_is_at_its_floor() -> None:
    evals = frame(HOUSE / "results", "visual_instruction")
    rows = evals[(evals["data"] == "mini_llava") & (evals["split"] == "test")]
    plan = registered("visual_instruction")
    assert plan is not None and {*plan.tasks} == {*MINI_TASKS} - {*table.at_floor(rows, MINI_TASKS)}


@pytest.fixture(scope="module")
def second() -> sources.Items:
    return sources.items(visual_instruction.easy(visual_instruction.mini("ft", 1e-3, 0)))


def test_the_second_source_is_what_the_package_gives(second: sources.Items) -> None:
    asked = easy_vqa_package.get_test_questions()
    truth = Counter((image, question, answer) for question, answer, image in zip(*asked, strict=True))
    held = sources.items(
        derive(visual_instruction.easy(visual_instruction.swept("ft", 1e-3, 0)), {"data.test_items": None})
    )
    assert sum(map(len, held.test.values())) == sum(truth.values()) == 9673
    for task, items in held.test.items():
        for item in items:
            (answer,) = {*item["answers"]}
            assert (answer in ("yes", "no")) == (task == "easy_vqa_yes_no")
            _, question, how = item["text"].split("\n")
            picture = int(item["image"].stem.rsplit("_", 1)[1])
            truth[picture, question, answer] -= 1
            assert how == "Answer the question using a single word or phrase."
    assert not any(truth.values())
    paths = easy_vqa_package.get_test_image_paths()
    for item in held.test["easy_vqa_other"][::97]:
        assert item["image"].read_bytes() == Path(paths[int(item["image"].stem.rsplit("_", 1)[1])]).read_bytes()
    # trained and held out: every question of the package's training part once
    every = Counter((image, q, a) for q, a, image in zip(*easy_vqa_package.get_train_questions(), strict=True))
    bare = [
        (int(item["id"]), [(q.removeprefix("<image>\n").split("\n")[0], a) for q, a in item["turns"]])
        for item in held.train["image"]
    ]
    every.subtract((picture, q, a) for picture, turns in bare for q, a in turns)
    assert sum(every.values()) == len(+every) == 38575 - sum(len(turns) for _, turns in bare)
    assert {picture for picture, _, _ in +every}.isdisjoint(picture for picture, _ in bare)
    swept = {item["image"].read_bytes() for pool in held.validation.values() for item in pool}
    assert len(second.train["image"]) == 3500 and held.validation
    assert {item["image"].stem for item in second.train["image"]}.isdisjoint(str(picture) for picture, _, _ in +every)
    assert len(swept) > 100


def test_what_can_be_said_of_the_second_source_without_looking(second: sources.Items) -> None:
    given: dict[str, Counter[str]] = {}
    for item in second.train["image"]:
        for question, answer in item["turns"]:
            given.setdefault(question.removeprefix("<image>\n").split("\n")[0], Counter())[answer] += 1
    for task, items in second.test.items():
        right = [given[item["text"].split("\n")[1]].most_common(1)[0][0] == item["answers"][0] for item in items]
        assert bounds("easy_vqa", load_task(task), "test", items) == {"floor": np.mean(right), "ceiling": 1.0}


def test_without_the_package_the_second_source_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"not installed: pip install easy-vqa==1\.0"):
        sources.items(visual_instruction.easy(visual_instruction.mini("ft", 1e-3, 0)))


def test_the_second_source_from_start_to_end_and_its_block(base: Path, tmp_path: Path) -> None:
    here = Paths(tmp_path, model_dir=base)
    first = derive(visual_instruction.easy(visual_instruction.mini("dora", 1e-3, 0)), FEW | {"optim.epochs": "0.01"})
    for made in (first, visual_instruction.untrained(first)):
        assert run_spec(made, here) == "complete"
    table.build(tmp_path)
    text = (tmp_path / "tables" / "visual_instruction.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    shown = {row[0].split(" ")[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:5]}
    assert [*shown] == ["Base", "DoRA", "floor"] and "easy_vqa" in text
    rows = {row["task"]: row for row in read_rows(run_path(tmp_path, first), "eval")}
    for row, key in ((shown["DoRA"], "value"), (shown["floor"], "floor")):
        whole = (7136 * rows["easy_vqa_yes_no"][key] + 2537 * rows["easy_vqa_other"][key]) / 9673
        assert float(row["Whole"]) == pytest.approx(100 * whole, abs=0.06)


def test_an_answer_is_likely_however_its_first_letter_is_written(base: Path, tmp_path: Path) -> None:
    """Files have "yes" and "unanswerable", training "Yes": metrics count both, so that both are one likelihood."""
    made = visual_instruction.untrained(small("ft"))
    assert run_spec(made, Paths(tmp_path, model_dir=base)) == "complete"
    found = {
        row["task"]: unpack("answer_nll", row["per_item"]["answer_nll"])
        for row in read_rows(run_path(tmp_path, made), "eval")
    }
    model, processor = open_llava(base)
    form = Llava(processor)
    small_letters = 0
    for task, pool in sources.items(made).test.items():
        for item, nll in zip(pool, found[task], strict=True):
            right = Counter(item["answers"]).most_common(1)[0][0] if "answers" in item else item["answer"].capitalize()
            writings = {right, right.capitalize(), right.lower()} if "answers" in item else {right}
            small_letters += len(writings) - 1
            logs, tokens = zip(
                *(likelihood(model, form, item, made.data, text) for text in sorted(writings)), strict=True
            )
            per_token = -np.logaddexp.reduce(logs) / min(tokens)
            assert nll == pytest.approx(per_token, rel=2e-3), (task, right)
    assert small_letters > 12
    nats, tokens = instructed._any([(2.5, 3), (2.0, 4)])  # untrained, one writing has all but the whole likelihood
    assert (nats, tokens) == (pytest.approx(-np.log(np.exp(-2.5) + np.exp(-2.0))), 3)


def likelihood(model: Any, form: Llava, item: Any, data: Data, answer: str) -> tuple[float, int]:
    """log p of an answer, and its tokens: the logits of one forward pass, read by hand."""
    batch = form.collate(
        form.encode({"a": [{**item, "turns": [(item["text"], answer)]}]}, replace(data, cutoff=4096)).examples
    )
    labels = batch.pop("labels")[0].tolist()
    with torch.no_grad():
        logs = torch.log_softmax(model.eval()(**batch).logits[0].double(), -1)
    at = [place for place, label in enumerate(labels) if label >= 0]
    return sum(float(logs[place - 1, labels[place]]) for place in at), len(at)


def test_a_swept_run_is_scored_on_validation_items(base: Path, tmp_path: Path) -> None:
    made = derive(visual_instruction.swept("lora", 1e-3, 100), {"optim.epochs": "0.01", "data.validation_items": "16"})
    assert run_spec(made, Paths(tmp_path, model_dir=base)) == "complete"
    (row,) = read_rows(run_path(tmp_path, made), "eval")
    assert (row["task"], row["n"]) == ("vqav2_val", 16)
    assert row["floor"] < row["ceiling"] == 1
    assert row["answer_nll"] > 0


def test_a_folder_is_not_ignored_where_the_pictures_are_the_labs(tmp_path: Path) -> None:
    (made, *_) = visual_instruction.sweep()
    with pytest.raises(SpecError, match=r"--data-dir .*: mini runs read pictures of their own; choose --tier paper"):
        select._with_data(made, tmp_path)
