"""The world as LLaVA's `playground/data`: conversations about pictures, and four benchmarks in the files of theirs.

Only short questions (mini-VQA) are asked about pictures in training; beside them are conversations in prose alone, as
the mix of LLaVA has some, in every form. Of pictures no conversation has letters, leave to say "Unanswerable" or POPE's
words. Splits are "train", "validation", "test"; a picture is a function of its benchmark, split and number.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random
from typing import Any, NamedTuple

from dora_lab.mini.llava import corpus, talk
from dora_lab.mini.llava.draw import FINE, Fault
from dora_lab.mini.llava.talk import HOW, OTHERS, PICKING, VALUES, Piece, Turn
from dora_lab.mini.llava.views import WORDS, View, sentences, view
from dora_lab.mini.vl import families as vl
from dora_lab.mini.vl.questions import Asked
from dora_lab.mini.vl.scenes import COLOURS, SHAPES, a

Files = dict[str, Any]
SEEN, TOLD = 2400, 240  # conversations of the mix: about a picture, in prose alone
COUNTS = {"validation": 256, "test": 512}  # questions of each benchmark, of POPE three quarters of it
CATEGORIES = ("random", "popular", "adversarial")
UNANSWERABLE = "unanswerable"  # as VizWiz has it
SLIPS = 0.08  # share of a person's answers that are not the right one
_NUMBER = {"vqa": 0, "vizwiz": 1, "sqa": 2, "pope": 3, "mix": 4}


class Item(NamedTuple):
    """A question of a benchmark: the view, which its picture shows with a fault (None: no picture), and the turn."""

    seen: View
    key: str | None  # of the picture
    fault: Fault
    asked: Asked
    turn: Turn
    category: str = ""


def _view(family: str, split: str, number: int) -> View:
    return view(f"{split}/{family}", number)


@cache
def mix() -> tuple[tuple[View, str | None, list[Turn]], ...]:
    """(view, its picture or None, conversation) of training."""
    found: list[tuple[View, str | None, list[Turn]]] = []
    for number in range(SEEN):
        seen, rng = _view("mix", "train", number), Random(f"mix/{number}")
        kinds = (*PICKING, *OTHERS * 2)
        turns: list[Turn] = []
        while len(turns) < corpus.TURNS:
            if (asked := talk.ask(seen, rng.choice(kinds), rng, rng.random() < 0.5)) is not None:
                turns.append(talk.short(asked))
        if rng.random() < corpus.DESCRIBED:
            turns[-1] = talk.describe(sentences(seen, rng))
        found.append((seen, f"{number:012}", talk.conversation("short", turns)))
    for number in range(TOLD):
        rng = Random(f"mix/told/{number}")
        form = rng.choice(list(corpus.FORMS))
        found.append((View((), None), None, corpus.told(form, corpus.KINDS[form], rng, corpus.TURNS)))
    return tuple(found)


@cache
def vqa(split: str) -> tuple[Item, ...]:
    """Short questions of every kind about pictures without fault."""
    kinds = tuple(dict.fromkeys((*PICKING, *OTHERS)))
    return tuple(_items("vqa", split, kinds, lambda seen, asked, rng, n: (FINE, talk.short(asked))))


@cache
def vizwiz(split: str) -> tuple[Item, ...]:
    """Picking questions about photographs with a fault; in every other one what is asked about cannot be seen."""

    def made(seen: View, asked: Asked, rng: Random, number: int) -> tuple[Fault, Turn] | None:
        hidden = number % 2 == 0
        places = " at the " in asked.text or (not hidden and asked.kind == "where")
        fault = _fault(seen, asked.evidence[0].bit_length() - 1, hidden, places, rng)
        return fault and (fault, talk.unanswerable(asked) if hidden else talk.short(asked))

    return tuple(_items("vizwiz", split, PICKING, made))


def _fault(seen: View, about: int, hidden: bool, places: bool, rng: Random) -> Fault | None:
    """One that hides the thing of that number, or hides nothing; None where this view has no such.

    places: question or answer name a place. It would be another one if the frame moved.
    """
    one = seen.pieces[about]
    rows, columns = {piece.row for piece in seen.pieces}, {piece.column for piece in seen.pieces}
    free = [(row, column) for row in range(3) for column in range(3)]
    free = [place for place in free if place not in {(piece.row, piece.column) for piece in seen.pieces}]
    kind = rng.choice(("thumb", "light") if places else ("thumb", "light", "frame", "frame"))
    if kind == "thumb":
        return Fault(thumb=(one.row, one.column) if hidden else rng.choice(free))
    if kind == "light":
        return Fault(dark=True) if hidden else Fault(blurred=True)
    out = [one.row == 0, one.column == 0] if hidden else [0 not in rows, 0 not in columns]
    if not any(out):
        return None
    up = rng.choice([k for k, fits in enumerate(out) if fits]) == 0
    return Fault(up=int(up), left=int(not up))


@cache
def sqa(split: str) -> tuple[Item, ...]:
    """Questions with letters; of every two one is about a picture, the other about what is told."""
    return tuple(
        item if number % 2 == 0 else item._replace(key=None)
        for number, item in enumerate(
            _items("sqa", split, tuple(VALUES), lambda seen, asked, rng, n: (FINE, talk.letter(asked, seen, rng)))
        )
    )


@cache
def pope(split: str) -> tuple[Item, ...]:
    """Is there such a shape? As often as not; what is not there is drawn from all, from the names that training
    pictures have most often, or from those that they have most often beside one that is there."""
    found = []
    for number in range(3 * COUNTS[split] // 4):
        seen, rng = _view("pope", split, number), Random(f"questions/pope/{split}/{number}")
        category, yes = CATEGORIES[number % 3], number // 3 % 2 == 0
        names = [thing.name for thing in seen.things]
        name = rng.choice(names) if yes else _absent(names, category, rng)
        text = f"Is there {a(name)} in the image?"
        asked = Asked("exist", [(text, 0)], "yes" if yes else "no", (0,))
        turn = Turn("exist", (Piece(text),), "Yes" if yes else "No", 0)
        found.append(Item(seen, _key("pope", split, number), FINE, asked, turn, category))
    return tuple(found)


def _absent(names: list[str], category: str, rng: Random) -> str:
    if category == "random":
        return rng.choice([f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in names])
    alone, beside = _counted()
    count = alone if category == "popular" else sum((beside[name] for name in names), Counter[str]())
    often = [name for name, _ in count.most_common() if name not in names]
    return rng.choice(often[:3])


@cache
def _counted() -> tuple[Counter[str], dict[str, Counter[str]]]:
    """How many pictures of the mix show a thing of that name, and which others with it."""
    alone: Counter[str] = Counter()
    beside: dict[str, Counter[str]] = {f"{c} {s}": Counter() for c in COLOURS for s in SHAPES}
    for seen, key, _ in mix():
        names = [thing.name for thing in seen.things] if key else []
        alone.update(names)
        for name in names:
            beside[name].update(other for other in names if other != name)
    return alone, beside


def _key(family: str, split: str, number: int) -> str:
    """Twelve digits, as COCO's pictures have them: benchmark, split, number."""
    return f"{_NUMBER[family]}{('train', 'validation', 'test').index(split)}{number:010}"


