"""The table of a visit's rows: a screen's height, no wider than 110 columns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

WIDTH, HEIGHT = 110, 50
LOST = ("error", "out_of_memory", "skipped")
# group, contender, the one it is divided by, what, at most (None: the cost of a form, no target)
TARGETS: tuple[tuple[str, str, str, str, float | None], ...] = (
    ("linears", "ours/dora", "ours/lora", "seconds", 1.05),
    ("linears, compiled", "ours/dora-compiled", "ours/lora-compiled", "seconds", 1.05),
    ("linears", "ours/dora-branch", "ours/lora-dropped", "seconds", 1.05),
    ("linears", "ours/dora-published", "ours/lora-dropped", "seconds", None),
    ("linears", "ours/dora", "peft/dora", "seconds", 0.60),
    ("checkpointed", "ours/dora", "peft/dora", "seconds", 0.60),
    ("checkpointed", "ours/dora", "ours/lora", "peak_bytes", 1.02),
    ("not checkpointed", "ours/dora", "ours/lora", "peak_bytes", 1.12),
)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """What is printed last."""
    first = rows[0] if rows else {}
    head = f"{first.get('card') or 'no GPU'}, torch {first.get('torch')}, commit {str(first.get('commit'))[:10]}"
    timed = [row for row in rows if row.get("contender") and "seconds" in row]
    found = [head, *_ceilings(rows), *_right(rows), *_targets(timed), *_groups(timed), *_saved(rows), *_merged(rows)]
    lost = [row for row in rows if any(name in row for name in LOST)]
    room = max(1, HEIGHT - len(found))
    told = [_lost(row) for row in sorted(lost, key=lambda row: "error" not in row)]
    if len(told) > room:
        told = [*told[: room - 1], f"... and {len(told) - room + 1} cells more failed or were left out: see the rows"]
    return [line[:WIDTH] for line in (found[: HEIGHT - len(told)] + told)]


def ratio(row: dict[str, Any], rows: list[dict[str, Any]], under: str, what: str = "seconds") -> float | None:
    """A row's number over that of another contender of its group; None if one of the two is not there."""
    other = next((each for each in rows if (each["group"], each["contender"]) == (row["group"], under)), None)
    if other is None or not other.get(what) or not row.get(what):
        return None
    if what == "seconds" and row.get("in_turns") and other.get("in_turns"):  # timed together: round by round
        return statistics.median(one / two for one, two in zip(row["taken"], other["taken"], strict=True))
    return row[what] / other[what]


def _ceilings(rows: list[dict[str, Any]]) -> list[str]:
    parts = [
        f"{row['cell']} {row.get('gbps') or row.get('tflops'):.3g} {'GB/s' if 'gbps' in row else 'TFLOP/s'}"
        for row in rows
        if row["stage"] == "ceilings" and "rate" in row
    ]
    return ["ceilings: " + ", ".join(parts)] if parts else []


def _right(rows: list[dict[str, Any]]) -> list[str]:
    checked = [row for row in rows if "ok" in row]
    wrong = [row for row in checked if not row["ok"]]
    shown = [f"  NOT RIGHT {row['cell']}: {_number(row.get('worst'), '.2e')} > {row.get('tolerance')}" for row in wrong]
    return [f"right: {len(checked) - len(wrong)} of {len(checked)} checks", *shown[:5]] if checked else []


def _targets(timed: list[dict[str, Any]]) -> Iterator[str]:
    """The ratios that have a target, two a line."""
    found = []
    for group, name, under, what, limit in TARGETS:
        row = next((row for row in timed if (row["group"], row["contender"]) == (group, name)), None)
        seen = ratio(row, timed, under, what) if row else None
        if seen is not None:
            end = f"(≤{limit:.2f} {'met' if seen <= limit else 'NO'})" if limit else "(its cost)"
            memory = " memory" if what == "peak_bytes" else ""
            found.append(f"{group}{memory} {name.partition('/')[2]}/{under.removeprefix('ours/')} {seen:.3f} {end}")
    yield from (" | ".join(found[start : start + 2]) for start in range(0, len(found), 2))


def _groups(timed: list[dict[str, Any]]) -> Iterator[str]:
    """Every contender by its group, two a line: ms, share of the product ceiling, GB, time over own LoRA's."""
    for group in dict.fromkeys(row["group"] for row in timed):
        here = [row for row in timed if row["group"] == group]
        parts = [_contender(row, here) for row in here]
        yield f"-- {group}: ms, share, GB, / own LoRA"
        yield from (" | ".join(parts[start : start + 2]) for start in range(0, len(parts), 2))


def _contender(row: dict[str, Any], here: list[dict[str, Any]]) -> str:
    under = next((name for name in ("ours/lora", "ours/lora-dropped") if ratio(row, here, name)), "ours/lora")
    gigabytes = row["peak_bytes"] / 1e9 if row.get("peak_bytes") else None
    return (
        f"{row['contender'][:25]:25}{row['seconds'] * 1e3:8.1f}{_number(row.get('share'), '6.3f')}"
        f"{_number(gigabytes, '6.1f')}{_number(ratio(row, here, under), '7.3f')}"
    )


def _saved(rows: list[dict[str, Any]]) -> Iterator[str]:
    parts = [
        f"{row['cell']} {row['seconds']:.3g} s {row['gbps']:.3g} GB/s ({row['share'] or 0:.2g})"
        for row in rows
        if row["stage"] == "probe" and "gbps" in row
    ]
    yield from ("probe: " + " | ".join(parts[start : start + 2]) for start in range(0, len(parts), 2))


def _merged(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "decode_merged_over_base" in row:
            whose = [
                f"{what} {row[f'{what}_merged_over_base']:.3f} (adapted {row[f'{what}_adapted_over_base']:.3f})"
                for what in ("prefill", "decode")
            ]
            yield f"merged inference / base: {', '.join(whose)}"
    logits = [f"{row['cell'][8:]} {row['largest_share']:.2g}" for row in rows if "largest_share" in row]
    if logits:
        yield f"merged against adapted, largest logit difference / deviation: {', '.join(logits)}"


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None else " " * int(form.partition(".")[0] or 0)


def _lost(row: dict[str, Any]) -> str:
    what = next(name for name in LOST if name in row)
    return f"{row['stage']} · {row['cell']}: {what.replace('_', ' ')}: {row[what]}".replace("\n", " ")
