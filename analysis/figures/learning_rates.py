"""Learning-rate response: the NLL of every rate that a sweep tried, seeds as dots.

Methods are compared at the rate that each one's own curve chooses (tables/rates); here is what another rate would have
cost.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, script
from analysis.tables.rates import cell_label, swept
from dora_lab import report
from dora_lab.report.charts import WIDE

NOTE = "Validation items. Dots: seeds; line: their mean, where every seed came to an end."


def build(results: Path) -> list[Path]:
    """Write results/figures/learning_rates_<tier>_<data>.{pdf,png,data.csv} per data; returns the paths."""
    evals = frame(results)
    losses = swept(evals)
    if not len(losses):
        return []
    paths: list[Path] = []
    losses = losses[~losses["experiment"].isin(("samples", "sign"))]  # other sizes, another optimiser: no such cells
    for (tier, data), part in losses.groupby(["tier", "data"]):
        source = report.provenance(evals[evals["spec_id"].isin(part["spec_id"])], evals.attrs["statuses"])
        rows = curves(part)
        ticks = {name: _ticks(of["x"]) for name, of in rows.groupby("column", sort=False)}
        losses_of_seeds = [value for values in rows["dots"] for value in values]
        low, high = min(losses_of_seeds), max(losses_of_seeds)
        wide, room = high > WIDE * low, 0.05 * (high - low)  # one rate that fails would leave the others no room
        limits = (low / 1.1, high * 1.1) if wide else (low - room, high + room)
        figure, numbers = report.lines(
            rows, "learning rate", NOTE, ticks=ticks, limits=limits, doublings=True, logarithmic=wide
        )
        paths += report.save_figure(figure, results / "figures", f"learning_rates_{tier}_{data}", source, numbers)
    return paths


def curves(losses: pd.DataFrame) -> pd.DataFrame:
    """The rows of `report.lines`: a column of panels a method, a label a rank (and scale); y: mean over seeds."""
    rows = []
    order, row = list(report.METHODS).index, f"{losses['nll'].iloc[0]} NLL, nats, mean over tasks"
    for method in sorted(losses["method"].unique(), key=order):
        mine = losses[losses["method"] == method]
        for (rank, alpha), cell in mine.groupby(["rank", "method.alpha"], dropna=False):
            seeds = cell["seed"].nunique()
            for rate, tried in cell.groupby("optim.learning_rate"):
                values = tried.sort_values("seed")["loss"].tolist()
                y = tried["loss"].mean() if len(values) == seeds else None
                name = cell_label(method, rank, alpha)
                rows.append((row, report.METHODS[method].label, name, rate, y, None, None, values))
    names = ["row", "column", "label", "x", "y", "low", "high", "dots"]
    return pd.DataFrame(rows, columns=pd.Index(names)).astype({"y": float, "low": float, "high": float})


def _ticks(rates: pd.Series) -> dict[float, str]:
    """Every other rate of a grid, so that their names stand apart."""
    return {rate: f"{rate:g}" for rate in sorted(rates.unique())[::2]}


if __name__ == "__main__":
    script(build, __doc__)