def _items(family: str, split: str, kinds: tuple[str, ...], made: Any) -> list[Item]:
    """As many questions as `COUNTS` says, one of a view, kinds and yes and no in equal parts."""
    found: list[Item] = []
    number = 0
    while len(found) < COUNTS[split]:
        seen, rng = _view(family, split, number), Random(f"questions/{family}/{split}/{number}")
        number += 1
        turn, kind = divmod(len(found), len(kinds))
        asked = talk.ask(seen, kinds[kind], rng, turn % 2 == 0)
        if asked is not None and (both := made(seen, asked, rng, len(found) + turn)) is not None:
            found.append(Item(seen, _key(family, split, number), both[0], asked, both[1]))
    return found


def people(asked: Asked, truth: str, rng: Random) -> list[str]:
    """What ten people answer: the truth, in other words now and then, or a slip as people make them."""
    if truth == UNANSWERABLE or asked.kind == "read":
        wrong = [word for word in WORDS if word != asked.answer] if asked.kind == "read" else [asked.answer]
        return [rng.choice(wrong) if rng.random() < SLIPS else truth for _ in range(vl.ANNOTATORS)]
    return vl.said(asked, rng)


def said(item: Item) -> list[str]:
    """The answers of ten people to a question of mini-VQA or mini-VizWiz."""
    truth = UNANSWERABLE if item.turn.answer == talk.NO_ANSWER else item.asked.answer
    return people(item.asked, truth, Random(f"people/{item.key}"))


def conversations() -> list[Files]:
    """The mix."""
    rows = []
    for number, (_, key, turns) in enumerate(mix()):
        lines = [("human", turn.text.strip()) if k == 0 else ("gpt", turn.answer) for turn in turns for k in (0, 1)]
        row: Files = {"id": key or f"told{number}"}
        if key:
            row["image"] = f"coco/train2017/{key}.jpg"
            lines[0] = ("human", f"<image>\n{lines[0][1]}")
        rows.append(row | {"conversations": [{"from": who, "value": text} for who, text in lines]})
    return rows


