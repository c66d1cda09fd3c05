"""What is asked about scenes: questions of one step (VQA), of two (GQA), statements about two scenes (NLVR2), captions.

A function of `KINDS` or `PROGRAMS` makes one question about a scene, or None where the scene does not allow it. Whether
yes or no is to be the answer is given and the question made for it, so that guessing is worth no more than chance.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from dora_lab.mini.vl.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Scene, Segments, Thing, a


class Asked(NamedTuple):
    """A question in segments, its answer, and the things to look at for it, one set of bits for each step."""

    kind: str
    said: Segments
    answer: str
    evidence: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.said)


Asker = Callable[[Scene, Random, bool], "Asked | None"]  # scene, random numbers, whether to say yes
RELATIONS = {"left of": ("column", 1), "right of": ("column", -1), "above": ("row", 1), "below": ("row", -1)}


def holds(relation: str, one: Thing, other: Thing) -> bool:
    """Is the one thing left of, right of, above or below the other?"""
    axis, sign = RELATIONS[relation]
    return sign * getattr(one, axis) < sign * getattr(other, axis)


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _bits(things: Scene, test: Callable[[Thing], bool]) -> int:
    return sum(1 << k for k, thing in enumerate(things) if test(thing))


def _alone(things: Scene, field: str, rng: Random) -> int | None:
    """A thing whose shape, or colour, no other has."""
    values = [getattr(thing, field) for thing in things]
    alone = [k for k, value in enumerate(values) if values.count(value) == 1]
    return rng.choice(alone) if alone else None


def colour(things: Scene, rng: Random, yes: bool) -> Asked | None:
    if rng.random() < 0.5:
        k = rng.randrange(len(things))
        said: Segments = [("what colour is the shape at the", 0), (f" {things[k].place}", 1 << k), ("?", 0)]
    elif (k := _alone(things, "shape", rng)) is not None:
        said = [("what colour is the", 0), (f" {things[k].shape}", 1 << k), ("?", 0)]
    else:
        return None
    return Asked("colour", said, things[k].colour, (1 << k,))


def shape(things: Scene, rng: Random, yes: bool) -> Asked | None:
    if rng.random() < 0.5:
        k = rng.randrange(len(things))
        said: Segments = [("which shape is at the", 0), (f" {things[k].place}", 1 << k), ("?", 0)]
    elif (k := _alone(things, "colour", rng)) is not None:
        said = [("which shape is", 0), (f" {things[k].colour}", 1 << k), ("?", 0)]
    else:
        return None
    return Asked("shape", said, things[k].shape, (1 << k,))


def size(things: Scene, rng: Random, yes: bool) -> Asked:
    k = rng.randrange(len(things))
    said = [("is the", 0), (f" {things[k].name}", 1 << k), (" small or big?", 0)]
    return Asked("size", said, things[k].size, (1 << k,))


def where(things: Scene, rng: Random, yes: bool) -> Asked:
    k = rng.randrange(len(things))
    return Asked("where", [("where is the", 0), (f" {things[k].name}", 1 << k), ("?", 0)], things[k].place, (1 << k,))


def what(things: Scene, rng: Random, yes: bool) -> Asked:
    k = rng.randrange(len(things))
    return Asked("what", [("what is at the", 0), (f" {things[k].place}", 1 << k), ("?", 0)], things[k].name, (1 << k,))


def count(things: Scene, rng: Random, yes: bool) -> Asked:
    field = rng.choice(("shape", "colour"))
    present = [getattr(thing, field) for thing in things]
    value = rng.choice(present if rng.random() < 0.8 else (SHAPES if field == "shape" else COLOURS))
    found = _bits(things, lambda thing: getattr(thing, field) == value)
    named = plural(value) if field == "shape" else f"{value} shapes"
    return Asked("count", [("how many", 0), (f" {named}", found), (" are there?", 0)], str(found.bit_count()), (found,))


def exist(things: Scene, rng: Random, yes: bool) -> Asked:
    """What is not there has a colour and a shape that are, where the scene has such a pair."""
    if yes:
        k = rng.randrange(len(things))
        name, found = things[k].name, 1 << k
    else:
        names = {thing.name for thing in things}
        near = [f"{t.colour} {u.shape}" for t in things for u in things if f"{t.colour} {u.shape}" not in names]
        far = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in names]
        name, found = rng.choice(near if near and rng.random() < 0.7 else far), 0
    return Asked("exist", [("is there", 0), (f" {a(name)}", found), ("?", 0)], _word(yes), (found,))


def relation(things: Scene, rng: Random, yes: bool) -> Asked | None:
    word = rng.choice(list(RELATIONS))
    axis, _ = RELATIONS[word]
    pairs = [
        (i, j) for i, one in enumerate(things) for j, other in enumerate(things)
        if getattr(one, axis) != getattr(other, axis) and holds(word, one, other) == yes
    ]  # fmt: skip
    if not pairs:
        return None
    i, j = rng.choice(pairs)
    said = [
        ("is the", 0), (f" {things[i].name}", 1 << i), (f" {word} the", 0), (f" {things[j].name}", 1 << j), ("?", 0),
    ]  # fmt: skip
    return Asked("relation", said, _word(yes), (1 << i, 1 << j))


def related(things: Scene, rng: Random, yes: bool) -> Asked | None:
    """Colour or shape of the only thing that stands so to another."""
    word, field = rng.choice(list(RELATIONS)), rng.choice(("colour", "shape"))
    pairs = [
        (i, j) for j, other in enumerate(things)
        if len(found := [k for k, thing in enumerate(things) if holds(word, thing, other)]) == 1 for i in found
    ]  # fmt: skip
    if not pairs:
        return None
    i, j = rng.choice(pairs)
    asked = "what colour is the shape" if field == "colour" else "which shape is"
    said = [(f"{asked} {word} the", 0), (f" {things[j].name}", 1 << j), ("?", 0)]
    return Asked("related", said, getattr(things[i], field), (1 << j, 1 << i))


def same(things: Scene, rng: Random, yes: bool) -> Asked | None:
    """Have two things that are named by shape or place the same colour?"""
    pairs = [
        (i, j) for i, one in enumerate(things) for j, other in enumerate(things)
        if i != j and (one.colour == other.colour) == yes
    ]  # fmt: skip
    if not pairs:
        return None
    i, j = rng.choice(pairs)
    said = [
        ("has the shape at the", 0), (f" {things[i].place}", 1 << i), (" the same colour as the shape at the", 0),
        (f" {things[j].place}", 1 << j), ("?", 0),
    ]  # fmt: skip
    return Asked("same", said, _word(yes), (1 << i, 1 << j))


def choose(things: Scene, rng: Random, yes: bool) -> Asked | None:
    """One of two colours, or sizes, of a thing."""
    k = rng.randrange(len(things))
    other = rng.choice([value for value in COLOURS if value != things[k].colour])
    pair = rng.sample([things[k].colour, other], 2)
    said = [("is the shape at the", 0), (f" {things[k].place}", 1 << k), (f" {pair[0]} or {pair[1]}?", 0)]
    return Asked("choose", said, things[k].colour, (1 << k,))


def both(things: Scene, rng: Random, yes: bool) -> Asked | None:
    """Are there shapes of two kinds: both, or one of them?"""
    joint = rng.choice(("and", "or"))
    there = {thing.shape for thing in things}
    pairs = [
        (x, y) for x in SHAPES for y in SHAPES if x != y
        and (((x in there) + (y in there)) >= (2 if joint == "and" else 1)) == yes
    ]  # fmt: skip
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    bits = [_bits(things, lambda thing, kind=kind: thing.shape == kind) for kind in (one, other)]
    said = [("is there", 0), (f" {a(one)}", bits[0]), (f" {joint}", 0), (f" {a(other)}", bits[1]), ("?", 0)]
    return Asked("both", said, _word(yes), (bits[0], bits[1]))


KINDS: dict[str, Asker] = {
    "colour": colour, "shape": shape, "size": size, "where": where, "what": what, "count": count, "exist": exist,
    "relation": relation,
}  # fmt: skip
PROGRAMS: dict[str, Asker] = {"related": related, "same": same, "choose": choose, "both": both}

NUMBERS = ("no", "one", "two", "three")
PAIR = 5  # the second picture's first bit


FORMS = 5  # of statements


def statement(left: Scene, right: Scene, rng: Random, form: int, truth: bool) -> Asked | None:
    """A statement of a form about two pictures, true or false as wanted, or None where these two do not allow it."""
    kind = rng.choice(SHAPES)
    here, there = (_bits(things, lambda thing: thing.shape == kind) for things in (left, right))
    n, m, about = here.bit_count(), there.bit_count(), here | there << PAIR
    if form == 0:
        said: Segments = [("each image has", 0), (f" {a(kind)}", about), (".", 0)]
        is_true = n > 0 and m > 0
    elif form == 1:
        number = n + m if truth else n + m + rng.choice((-1, 1))
        if not 1 <= number <= 3:
            return None
        named = f" {NUMBERS[number]} {kind if number == 1 else plural(kind)}"
        said = [(f"there {'is' if number == 1 else 'are'}", 0), (named, about), (" in the two images.", 0)]
        is_true = n + m == number
    elif form == 2:
        side, other = rng.sample(("left", "right"), 2)
        said = [(f"the {side} image has more", 0), (f" {plural(kind)}", about), (f" than the {other} image.", 0)]
        is_true = n > m if side == "left" else m > n
    elif form == 3:
        at = rng.randrange(2)
        thing = rng.choice((left, right)[at if truth else 1 - at])
        about = _bits((left, right)[at], lambda t: t.name == thing.name) << PAIR * at
        side = ("left", "right")[at]
        said = [("there is", 0), (f" {a(thing.name)}", about), (f" in the {side} image.", 0)]
        is_true = about > 0
    else:
        said = [("exactly one image has", 0), (f" {a(kind)}", about), (".", 0)]
        is_true = (n > 0) != (m > 0)
    return Asked(f"pair{form}", said, "true" if truth else "false", (about,)) if is_true == truth else None


def caption(things: Scene, rng: Random) -> str:
    """One of many captions: two or three of the things, the biggest first, in words that vary."""
    order = sorted(things, key=lambda t: (t.size != "big", t.row, t.column))[: rng.choice((2, 2, 3))]
    named = []
    for thing in order:
        big = {"big": rng.choice(("big ", "large ", "")), "small": rng.choice(("small ", "tiny ", ""))}[thing.size]
        row, column = ROWS[thing.row], COLUMNS[thing.column]
        at = rng.choice(("", "", f" at the {thing.place}", f" on the {column}", f" at the {row}"))
        named.append(f"{a(f'{big}{thing.name}')}{at}")
    listed = ", ".join(named[:-1]) + f" and {named[-1]}"
    opening = rng.choice(("", "", "there is ", "a picture of ", "we see "))
    return f"{opening}{listed}."
