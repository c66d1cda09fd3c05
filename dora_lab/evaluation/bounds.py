"""What can be reached on the embedded worlds of pictures and clips: without looking, and by whoever knows the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dora_lab.metrics import score
from dora_lab.mini import llava, vl
from dora_lab.mini.vl import clip_families
from dora_lab.tasks import Task, easy_vqa, mini_clips, mini_llava, mini_pictures
from dora_lab.tasks.image_text_novel import ENDING
from dora_lab.tasks.visual_instruction.benchmarks import gold, right_answer

FAMILIES = {"vqa": "vqa", "gqa": "gqa", "nlvr2": "nlvr2", "coco_caption": "coco"}  # task: of `mini.vl`
INSTRUCTED = {"vqav2_val": "vqa", "vizwiz_val": "vizwiz", "science_qa": "sqa", "pope": "pope"}  # of `mini.llava`
FILMED = {"tvqa_cloze_val": "tvqa", "tvc_val": "tvc"}  # of `mini.vl.clip_families`


def bounds(source: str, task: Task, split: str, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`floor` and `ceiling` of a task's first metric on these items, of what it means over them (of POPE the share of
    right answers, not F1); {} for data of which neither is known.

    floor: the answer that training items of its kind have most often, of captions one and the same for all; ceiling:
    the truth, of captions a person's, held against those of the others. A blind source has those of the other. Of
    "mini_llava": see `mini.llava.floor`; of "easy_vqa" and clips the floor is what the very question has most often.
    """
    if source in mini_llava.SOURCES:
        floor, ceiling = (texts(INSTRUCTED[task.name], split) for texts in (llava.floor, llava.ceiling))
        return _instructed(task, items, lambda item: floor[item["id"]], lambda item: ceiling[item["id"]])
    if source == easy_vqa.NAME:
        return _instructed(task, items, lambda item: easy_vqa.guess(item["text"].split("\n")[1]), right_answer)
    if source in mini_clips.SOURCES and task.name in FILMED:
        floor, ceiling = (texts(FILMED[task.name], split) for texts in (clip_families.floor, clip_families.ceiling))
        return _pictured(task, items, lambda item: floor[int(item["id"])], lambda item: ceiling[int(item["id"])])
    family = FAMILIES.get(task.name.removesuffix(ENDING))
    if source not in mini_pictures.SOURCES or family is None:
        return {}
    tested = "novel" if task.name.endswith(ENDING) else split
    asked = [*map(_asked, vl.items(family, tested))]
    texts = [dict(zip(asked, found(family, tested), strict=True)) for found in (vl.floor, vl.ceiling)]

    def said(item: Mapping[str, Any], told: Mapping[tuple[str, ...], str]) -> Any:
        text = told[(*(key for _, key in item["pictures"]), item["text"])]
        return {word: float(word == text) for word in ("true", "false")} if family == "nlvr2" else text

    return _pictured(task, items, lambda item: said(item, texts[0]), lambda item: said(item, texts[1]))


def _pictured(
    task: Task, items: Sequence[Mapping[str, Any]], floor: Callable[[Any], Any], ceiling: Callable[[Any], Any]
) -> dict[str, float]:
    others = [{**item, "references": item["references"][1:]} if "references" in item else dict(item) for item in items]
    found = {}
    for name, answer, held in (("floor", floor, items), ("ceiling", ceiling, others)):
        said = {item["id"]: answer(item) for item in items}
        scored = score(task.metrics[0], held, said, f"{name} of {task.name}")
        (found[name], *_) = scored.summary.values()
    return found


def _instructed(
    task: Task, items: Sequence[Mapping[str, Any]], floor: Callable[[Any], str], ceiling: Callable[[Any], str]
) -> dict[str, float]:
    found, held = {}, gold([dict(item) for item in items])
    for name, text in (("floor", floor), ("ceiling", ceiling)):
        said = {item["id"]: text(item) for item in items}
        scored = score(task.metrics[0], held, said, f"{name} of {task.name}")
        found[name] = sum(scored.values) / len(scored.values)
    return found


def _asked(item: tuple[Any, ...]) -> tuple[str, ...]:
    """Pictures and text, as an item of the task has them."""
    *keys, last = item
    return (*keys, last.text if hasattr(last, "text") else "")
