"""Learning curves over training items (the question of figures 4 and 9): FT, LoRA and DoRA, clean and noisy labels."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, script
from dora_lab import report
from dora_lab.report import statistics
from experiments import samples

NOTE = "mean over seeds, 95 % interval (t over seeds), each cell at its own rate; all in 64 steps"
SEEDS = 8


def build(results: Path) -> list[Path]:
    """Write results/figures/samples.{pdf,png,data.csv}; returns the paths, none before a smaller size has run."""
    evals = frame(results)
    mine = evals[evals["experiment"].isin(("commonsense", "samples")) & (evals["split"] == "test")]
    mine = mine[(mine["data"] == "mini2") & mine["choice_nll"].notna() & (mine["seed"] < SEEDS)]
    cells = list(zip(mine["method"], mine["rank"].astype(object).where(mine["rank"].notna(), None), strict=True))
    mine = mine[pd.Series([cell in samples.METHODS for cell in cells], mine.index, dtype=bool)]
    if not (mine["experiment"] == "samples").any():
        return []
    rows = curves(mine)
    sizes = {name: sorted(part["x"].unique()) for name, part in rows.groupby("column")}
    ticks = {name: {size: f"{size:,.0f}" for size in of[:: 1 + (len(of) > 3)]} for name, of in sizes.items()}
    figure, numbers = report.lines(rows, "training items", NOTE, ticks=ticks, doublings=True, dodge=0.1)
    source = report.provenance(mine, evals.attrs["statuses"])
    return report.save_figure(figure, results / "figures", "samples", source, numbers)


def curves(mine: pd.DataFrame) -> pd.DataFrame:
    """The rows of `report.lines`: a row of panels for each measure, a column for each share of noise."""
    rows = []
    for row, name, scale in (("choice NLL, nats", "choice_nll", 1), ("accuracy, %", "value", 100)):
        for noise, of_noise in mine.groupby("data.label_noise"):
            column = f"{noise:.0%} of labels drawn anew" if noise else "clean labels"
            for (method, size), cell in of_noise.groupby(["method", "data.train_items"]):
                values = (scale * cell.groupby("seed")[name].mean()).tolist()
                label = report.METHODS[method].label
                rows.append((row, column, label, int(size), *statistics.mean_interval(values)))
    names = ["row", "column", "label", "x", "y", "low", "high"]
    order = [report.METHODS[method].label for method, _ in samples.METHODS]
    found = pd.DataFrame(rows, columns=pd.Index(names)).astype(dict.fromkeys(names[4:], float))
    return found.sort_values("label", key=lambda column: column.map(order.index), kind="stable")


if __name__ == "__main__":
    script(build, __doc__)
