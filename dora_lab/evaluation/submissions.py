"""Answers as the servers of VQAv2, VizWiz and MMBench take them, where the right ones are not given away.

What LLaVA's scripts send (c121f04): short answers normalised by rule m4c, MMBench's as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_lab.io.atomic import replacing, write_text
from dora_lab.metrics.check import ScoreError
from dora_lab.metrics.vqa import normalise
from dora_lab.tasks import ItemError
from dora_lab.tasks.visual_instruction.benchmarks import EVERY, FILES, every_question

DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")  # of MMBench's table
NAMES = {  # of the files, by task
    "vqav2_test_dev": "vqav2_test_dev.submission.json",
    "vizwiz_test": "vizwiz_test.submission.json",
    "mmbench": "mmbench.submission.xlsx",
}
PREDICTION = 6  # place of the answer's column among those that are left


def ready(task: str, items: Sequence[Mapping[str, Any]], home: Path) -> bool:
    """Whether a server takes the answers to these items: to be asked before they are given.

    Raises ItemError for a file of questions that is missing or of others, ScoreError where openpyxl is missing.
    """
    if task == "vqav2_test_dev" and (unknown := {item["id"] for item in items} - {*every_question(home)}):
        raise ItemError(f"{home / EVERY}: question '{min(unknown)}' of test-dev is not in it; fetch both again")
    if task == "mmbench":
        _openpyxl(home)
    return task in NAMES


def write(task: str, items: Sequence[Mapping[str, Any]], outputs: Mapping[str, str], home: Path, folder: Path) -> Path:
    """The file for a task's server, in a folder; home: of the benchmarks. Raises ScoreError as the writers do."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAMES[task]
    if task == "vqav2_test_dev":
        return write_vqav2(file, outputs, [item["id"] for item in items], every_question(home))
    if task == "vizwiz_test":
        return write_vizwiz(file, outputs, {item["id"]: item["image"].name for item in items})
    return write_mmbench(file, outputs, home / FILES[task][0])


def write_vqav2(file: Path, outputs: Mapping[str, str], asked: Sequence[str], every: Sequence[str]) -> Path:
    """VQAv2 test-dev: [{"question_id", "answer"}, ...] of every question of the test set, as its server wants it.

    Args: outputs by question; asked: the questions of test-dev, which have to have one; every: those of the whole test
    set. The others' answer is empty: the server does not look at it.
    """
    _complete(file, outputs, asked)
    if unknown := {*asked} - {*every}:
        raise ScoreError(f"{file}: question '{min(unknown)}' is not in the test set; fetch both files again")
    rows = [
        {"question_id": int(name), "answer": normalise(outputs[name], "m4c") if name in outputs else ""}
        for name in every
    ]
    return _write(file, rows)


def write_vizwiz(file: Path, outputs: Mapping[str, str], images: Mapping[str, str]) -> Path:
    """VizWiz test: [{"image", "answer"}, ...]; images: the file's name of each question's."""
    _complete(file, outputs, list(images))
    return _write(file, [{"image": image, "answer": normalise(outputs[name], "m4c")} for name, image in images.items()])


def write_mmbench(file: Path, outputs: Mapping[str, str], questions: Path) -> Path:
    """MMBench: its table without pictures and categories, with a column `prediction`, as an Excel sheet.

    A control character, which no cell can hold, stands as "_x0007_", as the format has it (ECMA-376, ST_Xstring).
    Raises ScoreError where openpyxl is missing (extra `vision`).
    """
    import pandas as pd

    Workbook, control = _openpyxl(file)

    table = pd.read_table(questions, dtype=str)
    _complete(file, outputs, table["index"].tolist())
    kept = table.drop(columns=[name for name in DROPPED if name in table])
    kept.insert(PREDICTION, "prediction", [outputs[name] for name in table["index"]])
    book = Workbook()
    sheet: Any = book.active
    for place, row in enumerate([list(kept.columns), *kept.values.tolist()], start=1):
        for column, value in enumerate(row, start=1):
            text = control.sub(lambda one: f"_x{ord(one[0]):04X}_", value) if isinstance(value, str) else None
            cell = sheet.cell(place, column, int(text) if column == 1 and place > 1 and text else text)
            if isinstance(cell.value, str):
                cell.data_type = "s"  # a text, though it may begin with "="
    with replacing(file) as temporary:
        book.save(temporary)
    return file


def _openpyxl(file: Path) -> tuple[Any, Any]:
    """The class of a sheet, and the pattern of what no cell can hold."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise ScoreError(f"{file}: sheets are written with openpyxl: pip install 'dora-lab[vision]'") from None
    # two that no XML can hold, and what would be read as one that is escaped
    return Workbook, re.compile(rf"{ILLEGAL_CHARACTERS_RE.pattern}|[\ufffe\uffff]|_(?=x[0-9A-Fa-f]{{4}}_)")


def _complete(file: Path, outputs: Mapping[str, str], asked: Sequence[str]) -> None:
    if missing := [name for name in asked if name not in outputs]:
        raise ScoreError(
            f"{file}: {len(missing)} questions have no answer, the first is '{missing[0]}'; answer them all"
        )
    if unknown := {*outputs} - {*asked}:
        raise ScoreError(f"{file}: '{min(unknown)}' was not asked; give this set's own outputs")


def _write(file: Path, rows: list[dict[str, Any]]) -> Path:
    write_text(file, json.dumps(rows, ensure_ascii=False))
    return file
