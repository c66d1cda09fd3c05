"""Loader and score of the task definitions here; imports nothing of this package, so that the folder can travel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

FIELDS = ("instruction", "input", "output", "answer")
ANSWER_FORMAT = "Answer format:"


def load(folder: str, labels: list[str], data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The split "test" of one task: ``<data_dir>/<folder>/test.json`` of the LLM-Adapters layout.

    An answer has to be one of the `labels`, and of those that the instruction offers: another could never be right.
    Raises ValueError naming file, item and field for what cannot be used.
    """
    if not data_dir:
        raise ValueError(
            "these tasks need the folder of test files (<task>/test.json, LLM-Adapters layout): "
            """--metadata '{"data_dir": "FOLDER"}', or TaskManager(metadata={"data_dir": "FOLDER"})"""
        )
    file = Path(data_dir) / folder / "test.json"
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; fetch it or leave the task out") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); fetch it again") from None
    if not isinstance(items, list) or not items:
        raise ValueError(f"{file}: expected a list of items with the fields {', '.join(FIELDS)}")
    for number, item in enumerate(items):
        for field in FIELDS:
            if not isinstance(item, dict) or not isinstance(item.get(field), str):
                raise ValueError(f"{file}, item {number}, field '{field}': missing or not text")
        if item["input"]:
            raise ValueError(f"{file}, item {number}, field 'input': must be empty, the prompt has no place for it")
        offered = _offered(item["instruction"], labels)
        if offered is None:
            raise ValueError(f"{file}, item {number}, field 'instruction': '{ANSWER_FORMAT}' is not followed by labels")
        if item["answer"] not in offered:
            raise ValueError(
                f"{file}, item {number}, field 'answer': '{item['answer']}' is not one of the answers, "
                f"{'/'.join(offered)}; correct it or leave the item out"
            )
    return {"test": datasets.Dataset.from_list([{field: item[field] for field in FIELDS} for item in items])}


def _offered(instruction: str, labels: list[str]) -> list[str] | None:
    """The labels that an instruction ends in, all where it names none; None where what it names are no labels."""
    _, found, end = instruction.rpartition(ANSWER_FORMAT)
    offered = [label.strip() for label in end.strip().removesuffix(".").split("/")]
    if not found:
        return labels
    return offered if len(offered) > 1 and len(set(offered)) == len(offered) and set(offered) <= set(labels) else None


def score(item: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """exact_match and unparsed (0 or 1 each) of the answer that the filter found; an empty one is none."""
    (answer,) = answers
    return {"exact_match": float(answer == item["answer"]), "unparsed": float(not answer)}
