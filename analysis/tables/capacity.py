"""Learning capacity: bits of random labels that runs of `capacity` kept of their training items.

Shape legend: R = ranks, S = seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import frame, isnt, script
from dora_lab import report
from dora_lab.paper.verdict import decide, of_values
from dora_lab.report import Block, cell_name, interval, number, statistics
from dora_lab.report.rates import choose
from experiments import capacity

SEEDS = 5
MARGIN = 10.0  # percent of LoRA's bits
NOTES = (
    "Labels of all training items drawn anew from their options, so that only the weights can hold them. Bits stored: "
    "the sum over training items of log2(options) + log2 p(label); at most what `of` says. A lower bound of what a "
    "method can store: more steps store more. Mean ± standard deviation over seeds.",
)
PAIRED = (
    "DoRA's bits less LoRA's at equal rank, mean over ranks, in percent of LoRA's mean; 95 % interval (t over seeds). "
    "equivalent: the 90 % interval lies within 10 %. Registered: experiments/registered/capacity.md; k of 5: "
    "fewer seeds than that.",
)
SWEPT = (
    "Bits stored at each rate of the sweep (one seed). The rate is the vertex of the parabola through the highest and "
    "its neighbours over log2 of the rate, two digits; at an end of the grid the highest itself.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/capacity.{md,csv,tex}; returns their paths, none before there are runs."""
    evals = frame(results, "capacity")
    runs = measured(results, evals)
    if not len(runs):
        return []
    confirmed, swept = runs[runs["seed"] != capacity.SWEEP_SEED], runs[runs["seed"] == capacity.SWEEP_SEED]
    cells, pairs, rates = by_cell(confirmed), [found] if (found := pair(confirmed)) else [], chosen(swept)
    what = isnt(["mini"])
    blocks = [
        Block(title=title, cells=pd.DataFrame([shown(row) for row in rows]), notes=notes, isnt=what)
        for title, rows, shown, notes in (
            ("Bits stored", cells, _shown, NOTES),
            ("DoRA beside LoRA", pairs, _pair, PAIRED),
            ("Learning rates", rates, _rate, SWEPT),
        )
        if rows
    ]
    source = report.provenance(evals, evals.attrs["statuses"])
    data = pd.DataFrame([*cells, *pairs, *rates])
    return report.save_table(results / "tables", "capacity", "Random labels", blocks, data, source)


def measured(results: Path, evals: pd.DataFrame) -> pd.DataFrame:
    """The runs of `bits` with params.trainable; as `bits` has it where there are none."""
    runs = bits(evals)
    if not len(runs):
        return runs
    return runs.merge(frame(results, "capacity", "record")[["spec_id", "params.trainable"]], on="spec_id")


def bits(evals: pd.DataFrame) -> pd.DataFrame:
    """A row per run that was asked its own random labels: method, rank, seed, learning_rate, bits, of, correct."""
    mine = evals[(evals["split"] == "train") & evals["choice_nll"].notna()] if len(evals) else evals
    if not len(mine):
        return mine
    most = mine["n"] * np.log2(1 / mine["chance"])
    mine = mine.assign(
        learning_rate=mine["optim.learning_rate"],
        bits=most - mine["n"] * mine["choice_nll"] / np.log(2),
        of=most,
        correct=mine["value"] * mine["n"],
    )
    by = ["method", "rank", "seed", "learning_rate", "spec_id"]
    return mine.groupby(by, dropna=False)[["bits", "of", "correct", "n"]].sum().reset_index()


def by_cell(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per method and rank: seeds, bits, their share of what there was, bits per trainable parameter."""
    rows = []
    for (method, rank), part in runs.groupby(["method", "rank"], dropna=False, sort=False):
        mean, sd = statistics.mean_sd(part["bits"].tolist())
        trainable = int(part["params.trainable"].iloc[0])
        rows.append(
            {
                "method": method, "rank": None if pd.isna(rank) else int(rank), "seeds": len(part),
                "trainable": trainable, "bits": mean, "bits_sd": sd, "of": float(part["of"].mean()),
                "accuracy": 100 * float((part["correct"] / part["n"]).mean()),
                "bits_per_parameter": mean / trainable,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["rank"] is not None, row["rank"] or 0, row["method"] == "dora"))


def pair(runs: pd.DataFrame) -> dict[str, Any] | None:
    """Percent by which DoRA stores more than LoRA, over the ranks and seeds that both have; None without any."""
    adapted = runs[runs["method"].isin(("lora", "dora"))]
    wide = adapted.pivot(index="seed", columns=["rank", "method"], values="bits").dropna()
    both = [rank for rank in capacity.RANKS if {(rank, "lora"), (rank, "dora")} <= set(wide.columns)]
    if not both or not len(wide):
        return None
    lora_RS, dora_RS = (np.array([wide[rank, name] for rank in both], float) for name in ("lora", "dora"))
    more_S = 100 * (dora_RS - lora_RS).mean(axis=0) / lora_RS.mean()
    found = of_values(more_S.tolist())
    low, high = found.interval() or (np.nan, np.nan)
    enough = len(more_S) >= SEEDS and len(both) == len(capacity.RANKS)
    return {
        "what": "DoRA stores more than LoRA", "ranks": len(both), "seeds": len(more_S),
        "value": found.value, "low": low, "high": high,
        "verdict": decide(found, "superior", MARGIN, found.p()) if enough else f"{len(more_S)} of {SEEDS}",
    }  # fmt: skip


def chosen(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per cell of the sweep: the rate with the most bits, and the bits at each."""
    rows = []
    for (method, rank), part in runs.groupby(["method", "rank"], dropna=False, sort=False):
        tried = dict(sorted(zip(part["learning_rate"], part["bits"], strict=True)))
        found = choose({rate: [-value] for rate, value in tried.items()}, 1)
        about = {"method": method, "rank": None if pd.isna(rank) else int(rank)}
        rows.append(about | {"rate": found and found.rate, "at_end": found and found.at_end, "tried": tried})
    return rows


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Cell": cell_name(row["method"], row["rank"]),
        "Seeds": str(row["seeds"]),
        "Trainable": f"{row['trainable']:,}",
        "Bits stored": number(row["bits"], row["bits_sd"], digits=0),
        "of": number(row["of"], digits=0),
        "Accuracy, %": number(row["accuracy"], digits=1),
        "Bits per 1,000 parameters": number(1000 * row["bits_per_parameter"], digits=2),
    }


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Claim": row["what"],
        "Percent more": number(row["value"], digits=1),
        "95 % interval": interval(row["low"], row["high"], digits=1),
        "Ranks": str(row["ranks"]),
        "Seeds": str(row["seeds"]),
        "Verdict": row["verdict"],
    }


def _rate(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Cell": cell_name(row["method"], row["rank"]),
        "Rate": "–" if row["rate"] is None else f"{row['rate']:g}" + (" (end of the grid)" * row["at_end"]),
        "Bits at each rate": ", ".join(f"{rate:g}: {number(value, digits=0)}" for rate, value in row["tried"].items()),
    }


if __name__ == "__main__":
    script(build, __doc__)
