"""One table of a page, before it is Markdown or LaTeX."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from dora_lab.report.labels import MISSING


@dataclass(frozen=True, kw_only=True)
class Block:
    """One table of a page: cells are text (None = missing), the first column names the row.

    `text` names the columns that are words and stand left (default: the first); the others, numbers, stand right;
    `apart` is how many rows at the end a rule sets apart (chance levels, numbers of items); `notes` follow the table;
    `isnt` ends them: in a sentence, what a reader could take the table for. `narrow` names the columns that fit one
    column of a page, `wide` those of its whole width (default: all); Markdown has all of them, the narrow ones first.
    """

    title: str
    cells: pd.DataFrame
    text: tuple[str, ...] = ()
    apart: int = 0
    notes: tuple[str, ...] = ()
    isnt: str = ""
    narrow: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for a form with a column that the table has not."""
        if strange := sorted({*self.narrow, *self.wide} - {*self.cells.columns}):
            raise ValueError(f"table block {self.title!r}: no column {', '.join(strange)} for its narrow or wide form")

    def columns(self) -> tuple[str, ...]:
        """Names of all columns. Raises: ValueError if there are none."""
        if not len(self.cells.columns):
            raise ValueError(f"table block {self.title!r} has no columns: no runs were found for it")
        return tuple(self.cells.columns)

    def left(self, name: str) -> bool:
        """Does a column stand left?"""
        return name in self.text if self.text else name == self.cells.columns[0]

    def said(self) -> tuple[str, ...]:
        """What stands below: the notes, then what the table is not."""
        return (*self.notes, *([f"What this is not: {self.isnt}"] if self.isnt else []))

    def rows(self, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The cells of some columns, what is missing as a dash."""
        cells = self.cells[list(columns)]
        return [tuple(MISSING if pd.isna(cell) else str(cell) for cell in row) for row in cells.to_numpy(dtype=object)]


def number(mean: float | None, sd: float | None = None, digits: int = 1) -> str | None:
    """`68.2 ± 1.1`, `68.2` without a deviation, None for a missing value."""
    if mean is None or pd.isna(mean):
        return None
    text = f"{mean:.{digits}f}".replace("-", "−")
    return text if sd is None or pd.isna(sd) else f"{text} ± {sd:.{digits}f}"


def interval(low: float | None, high: float | None, digits: int = 1) -> str | None:
    """`[−1.2, 3.4]`, None where an end is missing."""
    ends = number(low, digits=digits), number(high, digits=digits)
    return None if None in ends else f"[{ends[0]}, {ends[1]}]"


def p_text(p: float | None) -> str | None:
    """A p of two digits, three below .01; None for a missing value."""
    return None if p is None or pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.01 else f"{p:.2f}"
