"""The four families about pictures of scenes, as rows of the files in which VL-Adapter keeps VQA, GQA, NLVR2 and COCO.

Splits are "train", "validation", "test" and "novel": as test, but every item's question, or caption, is of a picture
with a (colour, shape) that no other split has. Which scene a picture shows is read off its name alone: see `shown`.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random
from typing import Any

from dora_lab.mini.vl.questions import FORMS, KINDS, PAIR, PROGRAMS, Asked, Asker, caption, statement
from dora_lab.mini.vl.scenes import COLOURS, SHAPES, SIZES, Scene, scene

Row = dict[str, Any]
SPLITS = ("train", "validation", "test", "novel")
COUNTS = {"train": 4800, "validation": 256, "test": 512, "novel": 256}  # questions of a family, twice the statements
PICTURES = {"train": 960, "validation": 128, "test": 256, "novel": 128}  # with captions, five each
ANNOTATORS, REFERENCES = 10, 5
SLIPS = 0.08  # share of a person's answers that are not the right one
NUMBERS = {"0": "none", "1": "one", "2": "two", "3": "three", "4": "four", "5": "five"}
# of k equal answers of ten: how right each is, the mean over the nine others' votes (VQA's accuracy in closed form)
SCORES = (0.0, 0.3, 0.6, 0.9)
_PREFIX = {"COCO": "COCO_{}2014_", "VG": "vg-{}-", "GQA": "gqa-{}-", "nlvr": "nlvr-{}-"}


def picture(name: str, split: str, number: int) -> str:
    """The id of a picture in a set: COCO's own form, whose Karpathy splits beside train are all of val2014."""
    part = ("train" if split == "train" else "val") if name == "COCO" else split
    return f"{_PREFIX[name].format(part)}{SPLITS.index(split)}{number:011}"


@cache
def shown(name: str, key: str) -> Scene:
    """The scene that a picture of a set shows."""
    digits = key[-12:]
    return scene(f"{SPLITS[int(digits[0])]}/{name}" if digits[0] != "3" else "novel", int(digits[1:]))


def _questions(name: str, askers: dict[str, Asker], split: str) -> tuple[tuple[str, Asked], ...]:
    """(picture, question) as often as `COUNTS` says, at most two of a picture; kinds, yes and no in equal parts.

    In `novel` each needs the held-out thing, which is the scene's first; what might not be there is not asked for.
    """
    kinds = [kind for kind in askers if split != "novel" or kind != "exist"]
    found: list[tuple[str, Asked]] = []
    number = 0
    while len(found) < COUNTS[split]:
        key, rng = picture(name, split, number), Random(f"questions/{name}/{split}/{number}")
        number += 1
        for _ in range(2):
            turn, kind = divmod(len(found), len(kinds))
            asked = askers[kinds[kind]](shown(name, key), rng, turn % 2 == 0)
            if asked and (split != "novel" or any(step & 1 for step in asked.evidence)):
                found.append((key, asked))
    return tuple(found[: COUNTS[split]])


@cache
def vqa(split: str) -> tuple[tuple[str, Asked], ...]:
    """(picture of the set COCO, question)."""
    return _questions("COCO", KINDS, split)


@cache
def gqa(split: str) -> tuple[tuple[str, Asked], ...]:
    """(picture, question); those of test and novel are in the set GQA, as testdev's are, the others in VG."""
    return _questions("GQA" if split in ("test", "novel") else "VG", PROGRAMS, split)


@cache
def nlvr2(split: str) -> tuple[tuple[str, str, Asked], ...]:
    """(left picture, right picture, statement), of every form as many true as false; in `novel` of a held-out thing."""
    forms = [form for form in range(FORMS) if split != "novel" or form != 3]  # a false one of form 3 is of no thing
    found: list[tuple[str, str, Asked]] = []
    number = 0
    while len(found) < COUNTS[split] // 2:
        rng = Random(f"questions/nlvr/{split}/{number}")
        left, right = (picture("nlvr", split, 2 * number + k) for k in (0, 1))
        number += 1
        turn, form = divmod(len(found), len(forms))
        asked = statement(shown("nlvr", left), shown("nlvr", right), rng, forms[form], turn % 2 == 0)
        if asked and (split != "novel" or asked.evidence[0] & (1 | 1 << PAIR)):
            found.append((left, right, asked))
    return tuple(found)


