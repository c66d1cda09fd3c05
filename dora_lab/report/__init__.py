"""From records to frames, and from frames to tables and figures that carry their provenance.

The reading side: imports no torch and no transformers, so everything a reader sees rebuilds in seconds.

- `frame` reads one stream of all complete runs, one row per stream row, with the spec flattened into columns.
- `scores` turns evaluation rows into means and standard deviations over seeds.
- `beside` says what can stand with every score: alpha, learning rate, time, memory.
- `save_table` (md, csv, and tex that fits a page of two columns) and `save_figure` (pdf, png) write byte-stable files:
  no dates, no hosts.
- `scatter` and `lines` are the charts, each with its numbers; `plot` draws the rows of a callback, a probe or runs.
- `readme_block` puts generated text between `<!-- table:begin -->` and `<!-- table:end -->` of a README.

A missing value is None in a frame, `–` in a table and an empty field in a csv file. It is never 0.
"""

from __future__ import annotations

from dora_lab.report.apart import beside, sets_apart
from dora_lab.report.block import Block, interval, number, p_text
from dora_lab.report.charts import line_rows, lines, scatter
from dora_lab.report.figures import new_figure, save_figure
from dora_lab.report.frames import GROUP, REFUSED, frame, groups, scores
from dora_lab.report.labels import (
    HALF_RANK,
    KINDS,
    METHODS,
    MISSING,
    TASKS,
    Style,
    cell_name,
    ordered_labels,
    ordered_tasks,
    standing,
    style,
    styles,
)
from dora_lab.report.latex import latex_escape
from dora_lab.report.plots import over_layers, over_training, plot
from dora_lab.report.provenance import Provenance, provenance
from dora_lab.report.tables import csv_text, markdown, readme_block, save_table

__all__ = [
    "GROUP",
    "HALF_RANK",
    "KINDS",
    "METHODS",
    "MISSING",
    "REFUSED",
    "TASKS",
    "Block",
    "Provenance",
    "Style",
    "beside",
    "cell_name",
    "csv_text",
    "frame",
    "groups",
    "interval",
    "latex_escape",
    "line_rows",
    "lines",
    "markdown",
    "new_figure",
    "number",
    "ordered_labels",
    "ordered_tasks",
    "over_layers",
    "over_training",
    "p_text",
    "plot",
    "provenance",
    "readme_block",
    "save_figure",
    "save_table",
    "scatter",
    "scores",
    "sets_apart",
    "standing",
    "style",
    "styles",
]
