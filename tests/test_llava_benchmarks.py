"""The seven benchmarks of LLaVA on files in its layout: items, prompts, scores, and what goes to servers."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_benchmarks import GQA, MMBENCH, ONE_PIXEL, SCIENCE, TEXT_VQA, VQA, lines, save_benchmarks, save_mmbench, whole

from dora_lab.evaluation.submissions import write_mmbench, write_vizwiz, write_vqav2
from dora_lab.metrics import ScoreError, score
from dora_lab.tasks import ItemError, family, load_task
from dora_lab.tasks.visual_instruction.benchmarks import EVERY, FILES, LETTER, SHORT, TASKS, every_question, gold


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_benchmarks(tmp_path / "eval")


def read(name: str, folder: Path) -> list[dict[str, Any]]:
    found = load_task(name).read
    assert found is not None and found(folder, "train") == []
    return found(folder, "test")


RIGHT: dict[str, dict[str, str]] = {
    "vqav2_val": {"0": "2", "1": "three"},
    "gqa_testdev": {"201": "Left.", "202": "yes"},
    "vizwiz_val": {"0.png": "cat"},
    "science_qa": {"4": "B", "5": "A"},
    "text_vqa": {"34602": "STOP", "34603": "6"},
    "pope": {str(number): ("Yes, there is.", "No")[number % 2] for number in range(5)} | {"5": "yes"},
    "mmbench": {"3": "A", "1000003": "red"},
    "easy_vqa_yes_no": {"0": "3"},
    "easy_vqa_other": {"1": "2"},
}
# by hand: of "three" one of ten annotators says so; of POPE's random ones F1 is 2 / 3
SUMMARY: dict[str, dict[str, float]] = {
    "vqav2_val": {"accuracy": (0.0 + 0.3) / 2},  # as released: an annotator's "Two" is matched by nothing
    "gqa_testdev": {"accuracy": 0.5},
    "vizwiz_val": {"accuracy": 1.0},
    "science_qa": {"accuracy": 0.5, "accuracy_image": 1.0},
    "text_vqa": {"accuracy": 0.5},
    "pope": {
        "accuracy": 5 / 6,
        "f1": (1 + 1 + 2 / 3) / 3,
        "f1_random": 2 / 3,
        "f1_popular": 1.0,
        "f1_adversarial": 1.0,
    },
    "mmbench": {"circular": 1.0, "vanilla": 1.0},
    "easy_vqa_yes_no": {"accuracy": 0.3},
    "easy_vqa_other": {"accuracy": 0.0},
}


@pytest.mark.parametrize("name", RIGHT)
def test_files_are_read_and_answers_scored(name: str, folder: Path) -> None:
    items = read(name, folder)
    (metric,) = load_task(name).metrics
    found = score(metric, gold(items), RIGHT[name], name)
    assert found.summary == pytest.approx(SUMMARY[name])
    for item in items:
        assert item["text"].count("<image>") == item["text"].startswith("<image>\n") == (item["image"] is not None)


def test_the_prompts_to_the_letter(folder: Path) -> None:
    first = {name: read(name, folder)[0]["text"] for name in FILES}
    assert first["vqav2_test_dev"] == f"<image>\nWhat 0?\n{SHORT}"
    assert first["vqav2_val"] == f"<image>\nHow many 0?\n{SHORT}"
    assert first["vizwiz_val"] == (
        "<image>\nWhich?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    assert first["science_qa"] == f"<image>\nWhich?\nA. x\nB. y\n{LETTER}"
    assert read("science_qa", folder)[1]["text"] == f"Why?\nA. x\nB. y\nC. z\n{LETTER}"
    assert first["mmbench"] == f"<image>\nWhich?\nA. red\nB. =1\n{LETTER}"
    assert read("mmbench", folder)[1]["text"] == f"<image>\nLook.\nWhich?\nA. =1\nB. red\n{LETTER}"
    assert base64.b64encode(read("mmbench", folder)[0]["image"]).decode() == ONE_PIXEL


def test_each_is_read_from_its_files_alone(folder: Path, tmp_path: Path) -> None:
    """What a run's hash of the data is over is what is read."""
    assert [*FILES] == [task.name for task in TASKS] and {*TASKS} == {*family("visual_instruction")}
    for name, files in FILES.items():
        for gone in (None, *files):
            home = tmp_path / f"{name} {gone and Path(gone).name}"
            shutil.copytree(folder, home)
            for file in home.rglob("*.*"):
                place = file.relative_to(home).as_posix()
                if file.suffix not in (".png", ".jpg") and (place not in files or place == gone):
                    file.unlink()
            if gone is None:
                assert read(name, home) and (name != "vqav2_test_dev" or every_question(home) == ["6", "7", "8"])
            else:
                with pytest.raises(ItemError, match=f"{Path(gone).name}.* cannot be read"):
                    every_question(home) if gone == EVERY else read(name, home)


VQA_ASKED = "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"


def change_line(file: Path, **change: Any) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines(file, [rows[0] | change, *rows[1:]])


