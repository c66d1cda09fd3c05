"""No inference overhead: merged adapters beside the base and beside themselves unmerged (results/bench/merge.jsonl)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import script
from dora_lab.paper.verdict import of_values
from dora_lab.report import Block, Provenance, cell_name, interval, number, save_table

MARGIN = 1.0  # percent of the base's time
BLOCKS = 10  # of rounds; each one's median is one draw
FORMS = {"adapted": "beside the base", "merged": "merged"}
ISNT = "a measurement of a large model. A million parameters on one core, where Python's own time is the most of it."
LATENCY = (
    "Time of a forward over the base's, in percent more: rounds in turns, medians of ten blocks of them, their mean "
    "with its 95 % interval (t over blocks). equivalent: the 90 % interval lies within 1 %; slower, faster: the 95 % "
    "interval excludes 0.",
)
ANSWERS = (
    "Against the float64 model with its adapter beside it: the largest difference of a logit, in units of the logits' "
    "standard deviation, and the items answered otherwise. int8: torch's dynamic quantisation of the merged linears, "
    "which is no matter of the adapter.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/merge.{md,csv,tex}; returns their paths, none if nothing was measured."""
    file = results / "bench" / "merge.jsonl"
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    latencies = [latency(row) for row in rows if row["what"] == "latency"]
    answers = [row for row in rows if row["what"] == "answers"]
    blocks = [
        Block(title="Time of a forward", cells=pd.DataFrame(map(_latency, latencies)), notes=LATENCY, isnt=ISNT),
        Block(title="Logits and answers", cells=pd.DataFrame(map(_answers, answers)), notes=ANSWERS, isnt=ISNT),
    ]
    data = pd.DataFrame([*latencies, *answers]).drop(columns=["torch", "code"])
    commits = tuple(sorted({row["code"]["commit"] or "" for row in rows} - {""}))
    runs = tuple(sorted({row["run"] for row in rows}))
    source = Provenance(("merge",), (), runs, commits, any(row["code"]["diff"] for row in rows), {})
    return save_table(results / "tables", "merge", "Inference with a merged adapter", blocks, data, source)


def latency(row: dict[str, Any]) -> dict[str, Any]:
    """Percent more than the base, its interval and verdict, of a row of ratios: of the mean of their logarithms."""
    logs = [100 * float(np.log(np.median(block))) for block in np.array_split(row["ratios"], BLOCKS)]
    found = of_values(logs)
    (low, high), (inner_low, inner_high) = found.interval() or (np.nan, np.nan), found.interval(0.9) or (np.nan, np.nan)
    verdict = "slower" if low > 0 else "faster" if high < 0 else "undecided"
    if inner_low > -MARGIN and inner_high < MARGIN:
        verdict = "equivalent"
    kept = {name: value for name, value in row.items() if name != "ratios"}
    percent, low, high = (100 * float(np.expm1(log / 100)) for log in (found.value, low, high))
    return kept | {"percent": percent, "low": low, "high": high} | {"rounds": len(row["ratios"]), "verdict": verdict}


def _latency(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Adapter": f"{cell_name(row['method'], row['rank'])}, {FORMS[row['form']]}",
        "Prompts × tokens": f"{row['prompts']} × {row['tokens']}",
        "Over the base, %": number(row["percent"], digits=1),
        "95 % interval": interval(row["low"], row["high"]),
        "Verdict": row["verdict"],
    }


def _answers(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "Adapter": f"{cell_name(row['method'], row['rank'])}, {FORMS[row['form']]}",
        "Weights": row["type"],
        "Largest logit difference, sd": f"{row['largest'] / row['spread']:.1e}",
        "Answered otherwise": f"{row['flips']} of {row['items']}",
    }


if __name__ == "__main__":
    script(build, __doc__)
