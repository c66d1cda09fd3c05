"""A released adapter's evaluation beside the paper's own cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab.paper.claims import claims as read_claims
from dora_lab.paper.verdict import EQUIVALENT, MARGINS, NOT, UNDECIDED, decide, from_printed
from dora_lab.runs.streams import read_stream
from dora_lab.tasks import load_task
from dora_lab.tasks.commonsense.released_files import KNOWN

UNKNOWN = "no number in the paper"
SERVER = "its server scores it"
# by experiment: the paper's metric, and the tables that print it
PRINTED = {
    "commonsense": ("accuracy_percent", ("Table 1", "Table 15")),
    "visual_instruction": ("score", ("Table 12", "Tables 4 and 12")),
}


def models(experiment: str = "commonsense") -> list[str]:
    """The paper's names of the bases that an experiment's numbers are of."""
    claims, (metric, _) = read_claims(experiment), PRINTED[experiment]
    return sorted({*claims.loc[claims["rank"].notna() & (claims["metric"] == metric), "model"]} - {""})


def compare(
    run: Path, method: str, rank: int | None, model: str | None, experiment: str = "commonsense"
) -> pd.DataFrame:
    """One row per task and their average: accuracies in percent, ours and the paper's, and a verdict.

    method, rank: of the adapter ("LoRA" or "DoRA"), as the paper writes them; rank None: several, which it has not.
    model: the paper's name of the base ("LLaMA-7B", ...); None: no number to compare with. experiment: whose numbers
    ("visual_instruction": accuracy is each benchmark's own score). Verdicts: `verdict`'s, that
    the two are equivalent; where not all of the released items were asked, with the noise of so many; else
    "no number in the paper". elsewhere: the same cell as printed in another place by its authors. flags: unparsed above
    1 %, below chance.
    """
    rows = [row for row in read_stream(run, "eval") if row["protocol"] == "generate"]
    claims, (metric, tables) = read_claims(experiment), PRINTED[experiment]
    printed: dict[str, float] = {}
    reprints: dict[str, list[float]] = {}
    for claim in claims.to_dict("records"):
        of_it = (claim["model"], claim["method"].rstrip("†"), claim["rank"]) == (model, method, rank)
        if not of_it or claim["metric"] != metric:
            continue
        # table 15 repeats table 1's cells, which come first
        if claim["kind"] == "number" and claim["source"] in tables:
            printed.setdefault(claim["subject"], claim["value"])
        elif claim["kind"] == "reprint":
            reprints.setdefault(claim["subject"], []).append(claim["value"])
    found = [_row(row, printed, reprints) for row in rows]
    complete = set(printed) <= {"average"} | {row["task"] for row in found if row["accuracy"] is not None}
    whole = complete and all(row["n"] == row["n_released"] for row in found)
    scored = [row for row in found if row["accuracy"] is not None]
    if not scored:
        return pd.DataFrame(found)
    average = sum(row["accuracy"] for row in scored) / len(scored)
    overall = printed.get("average") if complete else None
    found.append(
        {
            "task": "average",
            "n": sum(row["n"] for row in found),
            "n_released": None,
            "accuracy": average,
            "paper": overall,
            "elsewhere": reprints.get("average"),
            "verdict": _verdict(average, overall, None) if whole else None,
            "unparsed": 100 * sum(row["n_unparsed"] or 0 for row in rows) / sum(row["n"] for row in rows),
            "flags": "",
        }
    )
    return pd.DataFrame(found)


def _row(row: Mapping[str, Any], printed: Mapping[str, float], reprints: Mapping[str, list[float]]) -> dict[str, Any]:
    task, known = load_task(row["task"]), KNOWN.get((row["task"], "test"))
    items = known.items if known else task.released_items
    told = {"task": task.column, "n": row["n"], "n_released": items, "accuracy": None}
    told |= {"paper": printed.get(task.column), "elsewhere": reprints.get(task.column)}
    if row["value"] is None:
        return told | {"verdict": SERVER, "unparsed": None, "flags": ""}
    paper, accuracy = told["paper"], 100 * row["value"]
    whole = items is not None and row["n"] == items
    flags = ["unparsed above 1 %"] if row["n_unparsed"] > 0.01 * row["n"] else []
    flags += ["below chance"] if row["chance"] is not None and row["value"] < row["chance"] else []
    return told | {
        "accuracy": accuracy,
        "verdict": _verdict(accuracy, paper, None if whole else row["n"]),
        "unparsed": 100 * row["n_unparsed"] / row["n"],
        "flags": ", ".join(flags),
    }


def _verdict(accuracy: float, paper: float | None, items: int | None) -> str:
    """items: how many were asked, None for all of them: then nothing is left to chance."""
    if paper is None:
        return UNKNOWN
    noise = 0.0 if items is None else 100 * math.sqrt(accuracy / 100 * (1 - accuracy / 100) / items)
    found = from_printed([accuracy], paper, noise)
    return decide(found, EQUIVALENT, MARGINS["accuracy"], found.p())


def summary(rows: pd.DataFrame) -> str:
    """One sentence on what the comparison means."""
    verdicts = rows.loc[rows["task"] != "average", "verdict"]
    if (verdicts == UNKNOWN).any():
        return "The paper has no number for some of this; nothing is verified there."
    if (verdicts == NOT).any():
        names = ", ".join(rows.loc[rows["verdict"] == NOT, "task"])
        return f"Differs from the paper: {names}. Look at base, data (record.json, inputs) and flags before training."
    if (verdicts == UNDECIDED).any():
        return "Nothing speaks against the paper's numbers, but not all released items were asked."
    worst = (rows["accuracy"] - rows["paper"]).abs().max()
    return f"Model, data and evaluation give the paper's numbers to within {worst:.1f} points."
