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
GRID = ("experiment", "tier", "data", "method", "rank", "method.alpha", "data.train_items")
NOTE = (
    "Columns of rates: logarithm of the {} NLL (mean over tasks) on validation items, mean over seeds. "
    "The rate is the vertex of the parabola through the lowest log NLL and its neighbours over log2 of the rate, two "
    "digits; at an end of the grid, or beside a rate at which a run failed, the lowest itself."
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
        note = NOTE.format(part["nll"].iloc[0])
        optimizers = set(evals.loc[evals["spec_id"].isin(part["spec_id"]), "optim.optimizer"]) - {"adamw"}
        title = ", ".join([f"{experiment}, tier {tier}, data {name}", *(other.upper() for other in optimizers)])
        blocks.append(Block(title=title, cells=_shown(cells), notes=(note,)))
    source = report.provenance(evals, statuses)
    table = pd.DataFrame(data)
    return report.save_table(results / "tables", "rates", "Learning rates", blocks, table, source, ISNT)


def swept(evals: pd.DataFrame) -> pd.DataFrame:
    """The runs of sweeps: columns of `GRID` (alpha only where a rank has several), optim.learning_rate, seed, spec_id,
    loss (NLL, mean over tasks) and nll, whose it is: "choice" or "answer"."""
    # what is chosen among options has both; what is written, the answer's alone
    loss = evals["choice_nll"].where(evals["choice_nll"].notna(), evals["answer_nll"])
    known = evals.assign(loss=loss)[(evals["split"] == "validation") & loss.notna()] if len(evals) else evals
    known = known[known["experiment"] != "own"]  # of many models and folders: table `own`
    if not len(known):
        return known
    known["nll"] = known["choice_nll"].notna().map({True: "choice", False: "answer"})
    alphas = known.groupby([*GRID[:5]], dropna=False)["method.alpha"].transform("nunique")
    known["method.alpha"] = known["method.alpha"].where(alphas > 1)
    by = [*GRID, "nll", "optim.learning_rate", "seed", "spec_id"]
    runs = known.groupby(by, dropna=False)["loss"].mean().reset_index()
    return runs[runs.groupby([*GRID, "seed"], dropna=False)["loss"].transform("size") > 1]  # a sweep, no pilot


def _cell(key: tuple[Any, ...], rows: pd.DataFrame) -> dict[str, Any]:
    tried = {float(rate): part["loss"].tolist() for rate, part in rows.groupby("optim.learning_rate")}
    seeds = rows["seed"].nunique()
    choice = choose(tried, seeds)
    method, rank, alpha, items = (None if pd.isna(value) else value for value in key)
    return {
        "method": method, "rank": rank and int(rank), "items": items and int(items), "seeds": seeds,
        **({} if alpha is None else {"alpha": alpha}),
        "rate": choice and choice.rate, "lowest": choice and choice.lowest, "at_end": choice and choice.at_end,
        **{f"{rate:g}": np.mean(found) if len(found) == seeds else None for rate, found in sorted(tried.items())},
    }  # fmt: skip


def cell_label(method: str, rank: int | None, alpha: float | None) -> str:
    """A cell as it is called where ranks of several scales are among others."""
    return cell_name(method, rank) + ("" if alpha is None or pd.isna(alpha) else f", α {alpha:g}")


def _shown(cells: list[dict[str, Any]]) -> pd.DataFrame:
    rates = sorted({name for row in cells for name in row if name[0].isdigit()}, key=float)
    sizes = len({row["items"] for row in cells}) > 1
    return pd.DataFrame(
        [
            {
                "Cell": cell_label(row["method"], row["rank"], row.get("alpha"))
                + (f", {row['items']:,} items" if sizes else ""),
                "Seeds": str(row["seeds"]),
                "Rate": "–" if row["rate"] is None else f"{row['rate']:g}" + (" (end of the grid)" * row["at_end"]),
                **{rate: number(row.get(rate), digits=3) for rate in rates},
            }
            for row in cells
        ]
    )


if __name__ == "__main__":
    script(build, __doc__)
