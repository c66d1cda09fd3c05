"""What the text base reads: scenes told in prose, with questions, statements, captions and gaps. No picture is in it.

A document is what the encoder reads (segments), what the decoder says, and what to look at for it. Documents of a split
other than "prose" are of other scenes: the gate's questions (`exam`) were never read.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from dora_lab.mini.vl.questions import FORMS, KINDS, PAIR, PROGRAMS, Asked, caption, statement
from dora_lab.mini.vl.scenes import Scene, Segments, prose, scene

OPEN = ("caption", "gap")  # no single right answer
PICKING = ("colour", "shape", "size", "where", "what")  # one thing to find and one word of it to say
# how often each is asked, once picking is learned; what two things have to be compared for is asked most
SHARES = {
    **dict.fromkeys(PICKING, 2), "count": 3, "exist": 3, "relation": 8, "related": 3, "same": 2, "choose": 2, "both": 2,
    "pair": 4, "caption": 3, "gap": 3,
}  # fmt: skip


class Document(NamedTuple):
    """`told` begins with the question's segments, `questions` of them; the rest is prose."""

    kind: str
    told: Segments
    questions: int
    answer: str
    evidence: tuple[int, ...]


def document(number: int, picking: bool) -> Document:
    """A document, a function of its number: a picking question, or any of `SHARES`."""
    rng = Random(f"document/{number}")
    kind = rng.choice(PICKING) if picking else rng.choices(list(SHARES), list(SHARES.values()))[0]
    return _of(kind, rng, yes=number % 2 == 0)


def exam(kind: str, number: int) -> Document:
    """Question `number` of a kind, of a scene of its own: what the gate asks."""
    return _of(kind, Random(f"exam/{kind}/{number}"), yes=number % 2 == 0)


def _of(kind: str, rng: Random, yes: bool) -> Document:
    things = _scene(rng)
    if kind == "caption":
        return Document(kind, [("describe:", 0), *prose(things, rng)], 1, caption(things, rng), ())
    if kind == "gap":
        return _gap(things, rng)
    if kind == "pair":
        return _pair(rng, rng.randrange(FORMS), yes)
    while (asked := {**KINDS, **PROGRAMS}[kind](things, rng, yes)) is None:
        things = _scene(rng)
    return _read(asked, prose(things, rng))


def _scene(rng: Random) -> Scene:
    return scene("prose", rng.randrange(1 << 60))


def _read(asked: Asked, told: Segments) -> Document:
    question: Segments = [("read: ", 0), *asked.said]
    return Document(asked.kind, [*question, *told], len(question), asked.answer, asked.evidence)


def _pair(rng: Random, form: int, truth: bool) -> Document:
    while (asked := statement(left := _scene(rng), right := _scene(rng), rng, form, truth)) is None:
        pass
    told = [(" left image:", 0), *prose(left, rng), (" right image:", 0), *prose(right, rng, first=PAIR)]
    return _read(asked._replace(kind="pair"), told)


def _gap(things: Scene, rng: Random) -> Document:
    """One to three words of the prose are masked and have to be said."""
    told = prose(things, rng)
    k = rng.randrange(len(told))
    words = told[k][0].split(" ")
    start = rng.randrange(1, len(words))
    end = min(len(words), start + rng.randint(1, 3))
    masked = " ".join([*words[:start], "<mask>", *words[end:]])
    said: Segments = [("fill:", 0), *told[:k], (masked, told[k][1]), *told[k + 1 :]]
    return Document("gap", said, 1, " ".join(words[start:end]), (told[k][1],))
