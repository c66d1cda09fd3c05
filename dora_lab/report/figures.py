"""Figures without a display, saved byte-stable with their provenance and, beside them, their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import pandas as pd

from dora_lab.io.atomic import write_bytes, write_text
from dora_lab.report.provenance import Provenance
from dora_lab.report.tables import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its array of axes (rows, columns), without a display; width and height in inches."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "pdf.fonttype": 42,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
        }
    )
    figure = NewFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend_below(figure: Figure, handles: Sequence[Any], title: str) -> None:
    """A legend under the panels, in as many columns as fit its longest entry; the figure grows by its height."""
    width, height = figure.get_size_inches()
    widths = [0.075 * len(str(handle.get_label())) + 0.55 for handle in handles] or [1.0]
    columns = len(widths) if sum(widths) < width else max(1, int(width / max(widths)))
    title = "\n".join(wrap(title, int(width * 14)))
    figure.set_size_inches(width, height + 0.19 * (-(-len(handles) // columns) + title.count("\n") + 1) + 0.1)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, title=title, fontsize=8,
        title_fontsize=8, handlelength=2.8,
    )  # fmt: skip


def save_figure(
    figure: Figure, folder: Path, name: str, source: Provenance, data: pd.DataFrame | None = None
) -> list[Path]:
    """Write `<name>.pdf`, `<name>.png` (150 dpi) and what they show as `<name>.data.csv`, with their provenance as
    metadata; no dates. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending in ("pdf", "png"):
        write_figure(figure, folder / f"{name}.{ending}", source)
    return [folder / f"{name}.{ending}" for ending in ("pdf", "png")] + (
        [] if data is None else [write_data(data, folder / name)]
    )


def write_figure(figure: Figure, file: Path, source: Provenance | None = None) -> Path:
    """Write one figure in the format of its file's ending, .pdf or .png; byte-stable. Returns the path."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a name with $ in it is no formula; what matplotlib writes on an axis may be
        if isinstance(text, Text) and "$" in text.get_text() and not text.get_text().startswith("$\\mathdefault{"):
            text.set_parse_math(False)
    about = " ".join(text for text in (source.caption(), source.incomplete()) if text) if source else None
    runs = "runs: " + " ".join(source.runs) if source else None
    told = {
        ".pdf": {"Subject": about, "Keywords": runs, "CreationDate": None, "Creator": "dora_lab", "Producer": None},
        ".png": {"Description": about, "Comment": runs, "Software": None},
    }
    drawn = BytesIO()  # its writer of PDF hides what a full disk says
    metadata = {"Title": file.stem, **told[file.suffix]}
    figure.savefig(drawn, format=file.suffix[1:], dpi=150, metadata=metadata)
    write_bytes(file, _few_colours(drawn) if file.suffix == ".png" else drawn.getvalue())
    return file


def _few_colours(png: BytesIO) -> bytes:
    """The picture with a palette, a third of its bytes: it has some twenty colours and their edges."""
    from PIL import Image, PngImagePlugin

    told, out = PngImagePlugin.PngInfo(), BytesIO()
    with Image.open(png) as image:
        for key in ("Title", "Description", "Comment"):
            if key in image.info:
                told.add_text(key, image.info[key])
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(out, "PNG", optimize=True, pnginfo=told, dpi=image.info["dpi"])
    return out.getvalue()


def write_data(data: pd.DataFrame, beside: Path) -> Path:
    """Write the numbers of a figure as `<beside>.data.csv`; no text of it is a formula. Returns the path."""
    file = beside.with_name(f"{beside.name}.data.csv")  # never the file of rows that a figure was drawn from
    write_text(file, csv_text(data, "%.6g"))
    return file