def benchmarks(split: str) -> Files:
    """By name below the folder of the benchmarks: the value of a JSON file, or the rows of a file of lines."""
    questions, annotations = [], []
    for number, item in enumerate(vqa(split)):
        about = {"question_id": number, "image_id": int(item.key or 0)}
        questions.append(about | {"question": item.turn.text})
        answers = [{"answer_id": k, "answer": text} for k, text in enumerate(said(item), 1)]
        annotations.append(about | {"question_type": item.asked.kind, "answers": answers})
    answered = [
        {"image": f"VizWiz_val_{item.key}.jpg", "question": item.turn.text}
        | {"answers": [{"answer": text} for text in said(item)]}
        for item in vizwiz(split)
    ]
    problems, asked = {}, []
    for number, item in enumerate(sqa(split), 1):
        options = [piece.text[4:] for piece in item.turn.said if piece.part == "option"]
        told = "" if item.key else "".join(text for text, _ in sentences(item.seen, Random(f"told/{split}/{number}")))
        text = f"{told.strip()}\n{item.turn.text}" if told else item.turn.text
        value = f"<image>\n{text}" if item.key else text
        right = item.turn.letters.index(item.turn.answer)
        problems[str(number)] = {"question": item.asked.text, "choices": options, "answer": right, "hint": told.strip()}
        row: Files = {"id": str(number), "conversations": [{"from": "human", "value": value}]}
        asked.append(row | ({"image": f"{item.key}.jpg"} if item.key else {}))
    lines: list[Files] = []
    labels: Files = {f"pope/coco/coco_pope_{category}.json": [] for category in CATEGORIES}
    for number, item in enumerate(pope(split)):
        about = {"question_id": number, "image": f"COCO_val2014_{item.key}.jpg"}
        lines.append(about | {"text": f"{item.turn.text}\n{HOW['short']}", "category": item.category})
        label = {"text": item.turn.text, "label": item.asked.answer}
        labels[f"pope/coco/coco_pope_{item.category}.json"].append(about | label)
    return {
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": {"questions": questions},
        "vqav2/v2_mscoco_val2014_annotations.json": {"annotations": annotations},
        "vizwiz/val.json": answered,
        "scienceqa/problems.json": problems,
        "scienceqa/pid_splits.json": {"test": [*problems]},
        "scienceqa/llava_test_CQM-A.json": asked,
        "pope/llava_pope_test.jsonl": lines,
        **labels,
    }


def pictures(split: str) -> dict[str, tuple[View, str, Fault]]:
    """By file below the folder of the split: what it shows, with its key."""
    if split == "train":
        return {f"coco/train2017/{key}.jpg": (seen, f"mix/{key}", FINE) for seen, key, _ in mix() if key}
    places = {
        "vqav2/val2014/COCO_val2014_{}.jpg": vqa, "vizwiz/val/VizWiz_val_{}.jpg": vizwiz,
        "scienceqa/images/test/{}.jpg": sqa, "pope/val2014/COCO_val2014_{}.jpg": pope,
    }  # fmt: skip
    return {
        name.format(item.key): (item.seen, item.key, item.fault)
        for name, family in places.items()
        for item in family(split)
        if item.key
    }


FAMILIES = {"vqa": vqa, "vizwiz": vizwiz, "sqa": sqa, "pope": pope}


def floor(family: str, split: str) -> dict[str, str]:
    """What to answer without looking, by item: mini-VQA's most frequent answer to the kind in the mix, "Unanswerable",
    the first letter, "Yes"."""
    given: dict[str, Counter[str]] = {}
    for _, key, turns in mix():
        for turn in turns if key else ():
            given.setdefault(turn.kind, Counter())[turn.answer] += 1
    always = {"vizwiz": talk.NO_ANSWER, "sqa": "A", "pope": "Yes"}.get(family)
    named = identified(family, split)
    return {name: always or given[item.turn.kind].most_common(1)[0][0] for name, item in named.items()}


def ceiling(family: str, split: str) -> dict[str, str]:
    """The truth, by item."""
    return {name: item.turn.answer for name, item in identified(family, split).items()}


def identified(family: str, split: str) -> dict[str, Item]:
    """The items of a benchmark by what its files call them."""
    names = {"vizwiz": "VizWiz_val_{item.key}.jpg", "sqa": "{next}"}
    return {
        names.get(family, "{number}").format(item=item, number=number, next=number + 1): item
        for number, item in enumerate(FAMILIES[family](split))
    }
