"""The embedded world of pictures: the same everywhere, its answers true, features read back, floors by brute force."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from dora_lab import metrics
from dora_lab.mini import vl
from dora_lab.mini.vl import corpus, families
from dora_lab.mini.vl.cells import projection
from dora_lab.mini.vl.draw import PAINT
from dora_lab.mini.vl.questions import plural
from dora_lab.mini.vl.scenes import COLOURS, COLUMNS, HELD_OUT, ROWS, SHAPES, SIZES, Scene, Thing, prose, scene
from dora_lab.tasks.features import gather

FROZEN = {"test": "aec3e287a0151705", "novel": "947f9f63cd46fb93"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vl.write(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("tested", FROZEN)
def test_the_world_is_the_same_everywhere(tested: str) -> None:
    assert vl.world_sha256(tested)[:16] == FROZEN[tested]


def test_written_twice_it_is_the_same_to_the_byte(root: Path, tmp_path: Path) -> None:
    names = sorted(file.relative_to(root) for file in root.rglob("*.*") if file.is_file())
    assert len(names) == 4 + 9 + 2 + 1  # shards; three families in three splits, what people said, captions
    vl.write(tmp_path)
    assert all((root / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_features_are_read_back_as_they_were_made(root: Path) -> None:
    for name, keys in families.pictures().items():
        read = dict(gather(root, name, keys, vl.SHAPE))
        assert read.keys() == set(keys) and len(keys) == len(set(keys))
        for key in keys[::50]:
            assert read[key].dtype == np.float16
            np.testing.assert_array_equal(read[key], vl.features(vl.shown(name, key), key))


def test_blind_features_are_zero(tmp_path: Path) -> None:
    vl.write(tmp_path, blind=True)
    keys = families.pictures()["GQA"]
    assert all(not features.any() for _, features in gather(tmp_path, "GQA", keys, vl.SHAPE))


def test_a_cell_says_what_covers_it() -> None:
    """The likeliest of all coverings, given the projection: right for nearly all cells, so noise hides little."""
    part = projection()
    coverings = [None, *((c, s, z) for c in COLOURS for s in SHAPES for z in SIZES)]
    sums = np.stack([sum((part[word] for word in one), np.zeros(64)) if one else np.zeros(64) for one in coverings])
    hits: list[bool] = []
    for number in range(30):
        key = families.picture("COCO", "test", number)
        things = vl.shown("COCO", key)
        there = {cell: (t.colour, t.shape, t.size) for t in things for cell in t.cells()}
        grid = vl.features(things, key).astype(float).reshape(6, 6, 64)
        for row in range(6):
            for column in range(6):
                rest = grid[row, column] - part[f"row{row}"] - part[f"column{column}"]
                found = coverings[int(((sums - rest) ** 2).sum(1).argmin())]
                hits.append(found == there.get((row, column)))
    assert 0.97 < np.mean(hits) <= 1


def test_no_picture_shows_a_held_out_combination_but_those_of_novel() -> None:
    def held(things: Scene) -> list[Thing]:
        return [thing for thing in things if (thing.colour, thing.shape) in HELD_OUT]

    for tested in ("test", "novel"):
        own = {key for _, keys in families.pictures(tested).items() for key in keys}
        assert len(own) == sum(len(keys) for keys in families.pictures(tested).values())
    for name, keys in families.pictures("test").items():
        assert not [key for key in keys if held(vl.shown(name, key))], name
    for split in ("vqa", "gqa"):
        for key, asked in getattr(families, split)("novel"):
            things = vl.shown("COCO" if split == "vqa" else "GQA", key)
            assert held(things)[0] == things[0] and any(step & 1 for step in asked.evidence)
    for left, right, _ in families.nlvr2("novel"):
        assert held(vl.shown("nlvr", left)) and held(vl.shown("nlvr", right))


@pytest.mark.parametrize("family", ["vqa", "gqa", "nlvr2", "coco"])
def test_no_item_is_in_two_splits(family: str) -> None:
    seen: set[object] = set()
    for split in families.SPLITS:
        items = getattr(families, family)(split)
        told = {tuple(part if isinstance(part, str) else str(part) for part in item) for item in items}
        assert len(told) == len(items) and not told & seen
        seen |= told


def answer(text: str, things: Scene) -> str:
    """The answer to a question, read off the text and the scene by other code than that which asked."""
    by_place = {f"{ROWS[t.row]} {COLUMNS[t.column]}": t for t in things}
    by_name = {f"{t.colour} {t.shape}": t for t in things}

    def stands(one: Thing, how: str, other: Thing) -> bool:
        return {
            "left of": one.column < other.column, "right of": one.column > other.column,
            "above": one.row < other.row, "below": one.row > other.row,
        }[how]  # fmt: skip

    def only(found: list[Thing]) -> Thing:
        (one,) = found
        return one

    how = "(left of|right of|above|below)"
    if m := re.fullmatch(r"(what colour is the shape|which shape is) at the (.+)\?", text):
        thing = by_place[m[2]]
        return thing.colour if "colour" in m[1] else thing.shape
    if m := re.fullmatch(rf"(what colour is the shape|which shape is) {how} the (.+)\?", text):
        thing = only([t for t in things if stands(t, m[2], by_name[m[3]])])
        return thing.colour if "colour" in m[1] else thing.shape
    if m := re.fullmatch(r"what colour is the (\w+)\?", text):
        return only([t for t in things if t.shape == m[1]]).colour
    if m := re.fullmatch(r"which shape is (\w+)\?", text):
        return only([t for t in things if t.colour == m[1]]).shape
    if m := re.fullmatch(r"is the (.+) small or big\?", text):
        return by_name[m[1]].size
    if m := re.fullmatch(r"where is the (.+)\?", text):
        return next(place for place, t in by_place.items() if t == by_name[m[1]])
    if m := re.fullmatch(r"what is at the (.+)\?", text):
        return f"{by_place[m[1]].colour} {by_place[m[1]].shape}"
    if m := re.fullmatch(r"how many (\w+) shapes are there\?", text):
        return str(sum(t.colour == m[1] for t in things))
    if m := re.fullmatch(r"how many (\w+) are there\?", text):
        return str(sum(plural(t.shape) == m[1] for t in things))
    if m := re.fullmatch(r"is there an? (\w+ \w+)\?", text):
        return "yes" if m[1] in by_name else "no"
    if m := re.fullmatch(rf"is the (\w+ \w+) {how} the (\w+ \w+)\?", text):
        return "yes" if stands(by_name[m[1]], m[2], by_name[m[3]]) else "no"
    if m := re.fullmatch(r"has the shape at the (.+) the same colour as the shape at the (.+)\?", text):
        return "yes" if by_place[m[1]].colour == by_place[m[2]].colour else "no"
    if m := re.fullmatch(r"is the shape at the (\w+ \w+) (\w+) or (\w+)\?", text):
        assert by_place[m[1]].colour in (m[2], m[3]) and m[2] != m[3]
        return by_place[m[1]].colour
    (one, joint, other) = re.fullmatch(r"is there an? (\w+) (and|or) an? (\w+)\?", text).groups()  # type: ignore[union-attr]
    shapes = {t.shape for t in things}
    return "yes" if (one in shapes) + (other in shapes) > (joint == "and") else "no"


@pytest.mark.parametrize("split", families.SPLITS)
def test_answers_are_true_of_the_scene(split: str) -> None:
    for key, asked in families.vqa(split):
        assert answer(asked.text, vl.shown("COCO", key)) == asked.answer, (key, asked.text)
    for key, asked in families.gqa(split):
        assert answer(asked.text, vl.shown("GQA" if key.startswith("gqa") else "VG", key)) == asked.answer
    for left, right, asked in families.nlvr2(split):
        assert true(asked.text, vl.shown("nlvr", left), vl.shown("nlvr", right)) == (asked.answer == "true"), asked.text


def true(text: str, left: Scene, right: Scene) -> bool:
    shapes = [Counter(word for t in side for word in (t.shape, plural(t.shape))) for side in (left, right)]
    if m := re.fullmatch(r"each image has an? (\w+)\.", text):
        return all(counts[m[1]] for counts in shapes)
    if m := re.fullmatch(r"exactly one image has an? (\w+)\.", text):
        return sum(counts[m[1]] > 0 for counts in shapes) == 1
    if m := re.fullmatch(r"there (?:is|are) (one|two|three) (\w+) in the two images\.", text):
        return sum(counts[m[2]] for counts in shapes) == ["", "one", "two", "three"].index(m[1])
    if m := re.fullmatch(r"the (left|right) image has more (\w+) than the (left|right) image\.", text):
        assert m[1] != m[3]
        return (shapes[0][m[2]] - shapes[1][m[2]]) * (1 if m[1] == "left" else -1) > 0
    m = re.fullmatch(r"there is an? (\w+ \w+) in the (left|right) image\.", text)
    assert m
    return m[1] in {f"{t.colour} {t.shape}" for t in (left if m[2] == "left" else right)}


def test_yes_and_no_are_said_as_often() -> None:
    for family, wanted in (("vqa", {"yes", "no"}), ("gqa", {"yes", "no"}), ("nlvr2", {"true", "false"})):
        given: dict[str, Counter[str]] = {}
        for *_, asked in getattr(families, family)("test"):
            if asked.answer in wanted:
                given.setdefault(asked.kind, Counter())[asked.answer] += 1
        assert given and all(abs(n - m) <= 1 for n, m in (counts.values() for counts in given.values())), given


def test_vqas_floor_and_ceiling_by_brute_force(root: Path) -> None:
    """From the files: no other answer to a kind does better on train, no answer at all better than the truth."""
    people = {row["question_id"]: row for part in ("train", "val") for row in said(root, part)}
    train, test = (
        json.loads((root / f"annotations/vqa/karpathy_{part}.json").read_text()) for part in ("train", "test")
    )
    floor = {str(row["question_id"]): text for row, text in zip(test, vl.floor("vqa"), strict=True)}
    totals: dict[str, Counter[str]] = {}
    for row in train:
        totals.setdefault(people[row["question_id"]]["question_type"], Counter()).update(row["label"])
    for row in test:
        of_kind = totals[people[row["question_id"]]["question_type"]]
        assert of_kind[floor[str(row["question_id"])]] >= 0.97 * max(of_kind.values())
    items = [
        {"id": str(row["question_id"]), "answers": [one["answer"] for one in people[row["question_id"]]["answers"]]}
        for row in test
    ]
    low = metrics.score("vqa_released", items, floor, "floor").summary["accuracy"]
    assert low == pytest.approx(
        np.mean([row["label"].get(floor[str(row["question_id"])], 0) for row in test]), abs=0.02
    )
    truth = dict(zip([item["id"] for item in items], vl.ceiling("vqa"), strict=True))
    high = metrics.score("vqa_released", items, truth, "ceiling").summary["accuracy"]
    assert low is not None and high is not None and 0.25 < low < 0.45 and 0.97 < high <= 1
    assert high >= np.mean([max(row["label"].values()) for row in test]) - 0.002


def said(root: Path, part: str) -> list[dict[str, Any]]:
    return json.loads((root / f"annotations/vqa/v2_mscoco_{part}2014_annotations.json").read_text())["annotations"]


def test_floors_and_ceilings_of_the_other_families() -> None:
    for family, field in (("gqa", "gqa"), ("nlvr2", "nlvr2")):
        asked = [one for *_, one in getattr(families, family)("test")]
        items = [{"id": str(i), "answer": one.answer, "statement": str(i)} for i, one in enumerate(asked)]
        floor, ceiling = (
            {str(i): {name: float(text == name) for name in ("true", "false")} if field == "nlvr2" else text
             for i, text in enumerate(texts)}
            for texts in (vl.floor(family), vl.ceiling(family))
        )  # fmt: skip
        assert metrics.score(field, items, ceiling, "ceiling").summary["accuracy"] == 1
        most = Counter[str]()
        for kind in {one.kind for one in asked}:
            train = Counter(one.answer for *_, one in getattr(families, family)("train") if one.kind == kind)
            most[kind] = sum(
                one.answer == max(train, key=lambda text: train[text]) for one in asked if one.kind == kind
            )
        found = metrics.score(field, items, floor, "floor").summary["accuracy"]
        assert found == pytest.approx(most.total() / len(asked)) and 0.2 < found < 0.55
    captions = families.coco("test")
    items = [{"id": key, "references": list(texts[1:])} for key, texts in captions]
    scores = [
        metrics.score("cider_d", items, dict(zip([key for key, _ in captions], texts, strict=True)), "captions")
        for texts in (vl.floor("coco"), vl.ceiling("coco"))
    ]
    floor, ceiling = (one.summary["cider_d"] for one in scores)
    assert floor is not None and ceiling is not None and 0 <= floor < 0.6 < 1 < ceiling < 10
    assert vl.floor("coco")[0] in {text for _, texts in families.coco("train") for text in texts}


def test_prose_tells_everything_once_and_knows_what_it_is_about() -> None:
    for number in range(50):
        things = scene("prose", number)
        told = prose(things, Random(number))
        assert sorted(bits for _, bits in told) == [1 << k for k in range(len(things))]
        for text, bits in told:
            thing = things[bits.bit_length() - 1]
            assert all(word in text for word in (thing.colour, thing.shape, thing.size, thing.place))


def test_a_drawing_has_the_colours_of_the_scene() -> None:
    things = scene("prose", 3)
    drawn = {colour for _, colour in vl.draw(things).getcolors(1 << 16)}  # type: ignore[union-attr]
    assert {t.colour for t in things} == {name for name, colour in PAINT.items() if colour in drawn}


def test_documents_depend_on_their_number_alone() -> None:
    assert corpus.document(7, picking=False) == corpus.document(7, picking=False)
    kinds = Counter(corpus.document(number, picking=False).kind for number in range(600))
    assert kinds.keys() == corpus.SHARES.keys()
