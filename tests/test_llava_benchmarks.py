"""The seven benchmarks of LLaVA on files in its layout: items, prompts, scores, and what goes to servers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llava import save_image

from dora_lab.evaluation.submissions import write_mmbench, write_vizwiz, write_vqav2
from dora_lab.metrics import ScoreError, score
from dora_lab.tasks import ItemError
from dora_lab.tasks.llava_benchmarks import BENCHMARKS, LETTER, SHORT, gold, read

GQA, MMBENCH = "gqa/llava_gqa_testdev_balanced.jsonl", "mmbench/mmbench_dev_20230712.tsv"
VQA, TEXT_VQA = "vqav2/v2_mscoco_val2014_annotations.json", "textvqa/llava_textvqa_val_v051_ocr.jsonl"
SCIENCE = "scienceqa/problems.json"
ONE_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def lines(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def whole(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def asked(names: list[Any], image: str, text: str) -> list[dict[str, Any]]:
    return [
        {"question_id": name, "image": image.format(number), "text": f"{text} {number}?\n{SHORT}"}
        for number, name in enumerate(names)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LLaVA's playground/data/eval, in small."""
    home = tmp_path / "eval"
    rows: list[Any]
    for place in ("vqav2/test2015/{}.png", "gqa/data/images/{}.png", "vizwiz/test/{}.png", "vizwiz/val/{}.png",
                  "textvqa/train_images/{}.png", "pope/val2014/{}.png", "scienceqa/images/test/{}/image.png",
                  "vqav2/val2014/COCO_val2014_00000000000{}.jpg"):  # fmt: skip
        for number in range(2):
            save_image(home / place.format(number), "red")
    lines(home / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", asked([7, 8], "{}.png", "What"))
    lines(home / "vqav2/llava_vqav2_mscoco_test2015.jsonl", asked([6, 7, 8], "0.png", "What"))
    said = [{"answer": "Two"}] * 9 + [{"answer": "3"}]
    whole(
        home / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{"question_id": n, "image_id": n, "question": f"How many {n}?"} for n in range(2)]},
    )
    whole(home / VQA,
          {"annotations": [{"question_id": n, "answers": said} for n in range(2)]})  # fmt: skip
    lines(home / GQA, asked(["201", "202"], "{}.png", "Where"))
    whole(home / "gqa/data/testdev_balanced_questions.json", {"201": {"answer": "left"}, "202": {"answer": "no"}})
    lines(home / "vizwiz/llava_test.jsonl", asked([0, 1], "{}.png", "Which"))
    whole(home / "vizwiz/val.json", [{"image": "0.png", "question": "Which?", "answers": [{"answer": "a cat"}] * 10}])
    said = ["<image>\nWhich?\nA. x\nB. y", "Why?\nA. x\nB. y\nC. z"]
    rows = [{"id": str(4 + n), "conversations": [{"from": "human", "value": said[n]}]} for n in range(2)]
    rows[0]["image"] = "0/image.png"
    whole(home / "scienceqa/llava_test_CQM-A.json", rows)
    whole(
        home / SCIENCE,
        {"4": {"choices": ["x", "y"], "answer": 1}, "5": {"choices": ["x", "y", "z"], "answer": 2}},
    )
    whole(home / "scienceqa/pid_splits.json", {"test": ["4", "5"], "train": []})
    text = [f"What is written?\nReference OCR token: STOP, 5\n{SHORT}", f"What next?\n{SHORT}"]
    lines(
        home / TEXT_VQA,
        [{"question_id": "img0", "image": "0.png", "text": one, "category": "default"} for one in text],
    )
    whole(home / "textvqa/TextVQA_0.5.1_val.json", {"data": [
        {"image_id": "img0", "question_id": 34602, "question": "What is WRITTEN?", "answers": ["stop"] * 10},
        {"image_id": "img0", "question_id": 34603, "question": "what next?", "answers": ["5"] * 10}]})  # fmt: skip
    pope, number = [], 0
    for category in ("adversarial", "popular", "random"):
        labels = []
        for part in range(2):
            question = f"Is there a cat {part}?"
            pope.append(
                {"question_id": number, "image": f"{part}.png", "text": f"{question}\n{SHORT}", "category": category}
            )
            labels.append(
                {"question_id": part + 1, "image": f"{part}.png", "text": question, "label": ("yes", "no")[part]}
            )
            number += 1
        lines(home / f"pope/coco/coco_pope_{category}.json", labels)
    lines(home / "pope/llava_pope_test.jsonl", pope)
    save_mmbench(home / MMBENCH)
    return home


