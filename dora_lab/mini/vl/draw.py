"""Scenes drawn, to look at; no run reads a drawing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dora_lab.mini.vl.scenes import Scene, Thing

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 24  # pixels
PAPER, LINES = (225, 225, 220), (205, 205, 200)
PAINT = {
    "red": (204, 51, 51), "blue": (51, 85, 204), "green": (46, 139, 87), "yellow": (232, 200, 40),
    "purple": (128, 60, 160), "orange": (235, 130, 40), "white": (255, 255, 255), "black": (30, 30, 30),
}  # fmt: skip


def draw(things: Scene) -> Image:
    """A picture of 144 x 144 pixels; a big shape fills its place, a small one the cell that it covers."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (6 * CELL, 6 * CELL), PAPER)
    pen = ImageDraw.Draw(image)
    for k in (2, 4):
        pen.line([(0, k * CELL), (6 * CELL, k * CELL)], LINES)
        pen.line([(k * CELL, 0), (k * CELL, 6 * CELL)], LINES)
    for thing in things:
        row, column = thing.cells()[0]
        side = CELL * (2 if thing.size == "big" else 1)
        _shape(pen, thing, column * CELL + side / 2, row * CELL + side / 2, 0.42 * side)
    return image


def _shape(pen, thing: Thing, x: float, y: float, r: float) -> None:
    colour, box = PAINT[thing.colour], (x - r, y - r, x + r, y + r)
    if thing.shape == "circle":
        pen.ellipse(box, colour)
    elif thing.shape == "ring":
        pen.ellipse(box, None, colour, width=max(2, round(r / 3)))
    elif thing.shape == "square":
        pen.rectangle(box, colour)
    elif thing.shape == "cross":
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), colour)
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), colour)
    else:
        turns, radii = {"triangle": (3, (1.0,)), "star": (10, (1.0, 0.45))}[thing.shape]
        angles = [2 * math.pi * k / turns - math.pi / 2 for k in range(turns)]
        reach = [r * radii[k % len(radii)] for k in range(turns)]
        pen.polygon([(x + d * math.cos(t), y + d * math.sin(t)) for d, t in zip(reach, angles, strict=True)], colour)
