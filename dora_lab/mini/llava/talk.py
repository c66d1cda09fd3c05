"""What is asked about views, in LLaVA's three forms: short answers, letters, and "Unanswerable" where nothing is seen.

A turn is pieces of text, each with bits of the things that it is about and its part, and an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from dora_lab.mini.llava.views import WORDS, View
from dora_lab.mini.vl.questions import KINDS, Asked
from dora_lab.mini.vl.scenes import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Segments

# as LLaVA asks (`tasks.visual_instruction.benchmarks`)
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."
NO_ANSWER = "Unanswerable"
LETTERS = "ABCD"
HOW = {"short": SHORT, "letter": LETTER, "insufficient": f"{INSUFFICIENT}\n{SHORT}"}  # what is said of each form
DESCRIBE = "Describe the image."
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
VALUES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "where": PLACES, "read": tuple(WORDS)}  # options
PICKING = ("colour", "shape", "size", "where", "what", "read")  # one thing to find and one word of it to say
OTHERS = ("count", "exist")


class Piece(NamedTuple):
    text: str
    bits: int = 0  # of the things that it is about
    part: str = ""  # "told", "named" (in a question), "option"
    right: bool = False  # of options


class Turn(NamedTuple):
    kind: str
    said: tuple[Piece, ...]
    answer: str
    evidence: int  # bits to look at; 0: nothing, or too many to guide a glance
    letters: str = ""  # that are offered

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.said)


def ask(seen: View, kind: str, rng: Random, yes: bool) -> Asked | None:
    """A question of a kind about a view, or None where it does not allow it."""
    if kind != "read":
        return KINDS[kind](seen.things, rng, yes)
    if seen.sign is None:
        return None
    bit = seen.sign_bit
    return Asked("read", [("what does the", 0), (" sign", bit), (" say?", 0)], seen.sign.word, (bit,))


def _question(asked: Asked) -> list[Piece]:
    return [Piece(text, bits, "named" if bits else "") for text, bits in asked.said]


def short(asked: Asked) -> Turn:
    answer = asked.answer.capitalize() if asked.kind == "exist" else asked.answer  # Yes and No, as in LLaVA's mix
    return Turn(asked.kind, (*_question(asked),), answer, asked.evidence[0])


def unanswerable(asked: Asked) -> Turn:
    """The question where nothing that is seen answers it."""
    return Turn(asked.kind, (*_question(asked),), NO_ANSWER, 0)


def letter(asked: Asked, seen: View, rng: Random) -> Turn:
    """The question with two to four options; every other wrong one is of something else that is there."""
    values = [value for value in VALUES[asked.kind] if value != asked.answer]
    near = [value for value in _present(seen, asked.kind) if value != asked.answer]
    wrong: list[str] = []
    count = min(rng.randint(1, 3), len(values))
    while len(wrong) < count:
        value = rng.choice(near if near and rng.random() < 0.5 else values)
        if value not in wrong:
            wrong.append(value)
    options = rng.sample([asked.answer, *wrong], len(wrong) + 1)
    said = _question(asked)
    for name, option in zip(LETTERS, options, strict=False):
        said.append(Piece(f"\n{name}. {option}", asked.evidence[0], "option", option == asked.answer))
    right = LETTERS[options.index(asked.answer)]
    return Turn(asked.kind, tuple(said), right, asked.evidence[0], LETTERS[: len(options)])


def _present(seen: View, kind: str) -> list[str]:
    if kind == "read":
        return []
    field = {"where": "place"}.get(kind, kind)
    return sorted({getattr(thing, field) for thing in seen.things})


def describe(sentences: Segments) -> Turn:
    """All that there is, a sentence each."""
    return Turn("describe", (Piece(DESCRIBE),), "".join(text for text, _ in sentences).strip(), 0)


def conversation(form: str, turns: Sequence[Turn], before: Sequence[Piece] = ()) -> list[Turn]:
    """The turns, what is looked at before the first and, as in LLaVA's mix, their form said once, behind it."""
    first, *rest = turns
    return [first._replace(said=(*before, *first.said, Piece(f"\n{HOW[form]}"))), *rest]
