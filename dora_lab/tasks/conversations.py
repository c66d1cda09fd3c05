"""LLaVA's instruction data: ``llava_v1_5_mix665k.json`` and the folders of images beside it. Imports no torch.

A file is a list of {"id", "image" (a path below the images' folder; text-only items have none), "conversations":
[{"from": "human" | "gpt", "value": text}, ...]}. An item here is {"id", "image": Path or None, "turns": [(question,
answer), ...], "where": file and item, for errors}; a question with an image begins with ``<image>`` and a line end,
wherever in it the mark was (LLaVA c121f04, `preprocess_multimodal`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dora_lab.io.files import LONGEST, parse_whole
from dora_lab.tasks.items import ItemError

Item = dict[str, Any]
IMAGE = "<image>"
WITH, WITHOUT = "image", "text"  # the two pools; a step is of one of them where optim.task_batch_sizes names both


def read_conversations(file: Path, images: Path) -> dict[str, list[Item]]:
    """The items of a file in two pools, with an image and without, each in the order of the file.

    Raises ItemError, naming file, item and field: for a file that is none, a conversation without an answer or out of
    turn, an ``<image>`` where there is none, another number of them than one where there is, a file of an image that is
    not there or lies outside the folder.
    """
    pools: dict[str, list[Item]] = {WITH: [], WITHOUT: []}
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise ItemError(f"{file}: expected a list of conversations, not empty; fetch it again")
    for number, row in enumerate(rows):
        item = _item(row, f"{file}, item {number}", Path(images))
        pools[WITHOUT if item["image"] is None else WITH].append(item)
    return {name: pool for name, pool in pools.items() if pool}


def read_json(file: Path) -> Any:
    """The value in a JSON file; raises ItemError for a file that is none."""
    return parsed(_content(file), str(file))


def read_lines(file: Path) -> list[Any]:
    """The values of a file with one JSON text a line, empty lines left out; raises ItemError likewise."""
    lines = enumerate(_content(file).splitlines(), start=1)
    return [parsed(line, f"{file}, line {number}") for number, line in lines if line.strip()]


def parsed(content: bytes, at: str) -> Any:
    """The value of a JSON text; ItemError says where it breaks."""
    try:
        return parse_whole(content)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ItemError(f"{at}: broken or truncated JSON at {where} ({error.msg}); fetch it again") from None
    except ValueError as error:
        raise ItemError(f"{at}: {error}; correct it or fetch it again") from None


def _content(file: Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ItemError(f"{file} cannot be read ({error.strerror}); fetch it or correct the path") from None


def _item(row: Any, at: str, images: Path) -> Item:
    if not isinstance(row, dict):
        raise ItemError(f"{at}: expected an object, got a {type(row).__name__}; fetch the file again")
    said = row.get("conversations")
    if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
        raise ItemError(f"{at}, field 'conversations': expected a list of objects; fetch the file again")
    image = row.get("image")
    turns = _turns(said, f"{at}, field 'conversations'")
    marks = sum(text.count(IMAGE) for turn in turns for text in turn)
    if image is None and marks:
        raise ItemError(f"{at}: {marks} {IMAGE} and no image; give field 'image', or take {IMAGE} out")
    if image is not None and (marks != 1 or any(IMAGE in answer for _, answer in turns)):
        raise ItemError(f"{at}: one image and {marks} {IMAGE}; a question has to hold it once")
    turns = [(_in_front(question), answer) for question, answer in turns]
    where = {"id": str(row.get("id", "")), "where": at}
    return {
        **where,
        "image": None if image is None else image_file(images, image, f"{at}, field 'image'"),
        "turns": turns,
    }


def _turns(said: list[Any], at: str) -> list[tuple[str, str]]:
    if said and said[0].get("from") == "gpt":  # as released: what nobody asked is left out
        said = said[1:]
    for place, one in enumerate(said):
        if not isinstance(one.get("value"), str) or one.get("from") != ("human", "gpt")[place % 2]:
            raise ItemError(
                f"{at}, turn {place}: expected a text of '{('human', 'gpt')[place % 2]}', got {one!r:.80}; correct it"
            )
    if not said or len(said) % 2 or not all(one["value"].strip() for one in said[1::2]):
        raise ItemError(f"{at}: a question without an answer, nothing could be learnt; remove it")
    return [(human["value"], gpt["value"]) for human, gpt in zip(said[::2], said[1::2], strict=True)]


def _in_front(question: str) -> str:
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip() if IMAGE in question else question


def image_file(images: Path, name: Any, at: str) -> Path:
    """The file of that name below a folder; raises ItemError where it is not there or leads out of the folder."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ItemError(f"{at}: {name!r:.200} is no path below {images}; correct it")
    if any(len(part.encode()) > LONGEST for part in Path(name).parts):
        raise ItemError(f"{at}: {name!r:.80}... is longer than a file's name can be; correct it")
    if not (images / name).is_file():
        raise ItemError(f"{at}: {images / name} does not exist; fetch the images, or correct the folder")
    return images / name
