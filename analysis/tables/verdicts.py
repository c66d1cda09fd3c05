"""Each directional claim of the paper against our runs: n, effect, interval, test, verdict."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, isnt, script
from dora_lab import paper, report
from dora_lab.house import REGISTERED as REGISTERED_FILES
from dora_lab.report import Block, interval, number, p_text

RULE = (
    "holds, does not hold: p < .05 on the claimed, or on the other, side; inside the margin: so small that it may not "
    "matter; equivalent: the 90 % interval lies within the margin; undecided: anything else; k of n: fewer seeds than "
    "were registered. Intervals are the unadjusted 95 % ones; seeds: how many agree with the claim, no condition of it."
)
NOTES = (
    RULE,
    "Exploratory: not registered before the runs; p adjusted by Benjamini and Hochberg over the block. Effects are "
    "percentage points of the average over tasks (first method minus second; for loss of accuracy, the difference of "
    "the losses; margin ±1 point), or Pearson's r over layers and checkpoints, whose mean and interval are over seeds "
    "of Fisher's z: other layers may differ, see tables/correlations.md.",
)
REGISTERED = (
    RULE,
    "Registered before the runs (experiments/registered). Primary claims are adjusted by Holm, all others by Benjamini "
    "and Hochberg. More is better in every effect: points of accuracy, or percent by which the NLL is lower, as 100 "
    "times the logarithm of the ratio (14 is 13 % lower, -44 is 55 % higher); items of one fact count as one cluster.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/verdicts.{md,csv,tex}; returns their paths."""
    evals, probes = (frame(results, "commonsense", stream) for stream in ("eval", "probe"))
    evals, everything = evals[evals["split"] == "test"], frame(results)
    rows = paper.verdicts(evals, probes, paper.claims("commonsense"))
    blocks, judged = _registered(everything)
    keys = ["tier", "model", "data"]
    for key, part in sorted(
        rows.groupby(keys, dropna=False), key=lambda pair: (set(pair[0]) != {"mini"}, str(pair[0]))
    ):
        title = "no runs" if pd.isna(key[0]) else f"tier {key[0]}, model {key[1]}, data {key[2]}"
        blocks.append(
            Block(
                title=title,
                isnt=isnt([key[0]]),
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
        pd.concat([judged, rows]) if len(judged) else rows,
        report.provenance(evals, frame(results, "commonsense").attrs["statuses"]),
    )


def _registered(everything: pd.DataFrame) -> tuple[list[Block], pd.DataFrame]:
    """A block for each registered experiment, and the rows of all of them."""
    blocks, found = [], []
    for file in sorted(REGISTERED_FILES.glob("*.md")):
        if (plan := paper.registered(file.stem)) is None:
            continue
        rows = paper.judge(plan, everything)
        title = f"registered: {plan.experiment}, tier {plan.tier}, data {plan.data}"
        cells = pd.DataFrame([_judged(row) for row in rows.to_dict("records")])
        text = ("Claim", "Verdict", "Family", "Metric")
        blocks.append(Block(title=title, cells=cells, text=text, notes=REGISTERED, isnt=isnt([plan.tier])))
        found.append(rows.assign(experiment=plan.experiment, tier=plan.tier, data=plan.data))
    return blocks, pd.concat(found) if found else pd.DataFrame()


def _judged(row: dict[str, object]) -> dict[str, object]:
    return {
        "Claim": row["statement"], "Verdict": row["verdict"], "Family": row["family"], "Metric": row["metric"],
        **_numbers(row, 1), "Seeds": row["seeds"],
    }  # fmt: skip


def _numbers(row: dict[str, object], digits: int) -> dict[str, object]:
    effect = number(row["effect"], digits=digits)
    return {
        "Effect": None if effect is None else f"{effect} {row['unit']}",
        "95 % interval": interval(row["low"], row["high"], digits),
        "p, adjusted": p_text(row["p_adjusted"]),
    }


def _apart(evals: pd.DataFrame, everything: pd.DataFrame, key: tuple[object, ...]) -> str | None:
    """What sets the methods of a block apart besides what a claim is about; `key`: its tier, model and data."""
    if not len(evals):
        return None
    data = evals["data"].where(evals["data"] == evals["eval_data"], evals["data"] + " → " + evals["eval_data"])
    mine = (evals["tier"] == key[0]) & (evals["model"] == key[1]) & (data == key[2])
    return report.sets_apart(evals[mine], everything)


def _cells(row: dict[str, object]) -> dict[str, object]:
    digits = 2 if row["unit"] == "r" else 1
    return {
        "Claim": row["statement"],
        "Verdict": row["verdict"],
        "Protocol": row["protocol"],
        "n": row["n"],
        **_numbers(row, digits),
        "Seeds": row["seeds"],
        "Paper": number(row["paper"], digits=digits),
        "Test": row["test"],
        "Source": row["source"],
    }


if __name__ == "__main__":
    script(build, __doc__)
