"""What training on the tasks costs elsewhere: held-out text of the base's pretraining, scored before and after.

Beside it what was learnt, so that methods can be compared where they have learnt as much.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import frame, isnt, script
from dora_lab import report
from dora_lab.paper.verdict import benjamini_hochberg
from dora_lab.report import Block, cell_name, interval, number, p_text, statistics

CELL = ("method", "rank", "optim.learning_rate", "setting")
PLAIN = ("commonsense", "ranks", "stability")  # which differ in method, rank and rate alone
SETTING = ("experiment", "data.train_items", "data.label_noise")
PAIRS = (  # (first, second): method, rank
    *((("dora", rank), ("lora", rank)) for rank in (2, 4, 8, 16, 32)),
    (("lora", 8), ("ft", None)),
    (("dora", 8), ("ft", None)),
)
NOTES = (
    "Task: choice NLL of test items, nats, mean over tasks. Text: nats per token of held-out pretraining text; "
    "forgetting is what training added to it. Mean ± standard deviation over seeds.",
)
COMPARED = (
    "Difference of forgetting, first minus second, of runs with the same seed; at equal task NLL: less the slope of "
    "forgetting on log task NLL within both cells, times the pair's difference in it, the slope taken as known. Mean "
    "and 95 % interval, Student's t over seeds; p adjusted by Benjamini and Hochberg over these. Exploratory.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/forgetting.{md,csv,tex}; returns their paths, none where no text was scored."""
    runs = measured(results)
    if not len(runs):
        return []
    blocks, data = [], []
    for (tier, name), part in runs.groupby(["tier", "data"]):
        cells, pairs = of_cells(part), compared(part)
        data += [row | {"tier": tier, "data": name} for row in (*cells, *pairs)]
        title = f"tier {tier}, data {name}"
        blocks.append(Block(title=title, cells=pd.DataFrame(map(_shown, cells)), notes=NOTES, isnt=isnt([tier])))
        if pairs:
            table = pd.DataFrame(map(_shown_pair, pairs))
            blocks.append(
                Block(title=f"{title}: forgetting, methods compared", cells=table, notes=COMPARED, isnt=isnt([tier]))
            )
    source = report.provenance(runs, frame(results).attrs["statuses"])
    title = "Held-out pretraining text after training on the tasks"
    return report.save_table(results / "tables", "forgetting", title, blocks, pd.DataFrame(data), source)


def measured(results: Path) -> pd.DataFrame:
    """A row per run: its columns, task (choice NLL), text_nll.before and .after, and their difference, forgetting."""
    evals, records = frame(results), frame(results, stream="record")
    if "text_nll.after" not in records:
        return records.iloc[:0]
    tested = evals[(evals["split"] == "test") & evals["choice_nll"].notna()]
    task = tested.groupby("spec_id")["choice_nll"].mean().rename("task")
    found = records[records["text_nll.after"].notna()].merge(task, left_on="spec_id", right_index=True)
    found["setting"] = [_setting(*row) for row in found[[*SETTING]].itertuples(index=False)]
    return found.assign(forgetting=found["text_nll.after"] - found["text_nll.before"])


def _setting(experiment: str, items: int, noise: float) -> str:
    """What a run has apart from method, rank and rate: nothing, other items, or what its experiment is called by."""
    if experiment == "samples":
        return f"{int(items):,} items" + (f", {noise:.0%} of labels drawn anew" if noise else "")
    return "" if experiment in PLAIN else experiment


def of_cells(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per method, rank, rate and setting: number of seeds, means and deviations of task, text and forgetting."""
    order = list(report.METHODS).index
    rows = []
    for (method, rank, rate, setting), cell in runs.groupby([*CELL], dropna=False, sort=True):
        means = {}
        for name, column in (("task", "task"), ("text", "text_nll.after"), ("forgetting", "forgetting")):
            means[name], means[f"{name}_sd"] = statistics.mean_sd(cell[column].tolist())
        about = {"method": method, "rank": None if pd.isna(rank) else int(rank), "rate": rate}
        about |= {"setting": setting, "seeds": len(cell)}
        rows.append(about | means)
    return sorted(rows, key=lambda row: (order(row["method"]), -(row["rank"] or 0), row["setting"] != "", row["rate"]))


def compared(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per pair of `PAIRS` that share two seeds: the difference of forgetting, as it is and at equal task NLL."""
    rows: list[dict[str, Any]] = []
    for pair in PAIRS:
        first, second = (_cell(runs, *cell) for cell in pair)
        seeds = sorted({*first.index} & {*second.index})
        if len(seeds) < 2:
            continue
        first, second = first.loc[seeds], second.loc[seeds]
        difference = (first["forgetting"] - second["forgetting"]).to_numpy(float)
        learnt = (np.log(first["task"]) - np.log(second["task"])).to_numpy(float)
        for at, values in (("as it is", difference), ("equal task NLL", difference - _slope([first, second]) * learnt)):
            found = statistics.over_seeds(values.tolist())
            if found is not None:
                about = {"first": cell_name(*pair[0]), "second": cell_name(*pair[1]), "at": at, "seeds": len(seeds)}
                rows.append(about | {"difference": found.value, "low": found.low, "high": found.high, "p": found.p})
    adjusted = benjamini_hochberg([row["p"] for row in rows])
    return [row | {"p_adjusted": p} for row, p in zip(rows, adjusted, strict=True)]


def _cell(runs: pd.DataFrame, method: str, rank: int | None) -> pd.DataFrame:
    """The runs of one cell at its own rate, by seed: those of the campaigns, no multiples of it."""
    named = runs["experiment"].isin(("commonsense", "ranks")) & (runs["method"] == method)
    return runs[named & (runs["rank"].isna() if rank is None else runs["rank"] == rank)].set_index("seed")


def _slope(cells: list[pd.DataFrame]) -> float:
    """Least squares of forgetting on log task NLL, each cell about its own means."""
    x, y = (
        np.concatenate([(column - column.mean()).to_numpy(float) for column in columns])
        for columns in ([np.log(cell["task"]) for cell in cells], [cell["forgetting"] for cell in cells])
    )
    return float((x * y).sum() / (x * x).sum()) if (x * x).sum() else 0.0


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Cell": ", ".join(filter(None, (cell_name(row["method"], row["rank"]), row["setting"]))),
        "Rate": None if pd.isna(row["rate"]) else f"{row['rate']:g}",
        "Seeds": str(row["seeds"]),
        "Task NLL": number(row["task"], row["task_sd"], digits=3),
        "Text NLL": number(row["text"], row["text_sd"], digits=2),
        "Forgetting": number(row["forgetting"], row["forgetting_sd"], digits=2),
    }


def _shown_pair(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Pair": f"{row['first']} − {row['second']}, {row['at']}",
        "Difference": number(row["difference"], digits=2),
        "95 % interval": interval(row["low"], row["high"], digits=2),
        "p, adjusted": p_text(row["p_adjusted"]),
        "Seeds": str(row["seeds"]),
    }


if __name__ == "__main__":
    script(build, __doc__)