COLUMNS = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]


def save_mmbench(file: Path, **change: Any) -> None:
    rows = []
    for turn, (first, second) in enumerate((("red", "=1"), ("=1", "red"))):
        rows.append({
            "index": 3 + turn * 1_000_000, "question": "Which?", "hint": "Look." if turn else "", "A": first,
            "B": second, "answer": "AB"[turn], "category": "c", "image": ONE_PIXEL, "source": "s", "l2-category": "l",
            "split": "dev",
        })  # fmt: skip
    rows[0] |= change
    text = ["\t".join(COLUMNS), *("\t".join(str(row.get(name, "")) for name in COLUMNS) for row in rows)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n", encoding="utf-8")


RIGHT: dict[str, dict[str, str]] = {
    "vqav2_val": {"0": "2", "1": "three"},
    "gqa": {"201": "Left.", "202": "yes"},
    "vizwiz_val": {"0.png": "cat"},
    "science_qa": {"4": "B", "5": "A"},
    "text_vqa": {"34602": "STOP", "34603": "6"},
    "pope": {str(number): ("Yes, there is.", "No")[number % 2] for number in range(5)} | {"5": "yes"},
    "mmbench": {"3": "A", "1000003": "red"},
}
# by hand: of "three" one of ten annotators says so; of POPE's random ones F1 is 2 / 3
SUMMARY: dict[str, dict[str, float]] = {
    "vqav2_val": {"accuracy": (0.0 + 0.3) / 2},  # as released: an annotator's "Two" is matched by nothing
    "gqa": {"accuracy": 0.5},
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
}


@pytest.mark.parametrize("name", RIGHT)
def test_files_are_read_and_answers_scored(name: str, folder: Path) -> None:
    items = read(name, folder)
    metric = BENCHMARKS[name].metric
    assert metric is not None
    found = score(metric, gold(items), RIGHT[name], name)
    assert found.summary == pytest.approx(SUMMARY[name])
    for item in items:
        assert item["text"].count("<image>") == item["text"].startswith("<image>\n") == (item["image"] is not None)


def test_the_prompts_to_the_letter(folder: Path) -> None:
    first = {name: read(name, folder)[0]["text"] for name in BENCHMARKS}
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


def change_line(file: Path, **change: Any) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines(file, [rows[0] | change, *rows[1:]])


def cut(file: Path) -> None:
    file.write_text(file.read_text()[:-20])


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        (
            "gqa",
            lambda home: change_line(home / GQA, image="9.png"),
            r"balanced\.jsonl, line 1, field 'image': .*9\.png does not exist",
        ),
        (
            "gqa",
            lambda home: change_line(home / GQA, question_id="9"),
            r"line 1: question '9' is not in .*testdev_balanced_questions",
        ),
        ("gqa", lambda home: change_line(home / GQA, text="<image> Where?"), "holds <image>"),
        ("gqa", lambda home: cut(home / GQA), r"line 2: broken or truncated"),
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
            "question 1 is not in the annotations",
        ),
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
    with pytest.raises(ScoreError, match=r"row 2: .* holds a sign that no cell can"):
        write_mmbench(folder / "no.xlsx", {"3": "\x00", "1000003": "B"}, table)
    assert not (folder / "no.xlsx").exists()
