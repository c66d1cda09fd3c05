"""A stream by columns: lines that differ in nothing but their values, like beside like, and numbers as their bytes.

A column of float32 values, which JSON needs 17 digits for, lies as four bytes each; one of decimals of at most seven
digits (a probe's) as an exponent and three bytes. What is measured at every checkpoint has moved little since the last
one, so that differences from it compress better; which is smallest, zlib says. A column that does not come back byte
for byte stays as it is.
"""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from itertools import chain

_VALUE = re.compile(rb'(?<=": )(?:"(?:[^"\\]|\\.)*"|[^\s,{}\[\]"]+)')
_DECIMALS = re.compile(rb'\x04(\d+)"([^"]*)"')
_DIGITS, _MODULUS = 7, 1 << 24  # 10^7 < 2^24: three bytes


def by_column(lines: bytes) -> bytes:
    """Byte 5, what the lines have in common with byte 2 for each value, and its values a column; else `lines`."""
    common, *others = {_VALUE.sub(b"\x02", line) for line in lines.splitlines(keepends=True)} or {b""}
    if others or not lines.endswith(b"\n"):
        return lines
    columns = list(zip(*map(_VALUE.findall, lines.splitlines()), strict=True))
    period = next((row for row, value in enumerate(columns[0]) if value != columns[0][0]), 0) if columns else 0
    return b"\x05" + b"\x01".join([common, *(_as_bytes(column, period) for column in columns)])


def by_line(content: bytes) -> bytes:
    """What `by_column` was given."""
    common, *columns = content[1:].split(b"\x01")
    line = common.replace(b"%", b"%%").replace(b"\x02", b"%b")
    return b"".join(line % row for row in zip(*map(_as_texts, columns), strict=True))


def _as_bytes(column: Sequence[bytes], period: int) -> bytes:
    """The shortest of a column's forms that come back: its lines, float32, decimals, their differences by `period`."""
    forms = [b"\n".join(column)]
    for make in (_float32, _decimals, partial(_decimals, step=period)):
        with suppress(ValueError, ArithmeticError):
            form = make(column)
            forms += [form] * (_as_texts(form) == list(column))
    return min(forms, key=lambda form: len(zlib.compress(_bare(form))))


def _bare(form: bytes) -> bytes:
    """What a part will hold of a form: its base64 as bytes."""
    return form if form[:1] not in b"\x03\x04" else base64.b64decode(form[form.index(b'"') + 1 : -1])


def _as_texts(column: bytes) -> list[bytes]:
    """What `_as_bytes` was given."""
    if column.startswith(b"\x03"):  # without quotes: a part from before the decimals
        planes = _planes(base64.b64decode(column[1:].strip(b'"')))
        return [repr(value).encode() for (value,) in struct.iter_unpack("<f", bytes(chain(*zip(*planes, strict=True))))]
    found = _DECIMALS.fullmatch(column)
    return _texts(int(found[1]), base64.b64decode(found[2])) if found else column.split(b"\n")


def _float32(column: Sequence[bytes]) -> bytes:
    packed = struct.pack(f"<{len(column)}f", *map(float, column))
    return b'\x03"%b"' % base64.b64encode(b"".join(packed[place::4] for place in range(4)))


def _decimals(column: Sequence[bytes], step: int = 0) -> bytes:
    """Sign and exponent, then the digits' bytes, highest first; digits less those `step` before, where it is not 0.

    Raises ValueError or ArithmeticError for what is no decimal of so many digits.
    """
    numbers, powers = [], []
    for text in column:
        sign, digits, power = Decimal(text.decode()).normalize().as_tuple()
        if len(digits) > _DIGITS or not isinstance(power, int):
            raise ValueError(text)
        padding = _DIGITS - len(digits) if any(digits) else 0
        numbers.append(int("".join(map(str, digits))) * 10**padding)
        powers.append(2 * (power - padding + 64) + sign)
    before = [0] * step + numbers[:-step] if step else [0] * len(numbers)
    moved = [(number - then) % _MODULUS for number, then in zip(numbers, before, strict=True)]
    planes = b"".join(bytes(number >> shift & 255 for number in moved) for shift in (16, 8, 0))
    return b'\x04%d"%b"' % (step, base64.b64encode(bytes(powers) + planes))


def _texts(step: int, packed: bytes) -> list[bytes]:
    """The column that `_decimals` was given."""
    powers, *planes = _planes(packed)
    numbers: list[int] = []
    for row, (high, middle, low) in enumerate(zip(*planes, strict=True)):
        then = numbers[row - step] if 0 < step <= row else 0
        numbers.append(((high << 16 | middle << 8 | low) + then) % _MODULUS)
    signs = ("", "-")
    texts = (f"{signs[p & 1]}{n}e{(p >> 1) - 64}" for p, n in zip(powers, numbers, strict=True))
    return [repr(float(text)).encode() for text in texts]


def _planes(packed: bytes) -> list[bytes]:
    """The four planes that lie one after another; raises ValueError if they are not of one length."""
    count, rest = divmod(len(packed), 4)
    if rest:
        raise ValueError("planes of unlike lengths")
    return [packed[start : start + count] for start in range(0, 4 * count, count)] if count else [b""] * 4
