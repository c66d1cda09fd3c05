"""Views as pictures of 56 x 56 pixels: whole numbers and SHAKE-128 alone, the same to the bit wherever they are drawn.

A picture is 7 x 7 patches of eight pixels. A place of the grid is 2 x 2 of them, beginning with the first; the last row
and column of patches are ground. Shapes and signs stand up to a pixel off their place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dora_lab.mini.llava.views import Sign
from dora_lab.mini.vl.scenes import Thing

SIDE, CELL = 56, 8  # pixels
NOISE = 8  # largest, of each pixel and colour
PAINT = {
    "red": (210, 40, 40), "blue": (50, 80, 215), "green": (40, 150, 70), "yellow": (235, 215, 50),
    "purple": (140, 50, 180), "orange": (240, 130, 30), "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
GROUND, CARD, INK, SKIN = (150, 150, 150), (235, 225, 200), (60, 40, 30), (215, 165, 140)
GLYPHS = {  # five rows of three pixels, the left one worth 4
    "a": "25755", "b": "65656", "c": "34443", "d": "65556", "e": "74647", "f": "74644", "g": "34553", "h": "55755",
    "i": "72227", "j": "11152", "k": "55655", "l": "44447", "m": "57755", "n": "65555", "o": "25552", "p": "65644",
    "q": "25563", "r": "65655", "s": "34216", "t": "72222", "u": "55557", "v": "55552", "w": "55775", "x": "55255",
    "y": "55222", "z": "71247",
}  # fmt: skip


class Fault(NamedTuple):
    """What went wrong with a photograph."""

    up: int = 0  # places that everything is moved by; what leaves the picture is lost
    left: int = 0
    thumb: tuple[int, int] | None = None  # row and column of the place that it covers
    dark: bool = False
    blurred: bool = False


FINE = Fault()


def pixels(seen: Sequence[Thing | Sign], key: str, fault: Fault = FINE) -> np.ndarray:
    """(56, 56, 3) in uint8: the picture `key` of what is there; the key decides the noise and how far it is off."""
    drawn = np.frombuffer(hashlib.shake_128(f"picture/{key}".encode()).digest(SIDE * SIDE * 3 + 18), np.uint8)
    noise_HWC = drawn[: SIDE * SIDE * 3].reshape(SIDE, SIDE, 3).astype(np.int32) % (2 * NOISE + 1) - NOISE
    off = drawn[SIDE * SIDE * 3 :] & 1  # two numbers for each place
    sheet = np.empty((3 * SIDE, 3 * SIDE, 3), np.int32)  # the picture and as much around it
    sheet[:] = GROUND
    for k, one in enumerate(seen):
        top = SIDE + 2 * CELL * (one.row - fault.up) + int(off[2 * k])
        left = SIDE + 2 * CELL * (one.column - fault.left) + int(off[2 * k + 1])
        if isinstance(one, Sign):
            _sign(sheet[top:, left:], one.word)
        else:
            _thing(sheet[top:, left:], one)
    picture = sheet[SIDE : 2 * SIDE, SIDE : 2 * SIDE]
    if fault.thumb is not None:
        top, left = (2 * CELL * place - 1 for place in fault.thumb)
        v, u = (np.arange(SIDE)[:, None] - top) * 2 - 18, (np.arange(SIDE) - left) * 2 - 18
        picture[(u * u + v * v <= 24 * 24) & (abs(u) <= 19) & (abs(v) <= 19)] = SKIN
    if fault.blurred:
        wide = np.pad(picture, ((1, 1), (1, 1), (0, 0)), "edge")
        picture = sum(wide[i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)) // 9
    if fault.dark:
        picture = picture // 32
    return np.clip(picture + noise_HWC, 0, 255).astype(np.uint8)


def mask(shape: str, side: int) -> np.ndarray:
    """(side, side) of bool: where a shape is painted; side is odd."""
    v = (2 * np.arange(side) + 1 - side)[:, None]  # even, from -(side - 1) to side - 1
    u, reach = v.T, side
    if shape == "circle":
        return u * u + v * v <= reach * reach
    if shape == "ring":
        return (u * u + v * v <= reach * reach) & (4 * (u * u + v * v) > reach * reach)
    if shape == "square":
        return (abs(u) < reach) & (abs(v) < reach)
    if shape == "cross":
        return (3 * abs(u) <= reach) | (3 * abs(v) <= reach)
    if shape == "triangle":
        return 2 * abs(u) <= v + reach
    return abs(u) * abs(v) <= reach  # star, of four points


def _thing(at: np.ndarray, thing: Thing) -> None:
    """Paint a thing whose place begins at the first pixel."""
    side = 2 * CELL - 1 if thing.size == "big" else CELL - 1
    row, column = (0, 0) if thing.size == "big" else divmod(thing.corner, 2)
    at[row * CELL : row * CELL + side, column * CELL : column * CELL + side][mask(thing.shape, side)] = PAINT[
        thing.colour
    ]


def _sign(at: np.ndarray, word: str) -> None:
    """A card of 9 x 15 pixels with three letters."""
    card = at[3:12, :15]
    card[:] = CARD
    for k, name in enumerate(word):
        for row, digit in enumerate(GLYPHS[name]):
            for column in range(3):
                if int(digit) >> (2 - column) & 1:
                    card[2 + row, 2 + 4 * k + column] = INK
