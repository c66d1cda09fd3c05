"""Scenes: a few coloured shapes on a grid of nine places, each a function of its split and number; their prose.

Text is a list of segments (text, things): the second is a set of bits, one for each thing of the scene that the words
are about. Pretraining shows heads where to look by them (see `pretrain.py`); nobody else needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

Segments = list[tuple[str, int]]

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
SIZES = ("small", "big")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
HELD_OUT = (("red", "ring"), ("blue", "cross"))  # (colour, shape) that no picture shows outside the split `novel`
FAVOURED = 0.3  # share of the things that have their shape's own colour: what a blind guess can live on
THINGS = (2, 5)  # fewest and most of a scene


@dataclass(frozen=True)
class Thing:
    """A coloured shape; a big one covers its place, which is four cells, a small one covers one of them (`corner`)."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    corner: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    def cells(self) -> list[tuple[int, int]]:
        """(row, column) of the cells of the 6 x 6 grid that it covers."""
        cells = [(2 * self.row + i, 2 * self.column + j) for i in (0, 1) for j in (0, 1)]
        return cells if self.size == "big" else [cells[self.corner]]


Scene = tuple[Thing, ...]


def scene(split: str, number: int) -> Scene:
    """The things of a scene, no two of one name or at one place; in `novel` the first is of a held-out combination.

    Scenes of the split `prose`, which are only told, never shown, may have any combination.
    """
    rng = Random(f"scene/{split}/{number}")
    names: list[tuple[str, str]] = [rng.choice(HELD_OUT)] if split == "novel" else []
    count = rng.randint(*THINGS)
    while len(names) < count:
        shape = rng.randrange(len(SHAPES))
        colour = COLOURS[shape] if rng.random() < FAVOURED else rng.choice(COLOURS)
        name = (colour, SHAPES[shape])
        if name not in names and (split == "prose" or name not in HELD_OUT):
            names.append(name)
    places = rng.sample(range(9), count)
    return tuple(
        Thing(colour, shape, rng.choice(SIZES), *divmod(place, 3), rng.randrange(4))
        for (colour, shape), place in zip(names, places, strict=True)
    )


def a(words: str) -> str:
    """The words with their article."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def told(thing: Thing, rng: Random) -> str:
    """One sentence that says all that there is to know about a thing."""
    form = rng.randrange(4)
    if form == 0:
        return f"{a(f'{thing.size} {thing.name}')} is at the {thing.place}."
    if form == 1:
        return f"at the {thing.place} there is {a(f'{thing.size} {thing.name}')}."
    if form == 2:
        return f"{thing.place}: {thing.size} {thing.name}."
    return f"the {thing.name} at the {thing.place} is {thing.size}."


def prose(things: Scene, rng: Random, first: int = 0) -> Segments:
    """A sentence for each thing, in any order; thing k has the bit `first` + k."""
    order = rng.sample(range(len(things)), len(things))
    return [(" " + told(things[k], rng), 1 << (first + k)) for k in order]