@cache
def coco(split: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(picture of the set COCO, its captions); the first pictures of vqa's."""
    keys = [picture("COCO", split, number) for number in range(PICTURES[split])]
    return tuple((key, _captions(key)) for key in keys)


def _captions(key: str) -> tuple[str, ...]:
    rng = Random(f"captions/{key}")
    found: dict[str, None] = {}
    while len(found) < REFERENCES:
        found[caption(shown("COCO", key), rng)] = None
    return tuple(found)


def said(asked: Asked, rng: Random) -> list[str]:
    """What ten people answer: the truth, in other words now and then, or a slip as people make them."""
    return [_slip(asked, rng) if rng.random() < SLIPS else _worded(asked.answer, rng) for _ in range(ANNOTATORS)]


def _worded(answer: str, rng: Random) -> str:
    return NUMBERS[answer] if answer in NUMBERS and rng.random() < 0.1 else answer


def _slip(asked: Asked, rng: Random) -> str:
    answer = asked.answer
    if answer in NUMBERS:
        return str(abs(int(answer) + rng.choice((-1, 1))))
    if answer in ("yes", "no"):
        return "no" if answer == "yes" else "yes"
    if asked.kind in ("where", "what"):
        return answer.split(" ")[rng.randrange(2)]  # half of the truth
    values = next(values for values in (COLOURS, SHAPES, SIZES) if answer in values)
    return rng.choice([value for value in values if value != answer])


def files(tested: str = "test") -> dict[str, Any]:
    """The annotation files by name; those of the test split hold the items of `tested`: "test" or "novel"."""
    parts = {"train": "train", "validation": "val", "test": "test"}
    people = "vqa/v2_mscoco_{}2014_annotations.json"
    out: dict[str, Any] = {people.format(part): {"annotations": []} for part in ("train", "val")}
    for split, part in parts.items():
        asked = vqa(tested if split == "test" else split)
        rows = [_vqa_row(number, key, one) for number, (key, one) in enumerate(asked, 1_000_000 * len(out))]
        answers = out[people.format("train" if split == "train" else "val")]["annotations"]
        answers.extend(answer for _, answer in rows)
        out[f"vqa/karpathy_{part}.json"] = [row for row, _ in rows]
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "testdev")):
        rows = gqa(tested if split == "test" else split)
        out[f"GQA/{part}.json"] = [
            {"question_id": f"{part}-{number:06}", "img_id": key, "sent": one.text, "label": {one.answer: 1.0}}
            for number, (key, one) in enumerate(rows)
        ]
    for split, part in (("train", "train"), ("validation", "valid"), ("test", "test")):
        rows = nlvr2(tested if split == "test" else split)
        out[f"nlvr/{part}.json"] = [
            {
                "identifier": f"{part}-{number}-0-0", "uid": f"nlvr2_{part}_{number}", "img0": left, "img1": right,
                "sent": one.text, "label": int(one.answer == "true"),
            }
            for number, (left, right, one) in enumerate(rows)
        ]  # fmt: skip
    out["COCO/dataset_coco.json"] = {
        "images": [
            {"filename": f"{key}.jpg", "split": part, "sentences": [{"raw": text} for text in captions]}
            for split, part in parts.items()
            for key, captions in coco(tested if split == "test" else split)
        ]
    }
    return out


def _vqa_row(number: int, key: str, asked: Asked) -> tuple[Row, Row]:
    """A question and what ten people said to it; `label` is how right each of their answers is."""
    people = said(asked, Random(f"people/{key}/{asked.text}"))
    label = {text: SCORES[n] if n < len(SCORES) else 1.0 for text, n in Counter(people).most_common()}
    row = {"question_id": number, "img_id": key, "sent": asked.text, "label": label}
    answer = {
        "question_id": number, "image_id": int(key[-12:]), "question_type": asked.kind,
        "answers": [{"answer_id": i, "answer": text} for i, text in enumerate(people, 1)],
    }  # fmt: skip
    return row, answer


def pictures(tested: str = "test") -> dict[str, list[str]]:
    """By set, every picture that `files` names."""
    named: dict[str, set[str]] = {name: set() for name in _PREFIX}
    for split in ("train", "validation", tested):
        named["COCO"] |= {key for key, _ in (*vqa(split), *coco(split))}
        named["GQA" if split == tested else "VG"] |= {key for key, _ in gqa(split)}
        named["nlvr"] |= {key for left, right, _ in nlvr2(split) for key in (left, right)}
    return {name: sorted(keys) for name, keys in named.items()}


def items(family: str, split: str) -> tuple[tuple[Any, ...], ...]:
    """Of "vqa", "gqa", "nlvr2" or "coco": pictures, and what is asked or said about them."""
    return {"vqa": vqa, "gqa": gqa, "nlvr2": nlvr2, "coco": coco}[family](split)


def floor(family: str, tested: str = "test") -> list[str]:
    """What to answer without looking: to each item of a split, the answer that train gives most often to its kind."""
    if family == "coco":
        return [Random("floor").choice(coco("train"))[1][0]] * len(coco(tested))
    given: dict[str, Counter[str]] = {}
    for *_, one in items(family, "train"):
        given.setdefault(one.kind, Counter())[one.answer] += 1
    return [given[one.kind].most_common(1)[0][0] for *_, one in items(family, tested)]


def ceiling(family: str, tested: str = "test") -> list[str]:
    """The truth to each item of a split; of captions the first of five, to be held against the other four."""
    if family == "coco":
        return [captions[0] for _, captions in coco(tested)]
    return [one.answer for *_, one in items(family, tested)]
