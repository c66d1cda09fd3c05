"""An answer that is a table: compact for a terminal or a pipe, Markdown for a page, csv and JSON for other programs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dora_lab.commands.app import say
from dora_lab.io.text import shown

if TYPE_CHECKING:
    import pandas as pd  # and what imports it below: a second that --help and the shell's completion need not wait

WIDTH = 100  # of what is piped, unless COLUMNS says otherwise


class Format(str, Enum):
    """Whom a table is for."""

    text = "text"
    md = "md"
    csv = "csv"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="Text and md are short, csv and json are whole.")]
_NUMBER = re.compile(r"[-+−±\d.,/%\[\] e]*|–")
_STYLES = {
    "green": "holds superior equivalent same agrees",
    "red": "does differs failed below inferior",
    "yellow": "missing undecided within interrupted",
    "dim": "no not",
    "bold": "yours",
}
_STYLE_OF = {word: style for style, words in _STYLES.items() for word in words.split()}


def show(
    data: Mapping[str, pd.DataFrame], views: Sequence[tuple[str, pd.DataFrame]], form: Format, notes: Sequence[str] = ()
) -> None:
    """Print an answer on stdout.

    data: the tables by name, numbers as they are: all that csv and json print (where there are several, each row says
    its `table`). views: (title, the same for people, cells being text) and the notes below them: text and md.
    """
    import pandas as pd

    from dora_lab.report.block import Block
    from dora_lab.report.tables import csv_text, markdown

    if form is Format.json:
        typer.echo(json.dumps(_rows(data), ensure_ascii=False, indent=1))
    elif form is Format.csv:
        typer.echo(csv_text(pd.DataFrame(_rows(data)).convert_dtypes()), nl=False)
    elif form is Format.md:
        blocks = (Block(title=title, cells=view, text=tuple(_words(view))) for title, view in views if len(view))
        say("\n\n".join([*map(markdown, blocks), *notes]))
    else:
        for title, view in views:
            if len(view):
                _draw(title, view)
        for note in notes:
            say(note)


def _rows(data: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    several = len(data) > 1
    return [
        ({"table": name} if several else {}) | row
        for name, frame in data.items()
        for row in json.loads(frame.to_json(orient="records", double_precision=12) or "[]")
    ]


def _words(view: pd.DataFrame) -> list[str]:
    """The columns that hold words, and so stand left."""
    return [str(name) for name in view if not all(_NUMBER.fullmatch(str(cell)) for cell in view[name].dropna())]


def _draw(title: str, view: pd.DataFrame) -> None:
    """A table as wide as the terminal; coloured there, and nowhere else."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dora_lab.report.labels import MISSING

    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout, highlight=False, force_terminal=terminal,
        width=None if terminal or "COLUMNS" in os.environ else WIDTH,
    )  # fmt: skip
    table = Table(title=Text(shown(title)) if title else None, title_justify="left", box=None, pad_edge=False,
                  collapse_padding=True, title_style="bold", header_style="bold")  # fmt: skip
    words = _words(view)
    for name in view:
        table.add_column(Text(str(name)), justify="left" if name in words else "right", overflow="fold")
    for row in view.itertuples(index=False):
        cells = [MISSING if pd.isna(cell) else shown(cell) for cell in row]
        table.add_row(*(Text(cell, style=_STYLE_OF.get(cell.partition(" ")[0], "")) for cell in cells))
    with console.capture() as drawn:
        console.print(table)
    typer.echo("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))
