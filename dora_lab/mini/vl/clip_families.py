"""What is asked and said about clips, as rows of the files in which VALUE keeps TVQA and TVC, and the files.

A question has five answers of one kind; those that are wrong are shown in the clip, too, as far as it has so many:
what is asked for is which of them belongs to what the question names. Splits are "train", "validation" and "test".
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from dora_lab.mini.vl.clips import Clip, alone, clip, filmed
from dora_lab.mini.vl.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Thing, a

SPLITS = ("train", "validation", "test")
CLIPS = {"train": 2000, "validation": 128, "test": 256}
QUESTIONS, REFERENCES, ANSWERS = 4, 4, 5  # of a clip, of a clip, of a question
SECONDS = 1.5  # from frame to frame
# the caption of the first 25 training clips that does best when it is said of every validation clip
ONE_FOR_ALL = (
    "an orange star at the middle right and at the top centre, a yellow cross, a blue square at the bottom left."
)
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)

Row = dict[str, Any]


class Question(NamedTuple):
    """A question about a clip, its answers, and which of them is right."""

    clip: str
    kind: str
    text: str
    answers: tuple[str, ...]
    right: int


Asker = Callable[[Clip, Random], "tuple[str, str, list[str]] | None"]  # question, answer, wrong ones by preference


def keys(split: str) -> list[str]:
    """Names of a split's clips."""
    return [f"{split}_{number:05}" for number in range(CLIPS[split])]


def _things(film: Clip) -> list[Thing]:
    """Each of its things once."""
    return [*{thing.name: thing for thing in film.shots}.values()]


def _one(film: Clip, field: str, rng: Random) -> Thing | None:
    """A thing whose shape, or colour, no other has."""
    things = _things(film)
    found = [thing for thing in things if alone(tuple(things), field, thing)]
    return rng.choice(found) if found else None


def _values(film: Clip, field: str, every: tuple[str, ...], rng: Random) -> list[str]:
    """Colours, or shapes: those of the clip's things first."""
    shown = [*{getattr(thing, field) for thing in film.shots}]
    return [*rng.sample(sorted(shown), len(shown)), *rng.sample(every, len(every))]


def _names(film: Clip, rng: Random) -> list[str]:
    """Names of things: those of the clip first, then what has the colour of one and the shape of another, then any."""
    mixed = [f"{one.colour} {other.shape}" for one in _things(film) for other in _things(film)]
    every = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return [name for names in (film.names, mixed, every) for name in rng.sample(names, len(names))]


def _places(film: Clip, rng: Random) -> list[str]:
    shown = [thing.place for thing in film.shots]
    return [*rng.sample(shown, len(shown)), *rng.sample(PLACES, len(PLACES))]


def colour(film: Clip, rng: Random) -> tuple[str, str, list[str]] | None:
    thing = _one(film, "shape", rng)
    return thing and (f"what colour is the {thing.shape}?", thing.colour, _values(film, "colour", COLOURS, rng))


def shape(film: Clip, rng: Random) -> tuple[str, str, list[str]] | None:
    thing = _one(film, "colour", rng)
    return thing and (f"which shape is {thing.colour}?", thing.shape, _values(film, "shape", SHAPES, rng))


def what(film: Clip, rng: Random) -> tuple[str, str, list[str]]:
    thing = rng.choice(film.shots)
    return f"what is at the {thing.place}?", thing.name, _names(film, rng)


def where(film: Clip, rng: Random) -> tuple[str, str, list[str]]:
    still = [name for name in film.names if len(film.places(name)) == 1]
    name = rng.choice(still)
    return f"where is the {name}?", film.places(name)[0], _places(film, rng)


def moved(film: Clip, rng: Random) -> tuple[str, str, list[str]] | None:
    moving = [name for name in film.names if len(film.places(name)) == 2]
    if not moving:
        return None
    at = rng.randrange(2)
    places = film.places(moving[0])
    return f"where is the {moving[0]} {('first', 'last')[at]}?", places[at], [places[1 - at], *_places(film, rng)]


def order(film: Clip, rng: Random) -> tuple[str, str, list[str]]:
    at = rng.randrange(2)
    return f"what is {('first', 'last')[at]}?", film.shots[-at].name, _names(film, rng)


def said(film: Clip, rng: Random) -> tuple[str, str, list[str]]:
    person, thing = rng.choice(film.said)
    return f"what colour does {person} see?", thing.colour, _values(film, "colour", COLOURS, rng)


KINDS: dict[str, Asker] = {
    "colour": colour, "shape": shape, "what": what, "where": where, "moved": moved, "order": order, "said": said,
}  # fmt: skip


@cache
def questions(split: str) -> tuple[Question, ...]:
    """`QUESTIONS` about each clip of a split, no two of one kind; kinds in about equal parts."""
    found = []
    for key in keys(split):
        rng, film = Random(f"questions/clips/{key}"), clip(key)
        kinds = iter(rng.sample([*KINDS], len(KINDS)))
        mine: list[Question] = []
        while len(mine) < QUESTIONS:
            kind = next(kinds)
            if made := KINDS[kind](film, rng):
                text, answer, wrong = made
                others = [value for value in dict.fromkeys(wrong) if value != answer][: ANSWERS - 1]
                rng.shuffle(others)
                at = rng.randrange(ANSWERS)
                mine.append(Question(key, kind, text, (*others[:at], answer, *others[at:]), at))
        found += mine
    return tuple(found)


