"""Tables as Markdown, LaTeX (booktabs) and csv, and the generated block of a README."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab.io.atomic import write_text
from dora_lab.io.text import no_formula
from dora_lab.report.labels import MISSING
from dora_lab.report.provenance import Provenance


@dataclass(frozen=True, kw_only=True)
class Block:
    """One table of a page: cells are text (None = missing), the first column names the row.

    `text` names the columns that are words and stand left (default: the first); the others, numbers, stand right;
    `apart` is how many rows at the end a rule sets apart (chance levels, numbers of items); `notes` follow the table.
    """

    title: str
    cells: pd.DataFrame
    text: tuple[str, ...] = ()
    apart: int = 0
    notes: tuple[str, ...] = ()

    def left(self) -> list[bool]:
        """Per column: does it stand left?"""
        return [name in self.text if self.text else i == 0 for i, name in enumerate(self.cells.columns)]


def number(mean: float | None, sd: float | None = None, digits: int = 1) -> str | None:
    """`68.2 ± 1.1`, `68.2` without a deviation, None for a missing value."""
    if mean is None or pd.isna(mean):
        return None
    text = f"{mean:.{digits}f}".replace("-", "−")
    return text if sd is None or pd.isna(sd) else f"{text} ± {sd:.{digits}f}"


def save_table(
    folder: Path, name: str, title: str, blocks: Sequence[Block], data: pd.DataFrame, source: Provenance
) -> list[Path]:
    """Write `<name>.md`, `<name>.tex` (needs only \\usepackage{booktabs}) and `<name>.csv` (`data`, a row per number).

    Raises: ValueError if a block has no columns. Returns the paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tail = [text for text in (source.caption(), source.incomplete()) if text]
    runs = " ".join(re.sub(r"[^A-Za-z0-9.]+", "-", run) for run in source.runs)
    texts = [f"# {_plain(title)}", *(markdown(block) for block in blocks), "\n\n".join(map(_plain, tail))]
    parts = [*texts, f"<!-- runs: {runs} -->"]
    tex = [f"% runs: {runs}", *(_latex(block, title, tail) for block in blocks)]
    paths = [folder / f"{name}.{ending}" for ending in ("md", "tex", "csv")]
    data = data.rename(columns=_without_nul).map(_without_nul).map(no_formula)
    numbers = data.to_csv(index=False, lineterminator="\n", float_format="%.6g", quoting=csv.QUOTE_MINIMAL)
    for path, text in zip(paths, ("\n\n".join(parts) + "\n", "\n\n".join(tex) + "\n", numbers), strict=True):
        write_text(path, text)
    return paths


def _without_nul(value: Any) -> Any:
    """A NUL in a text, which not every reader and writer of CSV takes, as the sign for what cannot be shown."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value


def markdown(block: Block, level: int = 2) -> str:
    """A block as Markdown: heading, pipe table, notes."""
    if not len(block.cells.columns):
        raise ValueError(f"table block {block.title!r} has no columns: no runs were found for it")
    rows = [[MISSING if pd.isna(c) else _cell(c) for c in row] for row in block.cells.itertuples(index=False)]
    rule = ["---" if left else "---:" for left in block.left()]
    lines = ["| " + " | ".join(cells) + " |" for cells in (map(_cell, block.cells.columns), rule, *rows)]
    return "\n\n".join([f"{'#' * level} {_plain(block.title)}", "\n".join(lines), *map(_plain, block.notes)])


_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def _plain(text: Any) -> str:
    """Text on one line of Markdown that opens no tag, no entity, no link and no comment, whoever wrote it."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", _CONTROLS.sub(" ", str(text)))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    return text.replace("-->", "--&gt;").replace("](", "]\\(")


def _cell(text: Any) -> str:
    """The same in a cell of a pipe table, which a backslash before the pipe would open again."""
    return re.sub(r"\\(?=\|)", r"\\\\", _plain(text)).replace("|", "\\|")


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "Δ": r"$\Delta$",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "→": r"$\to$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "*": "*",
    "`": "",
    "…": r"\dots{}",
    "é": r"\'e",
}


def latex_escape(text: str) -> str:
    """Text for pdflatex, ASCII on one line; a character without a LaTeX form here becomes its code, "[U+6F22]"."""
    forms = (_TEX.get(one, one if one.isascii() else f"[U+{ord(one):04X}]") for one in _CONTROLS.sub(" ", text))
    return "".join(forms)


def _latex(block: Block, title: str, tail: Sequence[str]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return " & ".join(latex_escape(MISSING if pd.isna(c) else str(c)) for c in cells) + r" \\"

    rows = [line(row) for row in block.cells.itertuples(index=False)]
    cut = len(rows) - block.apart
    body = rows[:cut] + ([r"\midrule", *rows[cut:]] if block.apart else [])
    columns = "".join("l" if left else "r" for left in block.left())
    caption = latex_escape(" ".join([f"{title}: {block.title}.", *block.notes, *tail]))
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(block.cells.columns),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def readme_block(readme: Path, text: str, name: str = "table") -> bool:
    """Replace what stands between `<!-- {name}:begin -->` and `<!-- {name}:end -->` of a file by `text`.

    Returns whether the file changed. Raises: ValueError if the two markers are not there once each, in that order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = readme.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{readme}: needs the lines {begin} and {end} once each, in that order")
    new = old[: old.index(begin) + len(begin)] + f"\n{text.strip()}\n" + old[old.index(end) :]
    if new != old:
        write_text(readme, new)
    return new != old
