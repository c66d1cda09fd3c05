"""Every number that the paper prints: beside re-runs by others and our own, with verdicts and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import declared, frame, script
from dora_lab import paper, report
from dora_lab.report import Block, interval, number

ISNT = "a set of equal measurements. Single runs of the paper, baselines that it quotes, re-runs that others report."
NOTES = (
    "The paper's number is one more draw beside three or more runs that differ in the seed alone (standard error "
    "s sqrt(1 + 1/n); the interval is that of one more draw). equivalent: the 90 % interval of the difference lies "
    "within 1 point; does not hold: it differs (p < .05, two-sided, unadjusted); else undecided; not run: none of tier "
    "paper, on that model and by the published protocol.",
    "below chance: more than two binomial standard errors below guessing; an answer that cannot be parsed counts as "
    "wrong, so such a score is no knowledge. Ours are flagged too where more than 1 % of the answers are unparsed; the "
    "paper and others do not say how many are.",
)
OTHERS = ("Re-runs by others", "Released adapter", "Printed elsewhere")
TEXT = ("Table", "Model", "Method", "Task", *OTHERS, "Verdict", "Flags")
OPTIONAL = ("Rank", *OTHERS, "95 % interval", "Flags")  # columns that are left out where nothing is in them
UNITS = {
    "cider": "CIDEr",
    "gpt4_score_difference": "difference",
    "gpu_memory_gb": "GB",
    "memory_reduction_percent": "memory, less by %",
}


def build(results: Path) -> list[Path]:
    """Write results/tables/paper.{md,csv,tex}; returns their paths."""
    rows = paper.claims()
    published = [spec for spec in declared() if spec.tier == "paper"]
    cells = paper.cells(results, rows, published)
    records = frame(results, stream="record")
    records = records[records["tier"] == "paper"]
    averages = cells[(cells["subject"] == "average") & (cells["metric"] == "accuracy_percent")]
    blocks = [
        _block("Commonsense averages", averages, ("Table", "Model", "Method", "Rank"), NOTES),
        _spread(averages),
        *(
            _block(f"{source}, {model}", part, ("Method", "Rank", "Task"))
            for (source, model), part in cells.groupby(["source", "model"], sort=False)
        ),
        _unplaced(rows),
    ]
    return report.save_table(
        results / "tables",
        "paper",
        "The paper's numbers against runs",
        blocks,
        cells,
        report.provenance(records, frame(results).attrs["statuses"]),
        ISNT,
    )


def _block(title: str, part: pd.DataFrame, names: tuple[str, ...], notes: tuple[str, ...] = ()) -> Block:
    cells = pd.DataFrame([_cells(row, names) for row in part.to_dict("records")])
    filled = [column for column in cells if column not in OPTIONAL or cells[column].notna().any()]
    return Block(title=title, cells=cells[filled], text=TEXT, notes=notes)


def _cells(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    first = {
        "Table": row["source"],
        "Model": row["model"],
        "Method": row["method"] + (f" ({row['setting']})" if row["setting"] else ""),
        "Rank": None if pd.isna(row["rank"]) else f"{row['rank']:.0f}",
        "Task": f"{row['subject']} ({UNITS[row['metric']]})" if row["metric"] in UNITS else row["subject"],
    }
    return {name: first[name] for name in names} | {
        "Paper": _printed(row["paper"]),
        "Re-runs by others": row["reruns"],
        "Released adapter": row["released"],
        "Printed elsewhere": row["elsewhere"],
        "Ours": f"{number(row['mean'], row['sd'])} (n = {row['n']})" if row["n"] else "not run",
        "95 % interval": interval(row["low"], row["high"]),
        "Verdict": row["verdict"],
        "Flags": row["flags"] or None,
    }


def _printed(value: float) -> str | None:
    """As many digits as the paper prints, at least one."""
    digits = next((d for d in (1, 2) if round(value, d) == value), 3)
    return number(value, digits=digits)


def _spread(averages: pd.DataFrame) -> Block:
    """How far runs of one setting lie apart: the paper's own and those of others."""
    several = averages[averages["n_reruns"] >= 2]
    several = several.assign(plain=several["method"].str.removesuffix("†"))
    several = several.drop_duplicates(["model", "plain", "rank", "reruns"])
    rows = []
    for row in several.to_dict("records"):
        values = [row["paper"], row["reruns_low"], row["reruns_high"]]
        rows.append(
            {name: _cells(row, ("Table", "Model", "Method", "Rank"))[name] for name in ("Model", "Method", "Rank")}
            | {"Paper": _printed(row["paper"]), "Released adapter": row["released"], "Re-runs": str(row["n_reruns"])}
            | {"Lowest": number(min(values)), "Highest": number(max(values))}
            | {"Spread, points": number(max(values) - min(values))}
        )
    note = (
        "Published settings, trained again by others, against the paper's single run. The released adapter, evaluated "
        "again, gives the paper's number: evaluation reproduces, training spreads."
    )
    columns = ["Model", "Method", "Rank", "Paper", "Released adapter", "Re-runs", "Lowest", "Highest", "Spread, points"]
    return Block(title="One cell, several runs", cells=pd.DataFrame(rows, columns=columns), text=TEXT, notes=(note,))


def _unplaced(rows: pd.DataFrame) -> Block:
    """Re-runs by others that do not say which model they are of."""
    found = rows[(rows["kind"] == "rerun") & (rows["model"] == "")]
    cells = [
        {"Source": r["source"], "Method": r["method"], "Setting": r["setting"], "Task": r["subject"]}
        | {"Value": _printed(r["value"])}
        for r in found.to_dict("records")
    ]
    return Block(
        title="Re-runs that belong to no one cell",
        cells=pd.DataFrame(cells),
        text=("Source", "Method", "Setting", "Task"),
        notes=("They do not state the model.",),
    )


if __name__ == "__main__":
    script(build, __doc__)
