"""The benchmarks of LLaVA-1.5 that table 12 has, from the files that LLaVA lays out. Imports no torch.

A folder is LLaVA's ``playground/data/eval``: its ``eval.zip``, with the images and annotations that
``docs/Evaluation.md`` names beside. An item is {"id", "image": Path, bytes or None, "text": what is asked, an image's
begins with ``<image>`` and a line end, "where"}, and beside these what its metric reads (`metrics.score`). VQAv2
test-dev and VizWiz test have no answers: what is said there goes to their servers (`evaluation.submissions`), and is
scored here on their validation sets, under names of their own.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dora_lab.tasks.conversations import IMAGE, Item, image_file, read_json, read_lines
from dora_lab.tasks.items import ItemError
from dora_lab.tasks.task import Task

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTERS = "ABCDE"
EVERY = "vqav2/llava_vqav2_mscoco_test2015.jsonl"  # all of VQAv2's test questions
POPE = ("random", "popular", "adversarial")
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"  # VQA's own names of its validation set
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
PICTURE = "COCO_val2014_{:012}.jpg"
EASY, YES_NO = "easy_vqa", "yes/no"  # a folder (`tasks.easy_vqa`); the type of an answer, VQA's word


def _asked(file: Path, images: Path) -> list[Item]:
    """The questions of one of LLaVA's files: a line each, {"question_id", "image", "text"}."""
    items = []
    for number, row in enumerate(read_lines(file), start=1):
        at = f"{file}, line {number}"
        text = _text(row, "text", at)
        if IMAGE in text:
            raise ItemError(f"{at}, field 'text': holds {IMAGE}, which is put in front here; take it out")
        name = _id(row, at)
        image = image_file(images, row.get("image"), f"{at}, field 'image'")
        items.append({"id": name, "image": image, "text": f"{IMAGE}\n{text}", "where": at, "row": row})
    if not items:
        raise ItemError(f"{file}: no questions in it; fetch it again")
    return items


