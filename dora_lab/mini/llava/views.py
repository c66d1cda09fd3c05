"""Views: a scene of `mini.vl` and, in most of them, a sign with a word, each a function of its split and number."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from dora_lab.mini.vl.scenes import COLUMNS, ROWS, Scene, Segments, Thing, scene, told

WORDS = [
    "axe", "bag", "bee", "box", "bus", "car", "cat", "cow", "cup", "dog", "ear", "egg", "fox", "gas", "hat", "ink",
    "jam", "key", "lid", "map", "nut", "oak", "pen", "pie", "rug", "sun", "toy", "van", "web", "zoo",
]  # fmt: skip
SIGNED = 0.7  # share of the views that have a sign
THINGS = 4  # most of a view


class Sign(NamedTuple):
    word: str
    row: int
    column: int

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


class View(NamedTuple):
    """Thing k of a view has the bit k; its sign, or None, has the bit behind them."""

    things: Scene
    sign: Sign | None

    @property
    def pieces(self) -> tuple[Thing | Sign, ...]:
        """What is there, in the order of its bits."""
        return self.things if self.sign is None else (*self.things, self.sign)

    @property
    def sign_bit(self) -> int:
        return 1 << len(self.things) if self.sign else 0


def view(split: str, number: int) -> View:
    """The view of that number; those of the split "prose", which are only told, may have any colour of any shape."""
    things = scene(split, number)[:THINGS]
    rng = Random(f"view/{split}/{number}")
    taken = {(thing.row, thing.column) for thing in things}
    free = [(row, column) for row in range(3) for column in range(3) if (row, column) not in taken]
    sign = Sign(rng.choice(WORDS), *rng.choice(free)) if rng.random() < SIGNED else None
    return View(things, sign)


def sentences(seen: View, rng: Random, hidden: int = 0) -> Segments:
    """A sentence of everything whose bit is not `hidden`, in any order, with its bit."""
    said = [(f" {told(thing, rng)}", 1 << k) for k, thing in enumerate(seen.things)]
    if sign := seen.sign:
        form = (f"the sign at the {sign.place} says {sign.word}.", f"at the {sign.place} a sign says {sign.word}.")
        said.append((f" {rng.choice(form)}", seen.sign_bit))
    rng.shuffle(said)
    return [(text, bit) for text, bit in said if not bit & hidden]
