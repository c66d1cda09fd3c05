"""What the language model reads before it sees anything: views told in prose and conversations about them. No picture.

A conversation begins with the prose and is of one form. Those that are asked in the gate (`exam`) are of other views.
"""

from __future__ import annotations

from random import Random

from dora_lab.mini.llava import talk
from dora_lab.mini.llava.talk import OTHERS, PICKING, VALUES, Piece, Turn
from dora_lab.mini.llava.views import View, sentences, view

TURNS = 6
FORMS = {"short": 2, "letter": 2, "insufficient": 2}  # how often each, once picking is learnt
KINDS = {"short": (*PICKING, *OTHERS * 2), "letter": tuple(VALUES), "insufficient": PICKING}
HIDDEN = 0.7  # share of the views of which something is not told, where "Unanswerable" may be said
DESCRIBED = 0.15  # share of the short conversations that end in a description
TRIES = 60


def document(number: int, picking: bool) -> list[Turn]:
    """A conversation, a function of its number: picking questions alone, or any form."""
    rng = Random(f"document/{number}")
    form = "short" if picking else rng.choices(list(FORMS), list(FORMS.values()))[0]
    return told(form, PICKING if picking else KINDS[form], rng, TURNS)


def exam(form: str, kind: str, number: int) -> list[Turn]:
    """Question `number` of a form and kind, of a view of its own: what the gate asks."""
    return told(form, (kind,), Random(f"exam/{form}/{kind}/{number}"), 1)


def told(form: str, kinds: tuple[str, ...], rng: Random, count: int) -> list[Turn]:
    """A conversation of a form about a view that is told, of `count` questions, each of one of the kinds."""
    seen = view("prose", rng.randrange(1 << 60))
    hidden = 0
    if form == "insufficient" and rng.random() < HIDDEN:
        hidden = 1 << rng.randrange(len(seen.things) + bool(seen.sign))
    turns: list[Turn] = []
    for _ in range(TRIES):
        if len(turns) == count:
            before = [Piece(text, bits, "told") for text, bits in sentences(seen, rng, hidden)]
            if form == "short" and count > 1 and rng.random() < DESCRIBED:
                turns[-1] = talk.describe(sentences(seen, rng))
            return talk.conversation(form, turns, [*before, Piece("\n")])
        if turn := _turn(seen, rng, form, rng.choice(kinds), hidden):
            turns.append(turn)
    return told(form, kinds, rng, count)  # this view does not allow what is wanted


def _turn(seen: View, rng: Random, form: str, kind: str, hidden: int) -> Turn | None:
    asked = talk.ask(seen, kind, rng, rng.random() < 0.5)
    if asked is None:
        return None
    if form == "letter":
        return talk.letter(asked, seen, rng)
    if asked.evidence[0] & hidden:
        return talk.unanswerable(asked)
    # so that about every other question cannot be answered, where there is any
    return None if hidden and rng.random() < 0.6 else talk.short(asked)
