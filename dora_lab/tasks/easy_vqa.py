"""Source "easy_vqa": 5,000 small pictures of one shape and 48,248 questions that are not this lab's (V. Zhou's package
easy-vqa 1.0, MIT), written once into the user's cache as LLaVA's `playground/data`, which `tasks.llava` reads.

Three of four questions are answered by yes or no, half of them each; they and the others are benchmarks of their own.
A conversation is everything that the package asks about a picture. The last 500 pictures of its training part are
validation's.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from dora_lab.io.errors import LoadError
from dora_lab.tasks.conversations import IMAGE, read_json
from dora_lab.tasks.visual_instruction.benchmarks import ANNOTATIONS, EASY, PICTURE, QUESTIONS, SHORT, YES_NO
from dora_lab.tasks.written import SEAL, version_of, written

NAME = "easy_vqa"
HELD_OUT = 500  # pictures
PEOPLE = 10  # as VQA's files have it: all of one mind
Questions = dict[int, list[tuple[str, str]]]  # number of a picture: (question, answer)


def folder(name: str = NAME) -> Path:
    """The folder of the source; raises LoadError where the package is not installed."""
    package()
    return written(name, version_of([Path(__file__)]), _write, megabytes=30)


def sha256(name: str = NAME) -> str:
    """The hash of all its files."""
    return (folder(name) / SEAL).read_text()


def package() -> Path:
    """The package's folder of data."""
    found = find_spec(NAME)
    if found is None or found.origin is None:
        raise LoadError(
            "data 'easy_vqa' is a package (PyPI, MIT, 3 MB) that is not installed: pip install easy-vqa==1.0"
        )
    return Path(found.origin).parent / "data"


@cache
def questions(part: str) -> Questions:
    """What the package asks about each picture of "train" or "test", in its order."""
    found: Questions = defaultdict(list)
    for question, answer, picture in read_json(package() / part / "questions.json"):
        found[picture].append((question, answer))
    return dict(found)


def train() -> Questions:
    """Of the pictures that are trained on."""
    return dict(sorted(questions("train").items())[:-HELD_OUT])


def guess(question: str) -> str:
    """What is right of this question most often in training: what can be answered without looking."""
    return _guesses()[question]


@cache
def _guesses() -> dict[str, str]:
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for asked in train().values():
        for question, answer in asked:
            given[question][answer] += 1
    return {question: count.most_common(1)[0][0] for question, count in given.items()}


def _write(root: Path) -> None:
    rows = []
    (root / "images").mkdir(parents=True)
    for picture, asked in train().items():
        lines = [
            {"from": who, "value": text} for pair in asked for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        lines[0]["value"] = f"{IMAGE}\n{lines[0]['value']}\n{SHORT}"
        rows.append({"id": f"{picture}", "image": f"images/{picture}.png", "conversations": lines})
        shutil.copyfile(package() / "train" / "images" / f"{picture}.png", root / "images" / f"{picture}.png")
    (root / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    held = dict(sorted(questions("train").items())[-HELD_OUT:])
    for below, part, asked in (("validation", "train", held), ("eval", "test", questions("test"))):
        _benchmark(root / below / EASY, part, asked)


def _benchmark(home: Path, part: str, asked: Questions) -> None:
    """Questions and annotations as VQA's, in an order of no meaning, so that the first thousand are a sample."""
    every = [(picture, *pair) for picture, pairs in asked.items() for pair in pairs]
    Random(f"{NAME}/{part}").shuffle(every)
    told: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    for number, (picture, question, answer) in enumerate(every):
        about = {"question_id": number, "image_id": picture}
        told.append(about | {"question": question})
        kind = YES_NO if answer in ("yes", "no") else "other"
        said.append(about | {"answer_type": kind, "answers": [{"answer": answer}] * PEOPLE})
    (home / "val2014").mkdir(parents=True)
    (home / QUESTIONS).write_text(json.dumps({"questions": told}))
    (home / ANNOTATIONS).write_text(json.dumps({"annotations": said}))
    for picture in asked:
        shutil.copyfile(package() / part / "images" / f"{picture}.png", home / "val2014" / PICTURE.format(picture))
