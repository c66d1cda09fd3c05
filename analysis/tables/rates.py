"""Learning rates: what each cell's sweep found on validation items, and the rate that it chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import frame, script
from dora_lab import report
from dora_lab.report import Block, cell_name, number
from dora_lab.report.rates import choose

ISNT = "a comparison of methods. Losses on validation items, to choose each cell's rate by."
GRID = ("experiment", "tier", "data", "method", "rank", "data.train_items")
NOTES = (
    "Columns of rates: logarithm of the choice NLL (mean over tasks) on validation items, mean over seeds. "
    "The rate is the vertex of the parabola through the lowest log NLL and its neighbours over log2 of the rate, two "
    "digits; at an end of the grid, or beside a rate at which a run failed, the lowest itself.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/rates.{md,csv,tex}; returns their paths, none where nothing was swept."""
    evals = frame(results)
    losses, statuses = swept(evals), evals.attrs["statuses"]
    if not len(losses):
        return []
    evals = evals[evals["spec_id"].isin(losses["spec_id"])]
    losses["loss"] = np.log(losses["loss"])
    blocks, data = [], []
    for (experiment, tier, name), part in losses.groupby(["experiment", "tier", "data"]):
        cells = [_cell(key, of_cell) for key, of_cell in part.groupby([*GRID[3:]], dropna=False, sort=False)]
        data += [{"experiment": experiment, "tier": tier, "data": name} | row for row in cells]
        blocks.append(Block(title=f"{experiment}, tier {tier}, data {name}", cells=_shown(cells), notes=NOTES))
    source = report.provenance(evals, statuses)
    table = pd.DataFrame(data)
    return report.save_table(results / "tables", "rates", "Learning rates", blocks, table, source, ISNT)


def swept(evals: pd.DataFrame) -> pd.DataFrame:
    """The runs of sweeps: columns of `GRID`, optim.learning_rate, seed, spec_id, loss (choice NLL, mean over tasks)."""
    known = evals[(evals["split"] == "validation") & evals["choice_nll"].notna()] if len(evals) else evals
    known = known[known["experiment"] != "own"]  # of many models and folders: table `own`
    if not len(known):
        return known
    by = [*GRID, "optim.learning_rate", "seed", "spec_id"]
    runs = known.groupby(by, dropna=False)["choice_nll"].mean().reset_index(name="loss")
    return runs[runs.groupby([*GRID, "seed"], dropna=False)["loss"].transform("size") > 1]  # a sweep, no pilot


def _cell(key: tuple[Any, ...], rows: pd.DataFrame) -> dict[str, Any]:
    tried = {float(rate): part["loss"].tolist() for rate, part in rows.groupby("optim.learning_rate")}
    seeds = rows["seed"].nunique()
    choice = choose(tried, seeds)
    return {
        "method": key[0], "rank": None if pd.isna(key[1]) else int(key[1]), "items": int(key[2]), "seeds": seeds,
        "rate": choice and choice.rate, "lowest": choice and choice.lowest, "at_end": choice and choice.at_end,
        **{f"{rate:g}": np.mean(found) if len(found) == seeds else None for rate, found in sorted(tried.items())},
    }  # fmt: skip


def _shown(cells: list[dict[str, Any]]) -> pd.DataFrame:
    rates = sorted({name for row in cells for name in row if name[0].isdigit()}, key=float)
    sizes = len({row["items"] for row in cells}) > 1
    return pd.DataFrame(
        [
            {
                "Cell": cell_name(row["method"], row["rank"]) + (f", {row['items']:,} items" if sizes else ""),
                "Seeds": str(row["seeds"]),
                "Rate": "–" if row["rate"] is None else f"{row['rate']:g}" + (" (end of the grid)" * row["at_end"]),
                **{rate: number(row.get(rate), digits=3) for rate in rates},
            }
            for row in cells
        ]
    )


if __name__ == "__main__":
    script(build, __doc__)
