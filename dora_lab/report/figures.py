"""Figures without a display, saved byte-stable with their provenance."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lab.io.atomic import write_bytes
from dora_lab.report.provenance import Provenance

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


def save_figure(figure: Figure, folder: Path, name: str, source: Provenance) -> list[Path]:
    """Write `<name>.pdf` and `<name>.png` (200 dpi) with their provenance as metadata; no dates. Returns the paths."""
    from matplotlib.text import Text

    folder.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):  # a name with $ in it is no formula; what matplotlib writes on an axis may be
        if isinstance(text, Text) and "$" in text.get_text() and not text.get_text().startswith("$\\mathdefault{"):
            text.set_parse_math(False)
    about = " ".join([text for text in (source.caption(), source.incomplete()) if text])
    runs = "runs: " + " ".join(source.runs)
    told = {
        "pdf": {"Subject": about, "Keywords": runs, "CreationDate": None, "Creator": "dora_lab", "Producer": None},
        "png": {"Description": about, "Comment": runs, "Software": None},
    }
    for ending, metadata in told.items():
        drawn = BytesIO()  # its writer of PDF hides what a full disk says
        figure.savefig(drawn, format=ending, dpi=200, metadata={"Title": name, **metadata})
        write_bytes(folder / f"{name}.{ending}", drawn.getvalue())
    return [folder / f"{name}.{ending}" for ending in told]
