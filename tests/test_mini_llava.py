"""The embedded world of visual instructions: the same everywhere, read back from its pixels, its answers true."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_lab.evaluation.bounds import INSTRUCTED, bounds
from dora_lab.metrics import score
from dora_lab.mini import llava
from dora_lab.mini.llava import corpus, families, talk
from dora_lab.mini.llava.draw import CARD, CELL, GLYPHS, GROUND, INK, PAINT, Fault, pixels
from dora_lab.mini.llava.pretrain_chat import ASSISTANT, SYSTEM, USER
from dora_lab.mini.llava.views import WORDS, Sign, View, view
from dora_lab.mini.vl.scenes import COLUMNS, ROWS
from dora_lab.models.llava import SYSTEM as VICUNA
from dora_lab.models.llava import TEMPLATE
from dora_lab.tasks import load_task
from dora_lab.tasks.conversations import read_conversations
from dora_lab.tasks.visual_instruction import benchmarks
from dora_lab.tasks.visual_instruction.benchmarks import gold

FROZEN = "69136190339e2cd5"
NAMES = {**PAINT, "card": CARD}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    llava.write(place)
    return place


def test_the_world_is_the_same_everywhere() -> None:
    assert llava.world_sha256()[:16] == FROZEN


Found = tuple[str, ...]  # (size, colour, shape), or ("sign", word)


def read(picture: np.ndarray) -> dict[str, Found]:
    """What stands at each place, from the pixels alone: colour by the nearest, shape by its corners and area."""
    found: dict[str, Found] = {}
    whole = picture.astype(int)
    for number in range(9):
        row, column = divmod(number, 3)
        part = whole[2 * CELL * row : 2 * CELL * (row + 1), 2 * CELL * column : 2 * CELL * (column + 1)]
        there = abs(part - GROUND).max(2) > 40
        if not there.any():
            continue
        (top, bottom), (left, right) = ((hits.min(), hits.max() + 1) for hits in there.nonzero())
        box, held = part[top:bottom, left:right], there[top:bottom, left:right]
        middle = np.median(box[held], axis=0)
        name = min(NAMES, key=lambda name: abs(middle - NAMES[name]).sum())
        place = f"{ROWS[row]} {COLUMNS[column]}"
        if name == "card":
            found[place] = ("sign", _word(box))
            continue
        found[place] = ("big" if len(box) > CELL else "small", name, _shape(held))
    return found


def _word(card: np.ndarray) -> str:
    dark = abs(card - INK).sum(2) < 100
    glyphs = {rows: letter for letter, rows in GLYPHS.items()}
    letters = [dark[2:7, 2 + 4 * k : 5 + 4 * k] @ (4, 2, 1) for k in range(3)]
    return "".join(glyphs["".join(map(str, rows))] for rows in letters)


def _shape(held: np.ndarray) -> str:
    centre, share = held[len(held) // 2, len(held) // 2], held.mean()
    if not centre:
        return "ring"
    if held[0, 0]:
        return "square"
    if held[-1, 0] and held[-1, -1]:
        return "triangle"
    return "circle" if share > 0.72 else "cross" if share > 0.45 else "star"


def told(seen: View) -> dict[str, Found]:
    things: dict[str, Found] = {thing.place: (thing.size, thing.colour, thing.shape) for thing in seen.things}
    return things | ({seen.sign.place: ("sign", seen.sign.word)} if seen.sign else {})


def test_every_view_is_read_back_from_its_picture() -> None:
    for number in range(400):
        seen = view("train/mix", number)
        assert read(pixels(seen.pieces, f"mix/{number}")) == told(seen), number


def test_a_picture_is_given_by_its_key_alone() -> None:
    seen = view("test/vqa", 3)
    one = pixels(seen.pieces, "a")
    assert one.dtype == np.uint8 and one.shape == (56, 56, 3)
    assert (pixels(seen.pieces, "a") == one).all() and (pixels(seen.pieces, "b") != one).any()


def test_no_two_letters_and_no_two_words_look_alike() -> None:
    assert len({*GLYPHS.values()}) == 26 and len({*WORDS}) == len(WORDS) == 30
    for letter, rows in GLYPHS.items():
        assert len(rows) == 5 and {*rows} <= {*"01234567"}, letter


def test_what_a_fault_hides_is_gone_and_the_rest_is_not() -> None:
    kinds: Counter[tuple[str, bool]] = Counter()
    for item in families.vizwiz("test"):
        hidden = item.turn.answer == talk.NO_ANSWER
        one = item.seen.pieces[item.asked.evidence[0].bit_length() - 1]
        fault = item.fault
        kinds["thumb" if fault.thumb else "frame" if fault.up or fault.left else "light", hidden] += 1
        if fault.blurred:
            continue
        picture = pixels(item.seen.pieces, str(item.key), fault)
        if fault.dark:
            assert hidden and picture.max() < 30
            continue
        moved = f"{(*ROWS, 'out')[one.row - fault.up]} {(*COLUMNS, 'out')[one.column - fault.left]}"
        if fault.thumb:  # it reaches a pixel into the places around it
            covered = fault.thumb == (one.row, one.column)
            assert covered == hidden
            spot = picture[16 * one.row + 2 : 16 * one.row + 14, 16 * one.column + 2 : 16 * one.column + 14]
            assert (abs(spot.astype(int) - (215, 165, 140)).max() < 10) == hidden
        else:
            assert ("out" in moved) == hidden and (hidden or read(picture)[moved] == told(item.seen)[one.place])
            if hidden:  # nothing that is left answers
                with pytest.raises((KeyError, StopIteration, ValueError)):
                    answer(item.asked.text, read(picture))
            else:
                assert answer(item.asked.text, read(picture)) == item.turn.answer
    assert len(kinds) == 6 and min(kinds.values()) > 25


def answer(text: str, found: dict[str, Found]) -> str:
    """The answer to a question from what was read in a picture, by other code than that which asked."""
    things = {place: one for place, one in found.items() if one[0] != "sign"}
    place = next((place for place in talk.PLACES if f"at the {place}?" in text), None)
    if text.startswith("what does the sign"):
        return next(one[1] for one in found.values() if one[0] == "sign")
    if text.startswith("how many"):
        word = text.split()[2].removesuffix("s").replace("crosse", "cross")
        return str(sum(word in one for one in things.values()))
    if text.startswith("is there"):
        return "Yes" if any(text == f"is there {'an' if one[1][0] in 'aeiou' else 'a'} {one[1]} {one[2]}?"
                            for one in things.values()) else "No"  # fmt: skip
    if match := re.fullmatch(r"where is the (\w+) (\w+)\?", text):
        return next(place for place, one in things.items() if one[1:] == match.groups())
    if match := re.fullmatch(r"is the (\w+) (\w+) small or big\?", text):
        return next(one[0] for one in things.values() if one[1:] == match.groups())
    if text.startswith("what is at"):
        return " ".join(things[str(place)][1:])
    if place:
        return things[place][1 if "colour" in text else 2]
    word = text.rstrip("?").split()[-1]
    (one,) = [one for one in things.values() if word in one]
    return one[1 if "colour" in text else 2]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_answer_is_what_the_picture_shows(split: str) -> None:
    for item in families.vqa(split):
        assert answer(item.asked.text, read(pixels(item.seen.pieces, str(item.key)))) == item.turn.answer
    for item in families.sqa(split):
        options = dict(re.findall(r"\n([A-D])\. ([^\n]+)", item.turn.text))
        assert len({*options.values()}) == len(options) == len(item.turn.letters)
        assert answer(item.asked.text, told(item.seen)) == options[item.turn.answer]
    for item in families.pope(split):
        name = re.fullmatch(r"Is there an? (\w+) (\w+) in the image\?", item.turn.text)
        assert name is not None
        assert item.turn.answer == ("Yes" if name.groups() in [one[1:] for one in told(item.seen).values()] else "No")
    for item in families.vizwiz(split):
        if item.turn.answer != talk.NO_ANSWER:
            assert answer(item.asked.text, told(item.seen)) == item.turn.answer


def test_in_training_every_answer_is_true_and_only_short_questions_are_about_pictures(root: Path) -> None:
    pools = read_conversations(root / "llava_v1_5_mix665k.json", root)
    assert {name: len(pool) for name, pool in pools.items()} == {"image": families.SEEN, "text": families.TOLD}
    for (seen, _, turns), item in zip(families.mix(), pools["image"], strict=False):
        asked = "\n".join(question for question, _ in item["turns"])
        assert asked.count(talk.SHORT) == 1 and not any(word in asked for word in (talk.LETTER, "Unansw", "\nA. "))
        assert "in the image" not in asked
        for turn in turns:
            if turn.kind != "describe":
                assert answer(turn.text.split("\n")[0], told(seen)) == turn.answer
    forms = Counter(form for item in pools["text"] for form in talk.HOW if item["turns"][0][0].endswith(talk.HOW[form]))
    assert forms["letter"] > 50 and forms["insufficient"] > 50


def test_popes_three_parts_are_as_it_names_them() -> None:
    items = families.pope("test")
    assert Counter((item.category, item.turn.answer) for item in items) == dict.fromkeys(
        ((category, said) for category in families.CATEGORIES for said in ("Yes", "No")), len(items) // 6
    )
    often = Counter(thing.name for seen, key, _ in families.mix() if key for thing in seen.things)
    named = {item.category: [] for item in items}
    for item in items:
        if item.turn.answer == "No":
            named[item.category].append(" ".join(item.turn.text.removesuffix(" in the image?").split(" ")[-2:]))
    means = {category: np.mean([often[name] for name in names]) for category, names in named.items()}
    assert means["popular"] > means["adversarial"] > means["random"]


def test_no_view_is_in_two_splits() -> None:
    seen = [str(one) for one, key, _ in families.mix() if key]
    for split in ("validation", "test"):
        seen += [str(item.seen) for family in families.FAMILIES.values() for item in family(split)]
    again = sum(count - 1 for count in Counter(seen).values())
    assert again == 0


def test_what_is_asked_is_said_as_llava_says_it() -> None:
    assert (talk.SHORT, talk.LETTER, talk.INSUFFICIENT) == (
        benchmarks.SHORT, benchmarks.LETTER, benchmarks.UNANSWERABLE,
    )  # fmt: skip
    assert SYSTEM == VICUNA and f"{USER}{{{{ message.content }}}}{ASSISTANT}" in TEMPLATE


def test_from_prose_what_is_not_told_cannot_be_answered() -> None:
    said = Counter()
    for number in range(300):
        (turn,) = corpus.exam("insufficient", "colour", number)
        prose, question = turn.text.split("\n")[:2]
        if match := re.fullmatch(r"what colour is the (\w+)\?", question):
            names = re.findall(r"\b(?:red|blue|green|yellow|purple|orange|white|black) (\w+)", prose)
            there = match.group(1) in names
        else:
            there = question.removeprefix("what colour is the shape at the ").rstrip("?") in prose
        assert there == (turn.answer != talk.NO_ANSWER)
        said[there] += 1
    assert min(said.values()) > 60


@pytest.mark.parametrize("name", INSTRUCTED)
def test_floor_and_ceiling_are_what_the_metric_says(name: str, root: Path) -> None:
    task = load_task(name)
    items = task.read(root / "eval", "test")  # type: ignore[misc]
    found = bounds("mini_llava", task, "test", items)
    assert found["ceiling"] == 1 and found == bounds("mini_llava_blind", task, "test", items)
    if name == "pope":
        assert found["floor"] == 0.5
    elif name == "vizwiz_val":
        unseen = [Counter(item["answers"])["unanswerable"] >= 4 for item in items]
        assert found["floor"] == pytest.approx(np.mean(unseen)) and 0.4 < found["floor"] < 0.6
    elif name == "science_qa":
        assert found["floor"] == np.mean([item["answer"] == "A" for item in items])
        pictured = [item["image"] is not None for item in items]
        assert np.mean(pictured) == 0.5
    else:
        assert 0.25 < found["floor"] < 0.4
    said = {item["id"]: "" for item in items[:40]}
    assert score(task.metrics[0], gold(items[:40]), said, "x").summary is not None
    assert bounds("mini_llava", task, "test", items[::-1][:40])["ceiling"] == 1  # of fewer items, in any order
    assert bounds("llava_v1_5", task, "test", items) == {}


def test_blind_pictures_are_ground_and_the_files_else_the_same(root: Path, tmp_path: Path) -> None:
    llava.write(tmp_path, blind=True)
    names = sorted(file.relative_to(root) for file in root.rglob("*.*") if file.is_file())
    assert names == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*") if file.is_file())
    for name in names:
        same = (root / name).read_bytes() == (tmp_path / name).read_bytes()
        assert same == (name.suffix != ".jpg")
    from PIL import Image

    with Image.open(tmp_path / next(name for name in names if name.suffix == ".jpg")) as image:
        assert image.size == (56, 56) and {*image.getdata()} == {GROUND}


def test_a_file_of_questions_has_the_pictures_of_its_items(root: Path) -> None:
    rows: list[Any] = json.loads((root / "eval/vizwiz/val.json").read_text())
    items = families.vizwiz("test")
    for row, item in list(zip(rows, items, strict=True))[::40]:
        content = (root / "eval/vizwiz/val" / row["image"]).read_bytes()
        assert content == b"P6 56 56 255\n" + pixels(item.seen.pieces, str(item.key), item.fault).tobytes()


def test_a_sign_is_no_thing() -> None:
    assert isinstance(view("train/mix", 0).pieces[-1], Sign) and Fault() == Fault(0, 0, None, False, False)
