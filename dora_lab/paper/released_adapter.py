"""A released adapter's evaluation beside the paper's own cell: what is equal, what is close, what differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab.paper.claims import claims as read_claims
from dora_lab.runs.streams import read_stream
from dora_lab.tasks import load_task
from dora_lab.tasks.commonsense.released_files import KNOWN

CLOSE = 0.5  # percentage points that rounding (another processor, library or batch) may move a task


def compare(run: Path, method: str, rank: int, model: str | None) -> pd.DataFrame:
    """One row per task and their average: accuracies in percent, ours and the paper's, and a verdict.

    method, rank: of the adapter ("LoRA" or "DoRA"), as the paper writes them.
    model: the paper's name of the base ("LLaMA-7B", ...); None: no number to compare with. Verdicts: "equal" (to the
    printed digit), "close" (within `CLOSE` points), "differs"; "within item noise" or "differs" (95 % binomial
    interval) where not all of the released items were asked; "no number in the paper". elsewhere: the same cell as
    printed in another place by its authors. flags: unparsed above 1 %, below chance.
    """
    rows = [row for row in read_stream(run, "eval") if row["protocol"] == "generate"]
    claims = read_claims("commonsense")
    printed: dict[str, float] = {}
    reprints: dict[str, list[float]] = {}
    for claim in claims.to_dict("records"):
        of_it = (claim["model"], claim["method"].rstrip("†"), claim["rank"]) == (model, method, rank)
        if not of_it or claim["metric"] != "accuracy_percent":
            continue
        # table 15 repeats table 1's cells, which come first
        if claim["kind"] == "number" and claim["source"] in ("Table 1", "Table 15"):
            printed.setdefault(claim["subject"], claim["value"])
        elif claim["kind"] == "reprint":
            reprints.setdefault(claim["subject"], []).append(claim["value"])
    found = [_row(row, printed, reprints) for row in rows]
    complete = set(printed) <= {"average"} | {row["task"] for row in found}
    whole = complete and all(row["n"] == row["n_released"] for row in found)
    average = sum(row["accuracy"] for row in found) / len(found)
    overall = printed.get("average") if complete else None
    found.append(
        {
            "task": "average",
            "n": sum(row["n"] for row in found),
            "n_released": None,
            "accuracy": average,
            "paper": overall,
            "elsewhere": reprints.get("average"),
            "verdict": _verdict(average, overall) if whole else None,
            "unparsed": 100 * sum(row["n_unparsed"] for row in rows) / sum(row["n"] for row in rows),
            "flags": "",
        }
    )
    return pd.DataFrame(found)


def _row(row: Mapping[str, Any], printed: Mapping[str, float], reprints: Mapping[str, list[float]]) -> dict[str, Any]:
    task, known = load_task(row["task"]), KNOWN.get((row["task"], "test"))
    paper, accuracy = printed.get(task.column), 100 * row["value"]
    whole = known is not None and row["n"] == known.items
    flags = ["unparsed above 1 %"] if row["n_unparsed"] > 0.01 * row["n"] else []
    flags += ["below chance"] if row["value"] < row["chance"] else []
    return {
        "task": task.column,
        "n": row["n"],
        "n_released": known.items if known else None,
        "accuracy": accuracy,
        "paper": paper,
        "elsewhere": reprints.get(task.column),
        "verdict": _verdict(accuracy, paper) if whole else _verdict_of_some(accuracy, paper, row["n"]),
        "unparsed": 100 * row["n_unparsed"] / row["n"],
        "flags": ", ".join(flags),
    }


def _verdict(accuracy: float, paper: float | None) -> str:
    if paper is None:
        return "no number in the paper"
    distance = abs(accuracy - paper)
    # the paper prints one digit, and 0.05 itself may have been rounded either way
    return "equal" if distance < 0.0501 else "close" if distance <= CLOSE else "differs"


def _verdict_of_some(accuracy: float, paper: float | None, n: int) -> str:
    if paper is None:
        return "no number in the paper"
    from scipy.stats import binomtest

    interval = binomtest(round(accuracy / 100 * n), n).proportion_ci(method="wilson")
    return "within item noise" if 100 * interval.low <= paper <= 100 * interval.high else "differs"


def table(rows: pd.DataFrame) -> str:
    """The rows as text; a dash where there is no value."""

    def number(value: Any) -> str:
        return "–" if value is None or pd.isna(value) else f"{value:.1f}"

    lines = [f"{'task':12} {'items':>6} {'ours %':>7} {'paper %':>8} {'elsewhere %':>12} {'unparsed %':>11}  verdict"]
    for row in rows.to_dict("records"):
        elsewhere = ", ".join(map(number, row["elsewhere"])) if isinstance(row["elsewhere"], list) else "–"
        verdict = "; ".join(str(part) for part in (row["verdict"], row["flags"]) if part)
        lines.append(
            f"{row['task']:12} {row['n']:6} {number(row['accuracy']):>7} {number(row['paper']):>8} {elsewhere:>12} "
            f"{number(row['unparsed']):>11}  {verdict}"
        )
    return "\n".join(lines)


def summary(rows: pd.DataFrame) -> str:
    """One sentence on what the comparison means."""
    verdicts = rows.loc[rows["task"] != "average", "verdict"]
    if (verdicts == "no number in the paper").any():
        return "The paper has no number for some of this; nothing is verified there."
    if (verdicts == "differs").any():
        names = ", ".join(rows.loc[rows["verdict"] == "differs", "task"])
        return f"Differs from the paper: {names}. Look at base, data (record.json, inputs) and flags before training."
    if (verdicts == "within item noise").any():
        return "Nothing speaks against the paper's numbers, but not all released items were asked."
    worst = (rows["accuracy"] - rows["paper"]).abs().max()
    return f"Model, data and evaluation give the paper's numbers to within {worst:.1f} points."
