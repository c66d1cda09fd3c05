"""Each directional claim of the paper against our runs: n, effect, interval, test, verdict."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, script
from dora_lab import paper, report
from dora_lab.report import Block, number

NOTES = (
    "holds: the 95 % interval lies on the claimed side of zero and so does every seed; does not hold: both on the "
    "other side; undecided: anything else; no runs: the experiment has no runs that could decide it.",
    "Effects are percentage points of the average over tasks (first method minus second; for loss of accuracy, the "
    "difference of the losses), or Pearson's r. The correlations treat the layers and checkpoints of one seed as "
    "independent points, so their intervals are narrow; checkpoints of one layer are related.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/verdicts.{md,csv,tex}; returns their paths."""
    evals, probes = (frame(results, "commonsense", stream) for stream in ("eval", "probe"))
    evals, everything = evals[evals["split"] == "test"], frame(results)
    rows = paper.verdicts(evals, probes, paper.claims("commonsense"))
    blocks = []
    keys = ["tier", "model", "data"]
    for key, part in sorted(
        rows.groupby(keys, dropna=False), key=lambda pair: (set(pair[0]) != {"mini"}, str(pair[0]))
    ):
        title = "no runs" if pd.isna(key[0]) else f"tier {key[0]}, model {key[1]}, data {key[2]}"
        blocks.append(
            Block(
                title=title,
                cells=pd.DataFrame([_cells(row) for row in part.to_dict("records")]),
                text=("Claim", "Verdict", "Protocol", "n", "Test", "Source"),
                notes=(*NOTES, *filter(None, [_apart(evals, everything, key)])),
            )
        )
    return report.save_table(
        results / "tables",
        "verdicts",
        "Claims of the paper against our runs",
        blocks,
        rows,
        report.provenance(evals, frame(results, "commonsense").attrs["statuses"]),
    )


def _apart(evals: pd.DataFrame, everything: pd.DataFrame, key: tuple[object, ...]) -> str | None:
    """What sets the methods of a block apart besides what a claim is about; `key`: its tier, model and data."""
    if not len(evals):
        return None
    data = evals["data"].where(evals["data"] == evals["eval_data"], evals["data"] + " → " + evals["eval_data"])
    mine = (evals["tier"] == key[0]) & (evals["model"] == key[1]) & (data == key[2])
    return report.sets_apart(evals[mine], everything)


def _cells(row: dict[str, object]) -> dict[str, object]:
    digits = 2 if row["unit"] == "r" else 1
    effect, low, high, paper, p = (row[name] for name in ("effect", "low", "high", "paper", "p"))
    interval = None if number(low) is None else f"[{number(low, digits=digits)}, {number(high, digits=digits)}]"
    return {
        "Claim": row["statement"],
        "Verdict": row["verdict"],
        "Protocol": row["protocol"],
        "n": row["n"],
        "Effect": None if number(effect) is None else f"{number(effect, digits=digits)} {row['unit']}",
        "95 % interval": interval,
        "p": None if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.01 else f"{p:.2f}",
        "Seeds": row["seeds"],
        "Paper": number(paper, digits=digits),
        "Test": row["test"],
        "Source": row["source"],
    }


if __name__ == "__main__":
    script(build, __doc__)