@cache
def captions(key: str) -> tuple[str, ...]:
    """What `REFERENCES` people say that happens in a clip, each in other words."""
    rng = Random(f"captions/clips/{key}")
    found: dict[str, None] = {}
    while len(found) < REFERENCES:
        found[_caption(clip(key), rng)] = None
    return tuple(found)


def _caption(film: Clip, rng: Random) -> str:
    """Two or three of the things, by when they come; where the one that moves is seen first and last is always told.

    All in words of the base's prose: an adapter leaves the embedding of words alone, and learns no spelling.
    """
    names = film.names
    told = rng.sample(range(len(names)), rng.choice((2, 3, 3)))
    told = [k for k, name in enumerate(names) if k in told or len(film.places(name)) == 2]
    parts = []
    for name in (names[k] for k in told[:3]):
        places = film.places(name)
        shown = places if len(places) == 2 or rng.random() < 1 / 3 else []
        parts.append(a(name) + " and".join(f" at the {place}" for place in shown))
    return rng.choice(("", "", "we see ")) + rng.choice((", ", ", ", " and ")).join(parts) + "."


def files(held: str = "test") -> dict[str, list[Row]]:
    """The files by their names in ``ann``; those of VALUE's validation items are about the clips of `held`."""
    found: dict[str, list[Row]] = {
        "tv_subtitles.jsonl": [_subtitles(key) for split in ("train", held) for key in keys(split)]
    }
    for split, part in (("train", "train"), (held, "val")):
        found[f"tvqa/tvqa_{part}.jsonl"] = [_asked(number, one) for number, one in enumerate(questions(split))]
        found[f"tvc/tvc_{part}_release.jsonl"] = [_told(number, key) for number, key in enumerate(keys(split))]
    return found


def _seconds(key: str) -> float:
    return SECONDS * len(clip(key).frames)


def _subtitles(key: str) -> Row:
    lines = [f"{person}: see the {thing.shape}." for person, thing in clip(key).said]
    length = _seconds(key) / len(lines)
    return {
        "vid_name": key,
        "sub": [{"text": text, "start": k * length, "end": (k + 1) * length} for k, text in enumerate(lines)],
    }


def _asked(number: int, one: Question) -> Row:
    return {
        "qid": number, "show_name": "mini", "vid_name": one.clip, "ts": f"0.0-{_seconds(one.clip)}", "q": one.text,
        **{f"a{k}": answer for k, answer in enumerate(one.answers)}, "answer_idx": one.right,
    }  # fmt: skip


def _told(number: int, key: str) -> Row:
    told = [{"desc": text, "desc_id": REFERENCES * number + k, "type": "v"} for k, text in enumerate(captions(key))]
    return {
        "clip_id": number, "vid_name": key, "duration": _seconds(key), "ts": [0.0, _seconds(key)], "descs": told
    }  # fmt: skip


def write(root: Path, blind: bool = False) -> Path:
    """A folder in VALUE's layout: annotations, subtitles, and features of every clip that they name; in `validation`
    the annotations once more, with the items of that split in the place of the test items.

    Args:
        blind: features all zero: what is left is what questions and subtitles give away.
    """
    for folder, held in ((root, "test"), (root / "validation", "validation")):
        for name, rows in files(held).items():
            file = folder / "ann" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    place = root / "vis_features" / "tv" / "clip-vit"
    place.mkdir(parents=True)
    for key in (key for split in SPLITS for key in keys(split)):
        np.savez(place / f"{key}.npz", features=filmed(key) * np.float16(not blind))
    return root


@cache
def clips_sha256() -> str:
    """SHA-256 of all annotations and of the features of every clip: the identity of the data."""
    digest = hashlib.sha256(json.dumps([files(held) for held in ("test", "validation")], sort_keys=True).encode())
    for key in (key for split in SPLITS for key in keys(split)):
        digest.update(f"\x1f{key}".encode() + filmed(key).tobytes())
    return digest.hexdigest()


def floor(family: str, held: str = "test") -> list[str]:
    """What to answer without looking at clip or list: to each question what training clips answer most often to the
    same words (where none was asked so, to its kind), of captions ("tvc") `ONE_FOR_ALL`."""
    if family == "tvc":
        return [ONE_FOR_ALL] * CLIPS[held]
    given: dict[str, Counter[str]] = {}
    for one in questions("train"):
        for asked in (one.text, one.kind):
            given.setdefault(asked, Counter())[one.answers[one.right]] += 1
    return [given[one.text if one.text in given else one.kind].most_common(1)[0][0] for one in questions(held)]


def ceiling(family: str, held: str = "test") -> list[str]:
    """The truth to each item of a split; of captions the first of four, to be held against the other three."""
    if family == "tvc":
        return [captions(key)[0] for key in keys(held)]
    return [one.answers[one.right] for one in questions(held)]
