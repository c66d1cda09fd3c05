"""Tables as Markdown, LaTeX and csv, and the generated block of a README."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab.io.atomic import write_text
from dora_lab.io.text import no_formula
from dora_lab.report.block import Block
from dora_lab.report.latex import CONTROLS, NEEDS, latex, latex_escape
from dora_lab.report.provenance import Provenance

WIDTH = 100  # columns of a terminal in which Markdown is read


def save_table(
    folder: Path,
    name: str,
    title: str,
    blocks: Sequence[Block],
    data: pd.DataFrame,
    source: Provenance,
    isnt: str = "",
) -> list[Path]:
    """Write `<name>.md`, `<name>.tex`, `<name>.csv` (`data`, a row per number) and, if it has one, `<name>_narrow.tex`.

    isnt: what those blocks are not that do not say so themselves.
    Raises: ValueError if a block has no columns, or two have one title. Returns the paths written.
    """
    titles = [block.title for block in blocks]
    if twice := next((one for one in titles if titles.count(one) > 1), None):
        raise ValueError(f"table {name}: two blocks with the title {twice!r}; a label has to tell them apart")
    blocks = [replace(block, isnt=block.isnt or isnt) for block in blocks]
    folder.mkdir(parents=True, exist_ok=True)
    left_out = [text for text in (source.incomplete(),) if text]
    runs = " ".join(re.sub(r"[^A-Za-z0-9.]+", "-", run) for run in source.runs)
    below = "\n\n".join(_prose(text) for text in (source.caption(), *left_out))
    page = [f"# {_plain(title)}", *(markdown(block) for block in blocks), below, f"<!-- runs: {runs} -->"]
    head = f"% runs: {runs}\n% {latex_escape(source.caption())}\n{NEEDS}"
    texts = {
        f"{name}.md": "\n\n".join(page) + "\n",
        f"{name}.tex": "\n\n".join([head, *(latex(block, title, name, left_out) for block in blocks)]) + "\n",
        f"{name}.csv": csv_text(data, "%.6g"),
    }
    if narrow := [latex(block, title, name, narrow=True) for block in blocks if block.narrow]:
        texts[f"{name}_narrow.tex"] = "\n\n".join([head, *narrow]) + "\n"
    for file, text in texts.items():
        write_text(folder / file, text)
    return [folder / file for file in texts]


def csv_text(data: pd.DataFrame, digits: str | None = None) -> str:
    """A frame as CSV in which no cell and no head is a formula to a spreadsheet, nor holds a NUL; numbers stay."""
    data = data.rename(columns=_harmless).map(_harmless)
    return data.to_csv(index=False, lineterminator="\n", float_format=digits)


def _harmless(value: Any) -> Any:
    """Not every reader and writer of CSV takes a NUL; a lone CR would not be quoted and begins a row to many."""
    if not isinstance(value, str):
        return value
    return no_formula(value.replace("\0", "\ufffd").replace("\r\n", "\n").replace("\r", "\n"))


def markdown(block: Block, level: int = 2) -> str:
    """A block as Markdown: heading, pipe table, notes.

    Where there is a narrow form, the table is two: the columns between its own stand in one of their own.
    """
    columns = block.columns()
    between = [name for name in columns if name not in block.narrow]
    while between and block.narrow and columns.index(between[-1]) > columns.index(block.narrow[-1]):
        between.pop()
    forms = [tuple(name for name in columns if name not in between), (columns[0], *between)]
    tables = [_pipes(block, form) for form in (forms if block.narrow and between else [columns])]
    return "\n\n".join([f"{'#' * level} {_plain(block.title)}", *tables, *map(_prose, block.said())])


def _pipes(block: Block, columns: tuple[str, ...]) -> str:
    rule = tuple("---" if block.left(name) else "---:" for name in columns)
    lines = [
        "| " + " | ".join(row) + " |"
        for row in (tuple(map(_cell, columns)), rule, *(tuple(map(_cell, row)) for row in block.rows(columns)))
    ]
    table = "\n".join(lines)
    return table.replace(" ± ", "±") if max(map(len, lines)) > WIDTH else table


_OPENS = re.compile(r" (?=[-+*#>=~`|]|\d+[.)](?: |$))")  # would open a list, a heading or code at the start of a line


def _prose(text: Any) -> str:
    """A paragraph in lines that a terminal shows whole."""
    kept = _OPENS.sub("\xa0", _plain(text))
    return "\n".join(textwrap.wrap(kept, WIDTH, break_long_words=False, break_on_hyphens=False)).replace("\xa0", " ")


def _plain(text: Any) -> str:
    """Text on one line of Markdown that opens no tag, no entity, no link and no comment, whoever wrote it."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", CONTROLS.sub(" ", str(text)))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    return text.replace("-->", "--&gt;").replace("](", "]\\(")


def _cell(text: Any) -> str:
    """The same in a cell of a pipe table, which a backslash before the pipe would open again."""
    return re.sub(r"\\(?=\|)", r"\\\\", _plain(text)).replace("|", "\\|")


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
