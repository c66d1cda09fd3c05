"""A stream by columns in a pack: what lies there, and that it comes back byte for byte."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from dora_lab.runs import packs

STEPS, MODULES = 6, 5
ODD = (
    *("0.0", "-0.0", "-0.000000000000000000", "1", "12345678", "9999999.0", "1234567.5000000000", "1e+07", "1E5"),
    *("1e-70", "1e39", "1e400", "NaN", "-Infinity", "null", "true", '"1.1000000238418579"'),
)


def _lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _measured() -> list[dict[str, object]]:
    """Rows as a probe writes them: every module at every step, floats of seven digits that move little."""
    rng = np.random.default_rng(0)
    start = rng.lognormal(-4, 2, MODULES) * [1, -1, 1, -1, 1]
    return [
        {"step": 10 * step, "module": f"layer.{m}", "delta": float(f"{start[m] * (1 + step / 200) ** (m + 1):.7g}")}
        for step in range(STEPS)
        for m in range(MODULES)
    ]


def test_lines_alike_are_kept_by_columns() -> None:
    numbers = base64.b64encode(bytes(range(60)))
    lines = b"".join(
        b'{"step": %d, "share": "100%%", "name": "a, \\"b\\": %d", "x": {"n": [1, 2], "y": "%b"}}\n'
        % (step, step, numbers)
        for step in (1, 2)
    )
    kept, apart = packs._apart(lines)
    common = b'{"step": \x02, "share": \x02, "name": \x02, "x": {"n": [1, 2], "y": \x02}}\n'
    columns = [b"1\n2", b'"100%"\n"100%"', b'"a, \\"b\\": 1"\n"a, \\"b\\": 2"', b'"\x0060"\n"\x0060"']
    assert kept == b"\x05" + b"\x01".join([common, *columns])
    assert packs._together(kept, apart) == lines
    for whole in (
        lines + b'{"step": 3}\n',
        lines[:-1],
        b"\n",
        b'{"a": [1]}\n{"a": [2]}\n',
        lines.replace(b"\n", b"\r\n"),
    ):
        assert packs._together(*packs._apart(whole)) == whole


def test_a_column_of_float32_is_kept_as_its_bytes() -> None:
    values = np.random.default_rng(0).gamma(1, 3, 40).astype("<f4")
    values[:5] = 0.0, -1.5, 1e-30, 3e38, 1e-45  # the last is not normal
    rows: list[dict[str, object]] = [
        {"step": k, "loss": float(value), "other": float(value) / 3} for k, value in enumerate(values)
    ]
    lines = _lines(rows)
    kept, apart = packs._apart(lines)
    places = values.view("u1").reshape(-1, 4).T.tobytes()
    assert kept.split(b"\x01")[2] == b'\x03"\x00%d"' % len(places) and apart == places[::2] + places[1::2]
    assert kept.split(b"\x01")[3].count(b"\n") == len(rows) - 1  # no float32: as text
    assert packs._together(kept, apart) == lines


def test_what_moves_little_between_checkpoints_is_kept_as_three_bytes_of_difference() -> None:
    rows = _measured()
    lines = _lines(rows)
    kept, apart = packs._apart(lines)
    assert kept.split(b"\x01")[3] == b'\x04%d"\x00%d"' % (MODULES, 4 * len(rows)) and apart is not None
    planes = bytearray(len(apart))
    planes[::2], planes[1::2] = apart[: len(apart) // 2], apart[len(apart) // 2 :]
    powers, high, middle, low = np.frombuffer(bytes(planes), "u1").reshape(4, -1).astype(np.int64)
    digits = ((high << 16) + (middle << 8) + low).reshape(STEPS, MODULES).cumsum(0) % (1 << 24)
    values = np.where(powers & 1, -1, 1) * digits.ravel() * 10.0 ** ((powers >> 1) - 64)
    assert values == pytest.approx([row["delta"] for row in rows], rel=1e-12)  # read without the room's own code
    assert digits.min() >= 10**6 and digits.max() < 10**7
    assert packs._together(kept, apart) == lines


@pytest.mark.parametrize("seed", range(5))
def test_odd_values_come_back_byte_for_byte(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-40, 39, 40)
    for digits in (1, 5, 7, 8, 17):
        values = [float(f"{value:.{digits}g}") for value in rng.normal(size=40) * scales]
        texts = [repr(value).encode() for value in values]
        for odd in ODD:
            whole = b"".join(b'{"a": %b, "b": 1}\n' % text for text in [*texts, odd.encode()])
            assert packs._together(*packs._apart(whole)) == whole, odd


def test_a_part_from_before_the_decimals_is_read_as_it_was() -> None:
    values = np.array([1.5, -0.25, 3.1], "<f4")
    numbers = [bytes(range(start, start + 60)) for start in (0, 60, 120, 180, 9, 99)]
    rows = [
        {"loss": float(value), "a": base64.b64encode(a).decode(), "b": base64.b64encode(b).decode()}
        for value, a, b in zip(values, numbers[::2], numbers[1::2], strict=True)
    ]
    places = base64.b64encode(values.view("u1").reshape(-1, 4).T.tobytes())
    marks = b"\n".join([b'"\x0060"'] * 3)
    content = b"\x01".join([b'\x01{"loss": \x02, "a": \x02, "b": \x02}\n', b"\x03" + places, marks, marks])
    joined = b"".join(numbers)  # line by line, not column by column
    assert packs._together(b"\x01" + content[1:], joined[::2] + joined[1::2]) == _lines(rows)


@pytest.mark.parametrize("harm", (b'\x04x"', b'\x04-1"', b"\x04", b"\x039"))
def test_a_damaged_column_is_refused(harm: bytes) -> None:
    lines = _lines(_measured())
    kept, apart = packs._apart(lines)
    damaged = kept.replace(b'\x04%d"' % MODULES, harm)
    assert damaged != kept
    with pytest.raises(ValueError):
        packs._together(damaged, apart)
