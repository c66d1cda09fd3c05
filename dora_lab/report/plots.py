"""A figure of any rows with ΔD and ΔM: against each other, over training, or over layers."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dora_lab.report.charts import Printed, lines, scatter
from dora_lab.report.figures import write_data, write_figure
from dora_lab.report.labels import KINDS
from dora_lab.report.points import points
from dora_lab.report.provenance import Provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"delta_m": "ΔM: mean |m − m₀|", "delta_d": "ΔD: mean (1 − cos)"}
FORMS = ("scatter", "training", "layers")
ENDINGS = (".png", ".pdf")
Rows = pd.DataFrame | Iterable[Mapping[str, Any]]


def plot(
    rows: Rows,
    file: Path | str | None = None,
    *,
    form: str = "scatter",
    paper: Iterable[Printed] = (),
    source: Provenance | None = None,
) -> Figure:
    """Draw rows of `DecompositionCallback`, of `dora-lab probe` or of `report.frame(stream="probe")`.

    file: .png or .pdf to write, and what it shows beside it as `<name>.data.csv`. form: "scatter" (ΔD against ΔM),
    "training" (both over the checkpoints) or "layers" (both at the last one). paper: see `charts.scatter`, e.g.
    `dora_lab.paper.axes.PANELS`. source: of runs, written into the file. Rows of several models or seeds are told apart
    by the fields label (or tuned) and seed.
    Raises: ValueError for an unknown form or ending, and naming row and field for rows that cannot be drawn.
    """
    if form not in FORMS:
        raise ValueError(f"form '{form}' is not one of {', '.join(FORMS)}")
    if file is not None and Path(file).suffix not in ENDINGS:
        raise ValueError(f"{file}: a figure must end in {' or '.join(ENDINGS)}")
    if file is not None and not (folder := Path(file).absolute().parent).is_dir():
        raise ValueError(f"{file}: the folder {folder} does not exist; create it")
    draw = {"training": over_training, "layers": over_layers}.get(form)
    figure, data = scatter(rows, paper) if draw is None else draw(rows)
    if file is not None:
        write_figure(figure, Path(file), source)
        write_data(data, Path(file).with_suffix(""))
    return figure


def over_training(rows: Rows) -> tuple[Figure, pd.DataFrame]:
    """ΔM and ΔD over the training for each kind of matrix: the mean over matrices; every line begins at zero.

    Returns the figure and its numbers, as `charts.lines` does; the interval is from the lowest to the highest seed.
    Raises: ValueError as `points`.
    """
    found = points(rows)
    shares = bool((found["at"] <= 1).all())
    if np.isinf(found["at"]).any():
        raise ValueError("field 'step': models that were saved once have no course of training; plot the scatter")
    data = _over(found, "at")
    starts = data.drop_duplicates(["row", "column", "label"]).assign(x=0.0, y=0.0, low=0.0, high=0.0)
    data = pd.concat([starts, data]).sort_values("x", kind="stable")
    data = data.sort_values("row", kind="stable", key=lambda row: row.map(list(MEASURES.values()).index))
    ticks = {name: {0.0: "0", 0.5: "½", 1.0: "1"} for name in data["column"]} if shares else None
    name = "share of training" if shares else "step"
    return lines(data, name, f"mean of matrices{_seeds(found, 'band')}", ticks=ticks, band=True)


def over_layers(rows: Rows) -> tuple[Figure, pd.DataFrame]:
    """ΔM and ΔD of each layer at the last checkpoint of every label, for each kind of matrix.

    Returns the figure and its numbers, as `charts.lines` does; the interval is from the lowest to the highest seed.
    Raises: ValueError as `points`, and where no row has a layer.
    """
    found = points(rows)
    last = found[(found["at"] == found.groupby(["label", "seed"])["at"].transform("max")) & found["layer"].notna()]
    if not len(last):
        raise ValueError("field 'layer' has a value in no row at the last checkpoint; plot the scatter")
    return lines(_over(last, "layer"), "layer", f"last checkpoint{_seeds(found, 'bars')}", dodge=0.08)


def _over(found: pd.DataFrame, by: str) -> pd.DataFrame:
    """Mean over seeds (of the means over matrices) with the lowest and highest seed: a row per measure, kind, label."""
    parts = []
    for measure, name in MEASURES.items():
        for (kind, label), part in found.groupby(["kind", "label"], sort=False):
            means = part.groupby([by, "seed"])[measure].mean().groupby(by).agg(["mean", "min", "max"]).reset_index()
            means.columns = ["x", "y", "low", "high"]
            parts.append(means.assign(row=name, column=KINDS.get(kind, kind), label=label))
    return pd.concat(parts)[["row", "column", "label", "x", "y", "low", "high"]]


def _seeds(found: pd.DataFrame, shown: str) -> str:
    seeds = sorted(found.groupby("label")["seed"].nunique().unique())
    return f"; mean of {'/'.join(map(str, seeds))} seeds, {shown}: all seeds" if seeds[-1] > 1 else "; one seed"