def vqav2_test_dev(folder: Path) -> list[Item]:
    """VQAv2 test-dev: no answers."""
    return _asked(folder / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", folder / "vqav2" / "test2015")


def vqav2_val(folder: Path) -> list[Item]:
    """VQAv2's validation set, from VQA's own files."""
    return _vqa(folder / "vqav2")


def easy_vqa_yes_no(folder: Path) -> list[Item]:
    """The questions of easy-vqa whose answer is yes or no."""
    return _vqa(folder / EASY, lambda kind: kind == YES_NO)


def easy_vqa_other(folder: Path) -> list[Item]:
    """All others: a colour or a shape."""
    return _vqa(folder / EASY, lambda kind: kind != YES_NO)


def _vqa(home: Path, taken: Callable[[Any], bool] = lambda kind: True) -> list[Item]:
    """Questions whose type of answer is taken, from a folder with VQA's files."""
    answers, items = {}, []
    file = home / ANNOTATIONS
    for number, row in enumerate(_list(file, "annotations")):
        at = f"{file}, annotation {number}"
        answers[_id(row, at)] = _said(row, at), taken(row.get("answer_type"))
    file = home / QUESTIONS
    for number, row in enumerate(_list(file, "questions")):
        at = f"{file}, question {number}"
        if (name := _id(row, at)) not in answers:
            raise ItemError(f"{at}: question '{name:.80}' is not in the annotations; fetch both again")
        said, mine = answers[name]
        if not mine:
            continue
        if not isinstance(picture := row.get("image_id"), int):
            raise ItemError(f"{at}, field 'image_id': expected a number, got {picture!r:.80}; fetch it again")
        image = image_file(home / "val2014", PICTURE.format(picture), f"{at}, field 'image_id'")
        text = f"{IMAGE}\n{_text(row, 'question', at)}\n{SHORT}"
        items.append({"id": name, "image": image, "text": text, "where": at, "answers": said})
    return items


def gqa(folder: Path) -> list[Item]:
    """GQA test-dev, balanced."""
    items = _asked(folder / "gqa" / "llava_gqa_testdev_balanced.jsonl", folder / "gqa" / "data" / "images")
    file = folder / "gqa" / "data" / "testdev_balanced_questions.json"
    answers = _object(file)
    return [item | {"answer": _text(_known(answers, item, file), "answer", f"{file}, {item['id']}")} for item in items]


def vizwiz_test(folder: Path) -> list[Item]:
    """VizWiz test: no answers."""
    return _asked(folder / "vizwiz" / "llava_test.jsonl", folder / "vizwiz" / "test")


def vizwiz_val(folder: Path) -> list[Item]:
    """VizWiz's validation set, from its own file, asked as LLaVA asks the test set."""
    file, items = folder / "vizwiz" / "val.json", []
    for number, row in enumerate(_listed(read_json(file), str(file))):
        at = f"{file}, item {number}"
        image = image_file(folder / "vizwiz" / "val", row.get("image"), f"{at}, field 'image'")
        text = f"{IMAGE}\n{_text(row, 'question', at)}\n{UNANSWERABLE}\n{SHORT}"
        items.append({"id": image.name, "image": image, "text": text, "where": at, "answers": _said(row, at)})
    return items


def science_qa(folder: Path) -> list[Item]:
    """ScienceQA's test questions, with an image or without."""
    home, items = folder / "scienceqa", []
    problems = _object(home / "problems.json")
    test = _object(home / "pid_splits.json").get("test")
    if not isinstance(test, list):
        raise ItemError(f"{home / 'pid_splits.json'}: no list 'test' in it; fetch it again")
    file = home / "llava_test_CQM-A.json"
    for number, row in enumerate(_listed(read_json(file), str(file))):
        at, name = f"{file}, item {number}", str(row.get("id"))
        if name not in problems or name not in test:
            raise ItemError(
                f"{at}: '{name}' is no test question of problems.json and pid_splits.json; fetch them again"
            )
        said = row.get("conversations")
        first = said[0] if isinstance(said, list) and said else None
        text = f"{_text(first, 'value', at).replace(IMAGE, '').strip()}\n{LETTER}"
        image = row.get("image")
        problem = problems[name]
        if not isinstance(problem, dict):
            raise ItemError(f"{home / 'problems.json'}, {name}: {problem!r:.80} is no object; fetch it again")
        choices, right = problem.get("choices"), problem.get("answer")
        if not isinstance(choices, list) or not isinstance(right, int) or not 0 <= right < len(choices) <= len(LETTERS):
            raise ItemError(f"{home / 'problems.json'}, {name}: answer {right!r:.80} is no choice; fetch it again")
        items.append({
            "id": name, "image": None if image is None else image_file(home / "images" / "test", image, at),
            "text": text if image is None else f"{IMAGE}\n{text}", "where": at,
            "answer": LETTERS[right], "letters": LETTERS[: len(choices)],
        })  # fmt: skip
    if missing := {*map(str, test)} - {item["id"] for item in items}:
        raise ItemError(f"{file}: {len(missing)} test questions are not in it, '{min(missing)}' is; fetch it again")
    return items


def text_vqa(folder: Path) -> list[Item]:
    """TextVQA's validation set, with the words that an OCR found."""
    home = folder / "textvqa"
    items = _asked(home / "llava_textvqa_val_v051_ocr.jsonl", home / "train_images")
    file = home / "TextVQA_0.5.1_val.json"
    known: dict[tuple[str, str], tuple[Any, list[str]]] = {}
    for number, row in enumerate(_list(file, "data")):
        at = f"{file}, item {number}"
        key = str(row.get("image_id")), _text(row, "question", at).lower()
        known[key] = row.get("question_id"), _said(row, at)
    found = []
    for item in items:
        key = item["id"], _question(item["row"]["text"]).lower()
        if key not in known:
            raise ItemError(
                f"{item['where']}: {file.name} has no question {key[1]!r:.80} about {key[0]}; fetch both again"
            )
        name, answers = known[key]
        found.append(item | {"id": str(name), "answers": answers})
    return found


def _question(text: str) -> str:
    """The question in a prompt of LLaVA's: its first line, or the second behind the words that were read."""
    lines = text.split("\n")
    return lines[1] if text.startswith("Reference OCR token:") and len(lines) > 1 else lines[0]


def pope(folder: Path) -> list[Item]:
    """POPE on COCO: random, popular and adversarial questions, the answers of each in a file, in the same order."""
    home, found = folder / "pope", []
    file = home / "llava_pope_test.jsonl"
    items = _asked(file, home / "val2014")
    for category in dict.fromkeys(str(item["row"].get("category")) for item in items):
        if category not in POPE:
            raise ItemError(f"{file}: category '{category:.80}' is none of {', '.join(POPE)}; fetch it again")
        mine = [item for item in items if item["row"].get("category") == category]
        file = home / "coco" / f"coco_pope_{category}.json"
        labels = read_lines(file)
        if len(labels) != len(mine):
            raise ItemError(f"{file}: {len(labels)} answers to {len(mine)} questions '{category}'; fetch both again")
        for number, (item, label) in enumerate(zip(mine, labels, strict=True), start=1):
            at = f"{file}, line {number}"
            asked = _text(label, "text", at)
            if label.get("image") != item["row"]["image"] or not item["row"]["text"].startswith(asked):
                raise ItemError(f"{at}: is of another question than {item['where']}; fetch both again")
            found.append(item | {"answer": _text(label, "label", at), "category": category})
    return found


def mmbench(folder: Path) -> list[Item]:
    """MMBench's development set: rows of one question are its options in every rotation."""
    import pandas as pd

    file, items = folder / "mmbench" / "mmbench_dev_20230712.tsv", []
    try:
        table = pd.read_table(file, dtype=str)
    except (OSError, ValueError) as error:
        raise ItemError(
            f"{file} cannot be read ({(str(error).splitlines() or [''])[0]:.200}); fetch it again"
        ) from None
    if missing := {"index", "question", "hint", "A", "B", "answer", "image"} - {*table.columns}:
        raise ItemError(f"{file}: no column '{min(missing)}'; fetch it again")
    for number, row in enumerate(table.to_dict("records"), start=2):
        at = f"{file}, line {number}"
        options: dict[str, str] = {}
        for letter in LETTERS[:4]:
            if _nothing(row.get(letter)):
                break
            options[letter] = row[letter]
        question = _text(row, "question", at)
        lines = [*([] if _nothing(row["hint"]) else [row["hint"]]), question]
        lines += [f"{letter}. {option}" for letter, option in options.items()]
        try:
            image, index = base64.b64decode(row["image"], validate=True), int(row["index"])
        except (TypeError, ValueError, binascii.Error):
            raise ItemError(f"{at}: 'image' is no base64 or 'index' no number; fetch the file again") from None
        items.append({
            "id": str(index), "image": image, "text": "\n".join([IMAGE, *lines, LETTER]), "where": at,
            "answer": row["answer"], "options": options, "index": index,
        })  # fmt: skip
    return items


def _nothing(cell: Any) -> bool:
    """Whether a cell is empty, as the released script has it: the words "nan" and "none" are, too."""
    return not isinstance(cell, str) or cell.lower() in ("nan", "none")


# the files that each reads, below the folder
FILES: Mapping[str, tuple[str, ...]] = {
    "vqav2_test_dev": ("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", EVERY),
    "vqav2_val": (f"vqav2/{ANNOTATIONS}", f"vqav2/{QUESTIONS}"),
    "gqa_testdev": ("gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/testdev_balanced_questions.json"),
    "vizwiz_test": ("vizwiz/llava_test.jsonl",),
    "vizwiz_val": ("vizwiz/val.json",),
    "science_qa": (
        "scienceqa/llava_test_CQM-A.json", "scienceqa/problems.json", "scienceqa/pid_splits.json",
    ),
    "text_vqa": ("textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/TextVQA_0.5.1_val.json"),
    "pope": ("pope/llava_pope_test.jsonl", *(f"pope/coco/coco_pope_{kind}.json" for kind in POPE)),
    "mmbench": ("mmbench/mmbench_dev_20230712.tsv",),
    **dict.fromkeys(("easy_vqa_yes_no", "easy_vqa_other"), (f"{EASY}/{ANNOTATIONS}", f"{EASY}/{QUESTIONS}")),
}  # fmt: skip


def _task(
    name: str, column: str, read: Callable[[Path], list[Item]], metric: str | None, items: int, headline: Any = None
) -> Task:
    def of_split(folder: Path, split: str) -> list[Item]:
        found = read(Path(folder)) if split == "test" else []
        return [{key: value for key, value in item.items() if key != "row"} for item in found]

    metrics = () if metric is None else (metric,)
    return Task(name=name, column=column, read=of_split, metrics=metrics, headline=headline, released_items=items)


# the paper's columns are those of its own splits; numbers of items as widely quoted, the files were not at hand
TASKS = (
    _task("vqav2_test_dev", "VQAv2", vqav2_test_dev, None, 107_394),
    _task("vqav2_val", "VQAv2 val", vqav2_val, "vqa_released", 214_354),
    _task("gqa_testdev", "GQA", gqa, "gqa", 12_578),
    _task("vizwiz_test", "VisWiz", vizwiz_test, None, 8_000),
    _task("vizwiz_val", "VisWiz val", vizwiz_val, "vqa_m4c", 4_319),
    _task("science_qa", "SQA", science_qa, "science_qa", 4_241, headline="accuracy_image"),
    _task("text_vqa", "VQAT", text_vqa, "vqa_m4c", 5_000),
    _task("pope", "POPE", pope, "pope_released", 8_910, headline="f1"),
    _task("mmbench", "MMBench", mmbench, "mmbench", 4_377, headline="circular"),
    _task("easy_vqa_yes_no", "easy-VQA yes/no", easy_vqa_yes_no, "vqa_released", 7_136),
    _task("easy_vqa_other", "easy-VQA other", easy_vqa_other, "vqa_released", 2_537),
)


def gold(items: list[Item]) -> list[Item]:
    """The items as `metrics.score` takes them, whose field `image` says whether there is one."""
    return [item | {"image": item["image"] is not None} for item in items]


def right_answer(item: Item) -> str:
    """What an item's answer would be in training: of ten people's the most frequent, of POPE Yes or No, as LLaVA's mix
    has it."""
    if "answers" in item:
        return Counter(item["answers"]).most_common(1)[0][0]
    return item["answer"].capitalize() if "category" in item else item["answer"]


def every_question(folder: Path) -> list[str]:
    """The ids of all questions of VQAv2's test set, of which its server wants an answer each."""
    file = Path(folder) / EVERY
    names = [row.get("question_id") if isinstance(row, dict) else None for row in read_lines(file)]
    if not names or not all(isinstance(name, int) and not isinstance(name, bool) for name in names):
        raise ItemError(f"{file}: expected a question with a number 'question_id' in each line; fetch it again")
    return [str(name) for name in names]


def _id(row: dict[str, Any], at: str) -> str:
    name = row.get("question_id")
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ItemError(f"{at}, field 'question_id': expected a number or a text, got {name!r:.80}; correct it")
    return str(name)


def _text(row: Any, field: str, at: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ItemError(f"{at}, field '{field}': expected a text, got {value!r:.80}; fetch the file again")
    return value


def _said(row: dict[str, Any], at: str) -> list[str]:
    """The answers of the annotators, given as texts or as objects with one."""
    said = row.get("answers")
    if not isinstance(said, list) or not said:
        raise ItemError(f"{at}, field 'answers': expected a list, got {said!r:.80}; fetch the file again")
    texts: list[Any] = [one.get("answer") if isinstance(one, dict) else one for one in said]
    if not all(isinstance(text, str) for text in texts):
        raise ItemError(f"{at}, field 'answers': expected texts, got {said!r:.80}; fetch the file again")
    return texts


def _object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise ItemError(f"{file}: expected an object, got a {type(value).__name__}; fetch it again")
    return value


def _list(file: Path, field: str) -> list[dict[str, Any]]:
    return _listed(_object(file).get(field), f"{file}, field '{field}'")


def _listed(value: Any, at: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        raise ItemError(f"{at}: expected a list of objects, not empty; fetch it again")
    return value


def _known(answers: dict[str, Any], item: Item, file: Path) -> Any:
    if item["id"] not in answers:
        raise ItemError(f"{item['where']}: question '{item['id']}' is not in {file}; fetch both again")
    return answers[item["id"]]
