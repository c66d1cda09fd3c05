"""Clips: what a camera shows that looks at one place after the other; things come, go, and one of them may move.

A clip is 6 to 12 frames. A frame is made as a place of a picture is (`cells`: the largest of its four cells), shows one
thing or an empty place, and has a clock in it, since what tells frames apart otherwise are words that mean nothing to
the base. Two people say what they see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np

from dora_lab.mini.vl.cells import NOISE, normal, projection
from dora_lab.mini.vl.scenes import Scene, Thing, scene

FRAMES = (6, 12)  # fewest and most of a clip
THINGS = (3, 4)
MOVING = 0.7  # share of the clips in which a thing is seen again at another place
PEOPLE = ("sam", "bel", "ma", "cap")  # names that are one token each


@dataclass(frozen=True)
class Frame:
    """What one frame shows: a thing at its place, or an empty place (row, column)."""

    thing: Thing | None
    row: int
    column: int


@dataclass(frozen=True)
class Clip:
    """Frames in their order, and what is said: (person, thing)."""

    frames: tuple[Frame, ...]
    said: tuple[tuple[str, Thing], ...]

    @property
    def shots(self) -> tuple[Thing, ...]:
        """Things as they are shown one after the other, each once for every place that it is seen at."""
        shown = [frame.thing for frame in self.frames if frame.thing]
        return tuple(thing for k, thing in enumerate(shown) if k == 0 or thing != shown[k - 1])

    @property
    def names(self) -> tuple[str, ...]:
        """Of its things, by when they are first seen."""
        return tuple(dict.fromkeys(thing.name for thing in self.shots))

    def places(self, name: str) -> list[str]:
        """Where a thing is seen, by time: one place, or two."""
        return [thing.place for thing in self.shots if thing.name == name]


@cache
def clip(key: str) -> Clip:
    """The clip of that name; no two shots are at one place, and at least two things have a shape of their own."""
    rng = Random(f"clip/{key}")
    things = _things(key)
    free = [place for place in range(9) if divmod(place, 3) not in [(thing.row, thing.column) for thing in things]]
    rng.shuffle(free)
    order = rng.sample(things, len(things))
    if rng.random() < MOVING:
        k = rng.randrange(len(order) - 1)
        row, column = divmod(free.pop(), 3)
        order.insert(rng.randint(k + 1, len(order)), replace(order[k], row=row, column=column))
    shots = [Frame(thing, thing.row, thing.column) for thing in order]
    for _ in range(rng.randint(0, 2)):
        shots.insert(rng.randint(0, len(shots)), Frame(None, *divmod(free.pop(), 3)))
    lengths = [1] * len(shots)
    for _ in range(rng.randint(*FRAMES) - len(shots)):
        lengths[rng.randrange(len(shots))] += 1
    while sum(lengths) < FRAMES[0]:
        lengths[rng.randrange(len(shots))] += 1
    frames = tuple(frame for frame, length in zip(shots, lengths, strict=True) for _ in range(length))
    told = rng.sample([thing for thing in things if alone(things, "shape", thing)], 2)
    return Clip(frames, tuple(zip(rng.sample(PEOPLE, 2), told, strict=True)))


def _things(key: str) -> Scene:
    number = 0
    while True:
        things = scene(f"clips/{key}", number)[: THINGS[1]]
        if len(things) >= THINGS[0] and sum(alone(things, "shape", thing) for thing in things) >= 2:
            return things
        number += 1


def alone(things: Scene, field: str, thing: Thing) -> bool:
    """Has no other thing its shape, or colour?"""
    return [getattr(other, field) for other in things].count(getattr(thing, field)) == 1


def filmed(key: str) -> np.ndarray:
    """(frames, WIDTH) in float16: what the clip looks like."""
    frames = clip(key).frames
    clock = normal("clock", 1)[0]
    last = len(frames) - 1
    seen = [_seen(frame, f"{key}/{k}") + clock * np.float32((2 * k - last) / last) for k, frame in enumerate(frames)]
    return np.stack(seen).astype(np.float16)  # the clock runs from -1 to 1


def _seen(frame: Frame, key: str) -> np.ndarray:
    """(WIDTH,) in float32: the largest of a place's four cells, each as `cells.features` makes it."""
    part, thing = projection(), frame.thing
    cells = [(2 * frame.row + i, 2 * frame.column + j) for i in (0, 1) for j in (0, 1)]
    found = np.stack([part[f"row{row}"] + part[f"column{column}"] for row, column in cells])
    if thing:
        covered = [cell in thing.cells() for cell in cells]
        found[covered] += part[thing.colour] + part[thing.shape] + part[thing.size]
    found += np.float32(NOISE) * normal(f"noise/clips/{key}", len(cells))
    return found.astype(np.float16).max(axis=0).astype(np.float32)
