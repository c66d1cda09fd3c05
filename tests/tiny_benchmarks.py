"""The files of LLaVA's benchmarks in its layout, two questions each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_llava import save_image

from dora_lab.tasks.visual_instruction.benchmarks import SHORT

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


def save_benchmarks(home: Path) -> Path:
    """LLaVA's playground/data/eval, in small; returns the folder."""
    rows: list[Any]
    for place in (
        "vqav2/test2015/{}.png",
        "gqa/data/images/{}.png",
        "vizwiz/test/{}.png",
        "vizwiz/val/{}.png",
        "textvqa/train_images/{}.png",
        "pope/val2014/{}.png",
        "scienceqa/images/test/{}/image.png",
        "vqav2/val2014/COCO_val2014_00000000000{}.jpg",
        "easy_vqa/val2014/COCO_val2014_00000000000{}.jpg",
    ):
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
    for file in ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"):
        (home / "easy_vqa" / file).write_bytes((home / "vqav2" / file).read_bytes())
    kinds = [{"question_id": n, "answers": said, "answer_type": kind} for n, kind in enumerate(("yes/no", "other"))]
    whole(home / "easy_vqa/v2_mscoco_val2014_annotations.json", {"annotations": kinds})
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