def cut(file: Path) -> None:
    file.write_text(file.read_text()[:-20])


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        (
            "gqa_testdev",
            lambda home: change_line(home / GQA, image="9.png"),
            r"balanced\.jsonl, line 1, field 'image': .*9\.png does not exist",
        ),
        (
            "gqa_testdev",
            lambda home: change_line(home / GQA, question_id="9"),
            r"line 1: question '9' is not in .*testdev_balanced_questions",
        ),
        ("gqa_testdev", lambda home: change_line(home / GQA, text="<image> Where?"), "holds <image>"),
        ("gqa_testdev", lambda home: cut(home / GQA), r"line 2: broken or truncated"),
        (
            "pope",
            lambda home: change_line(home / "pope/coco/coco_pope_random.json", text="Is there a dog?"),
            r"coco_pope_random\.json, line 1: is of another question",
        ),
        (
            "pope",
            lambda home: lines(home / "pope/coco/coco_pope_popular.json", [{}]),
            "1 answers to 2 questions 'popular'",
        ),
        (
            "text_vqa",
            lambda home: change_line(home / TEXT_VQA, question_id="img9"),
            "question 'what is written\\?' about img9; fetch both",
        ),
        (
            "science_qa",
            lambda home: whole(home / "scienceqa/pid_splits.json", {"test": ["4", "5", "6"]}),
            "1 test questions are not in it, '6' is",
        ),
        (
            "science_qa",
            lambda home: whole(home / SCIENCE, {"4": {"choices": ["x"], "answer": 1}, "5": {}}),
            "answer 1 is no choice",
        ),
        (
            "vqav2_val",
            lambda home: whole(home / VQA, {"annotations": [{"question_id": 0, "answers": ["2"]}]}),
            "question '1' is not in the annotations",
        ),
        (
            "vqav2_val",
            lambda home: whole(home / VQA, {"annotations": [{"question_id": [0], "answers": ["2"]}]}),
            r"annotation 0, field 'question_id': expected a number or a text, got \[0\]",
        ),
        (
            "vqav2_val",
            lambda home: whole(
                home / VQA_ASKED,
                {"questions": [{"question_id": {}, "image_id": 0, "question": "How?"}]},
            ),
            r"question 0, field 'question_id': expected",
        ),
        (
            "science_qa",
            lambda home: whole(home / "scienceqa/llava_test_CQM-A.json", [{"id": "4", "conversations": 7}]),
            "item 0, field 'value': expected a text",
        ),
        (
            "science_qa",
            lambda home: whole(home / SCIENCE, {"4": [], "5": {}}),
            r"problems\.json, 4: \[\] is no object",
        ),
        (
            "gqa_testdev",
            lambda home: change_line(home / GQA, image="a" * 300),
            "is longer than a file's name can be",
        ),
        ("gqa_testdev", lambda home: change_line(home / GQA, text="Where\ud800?"), "line 1: half a character"),
        (
            "vizwiz_val",
            lambda home: whole(home / "vizwiz/val.json", [{"image": "0.png", "question": "W?"}]),
            r"val\.json, item 0, field 'answers'",
        ),
        ("mmbench", lambda home: save_mmbench(home / MMBENCH, image="?"), "line 2: 'image' is no base64"),
        ("mmbench", lambda home: (home / MMBENCH).unlink(), "cannot be read"),
        ("vizwiz_test", lambda home: (home / "vizwiz/llava_test.jsonl").unlink(), "cannot be read"),
    ],
)
def test_files_that_are_not_what_they_should_be(
    name: str, harm: Callable[[Path], Any], message: str, folder: Path
) -> None:
    harm(folder)
    with pytest.raises(ItemError, match=message):
        read(name, folder)


def test_a_lost_rotation_is_no_easier_benchmark(folder: Path) -> None:
    items = gold(read("mmbench", folder))[:1]
    with pytest.raises(ScoreError, match="question 3 has 2 options, so it needs the rows"):
        score("mmbench", items, {"3": "A"}, "mmbench")


# --- what goes to servers


def test_submissions_of_short_answers(folder: Path) -> None:
    asked_of, every = ([item["id"] for item in read("vqav2_test_dev", folder)], ["6", "7", "8"])
    file = write_vqav2(folder / "vqav2.json", {"7": "The two cats, please.", "8": "Yes"}, asked_of, every)
    found = [(row["question_id"], row["answer"]) for row in json.loads(file.read_text())]
    assert found == [(6, ""), (7, "2 cats please"), (8, "yes")]
    images = {item["id"]: item["image"].name for item in read("vizwiz_test", folder)}
    file = write_vizwiz(folder / "vizwiz.json", {"0": "Unanswerable", "1": "a dog"}, images)
    assert json.loads(file.read_text()) == [
        {"image": "0.png", "answer": "unanswerable"},
        {"image": "1.png", "answer": "dog"},
    ]
    for outputs, message in (({"7": "a"}, "1 questions have no answer, the first is '8'"),
                             ({"7": "a", "8": "b", "9": "c"}, "'9' was not asked")):  # fmt: skip
        with pytest.raises(ScoreError, match=message):
            write_vqav2(folder / "no.json", outputs, asked_of, every)
    with pytest.raises(ScoreError, match="question '7' is not in the test set"):
        write_vqav2(folder / "no.json", {"7": "a", "8": "b"}, asked_of, ["8"])
    assert not (folder / "no.json").exists()


def test_the_sheet_for_mmbench(folder: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    table = folder / MMBENCH
    file = write_mmbench(folder / "mmbench.xlsx", {"3": "A", "1000003": "=B"}, table)
    rows = list(openpyxl.load_workbook(file).active.values)
    assert rows == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (3, "Which?", "red", "=1", None, None, "A", "A", "dev"),
        (1000003, "Which?", "=1", "red", None, None, "=B", "B", "dev"),
    ]
    assert openpyxl.load_workbook(file).active["G3"].data_type == "s"  # no formula
    odd = "A\x00\x07\n\uffff _x0007_"  # what no cell can hold, as the format has it, and what would be read as that
    write_mmbench(file, {"3": odd, "1000003": "B"}, table)
    assert openpyxl.load_workbook(file).active["G2"].value == "A_x0000__x0007_\n_xFFFF_ _x005F_x0007_"
