"""The sign of figure 2 on thirty real layers: the registered predictions of experiment `sign`, tier small, and r.

Thresholds and predicted ranges are those of experiments/registered/sign.md, read from it.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis import frame, isnt, script
from analysis.cells import READ, ZS, judged, less, measured, of_cells, shown, zs
from dora_lab import report
from dora_lab.house import REGISTERED
from dora_lab.paper.predicted import NOT_RUN, REFUTED, Prediction, judge
from dora_lab.paper.verdict import HOLDS, NOT
from dora_lab.report import Block, number
from experiments import sign
from experiments.sign import RATIOS, RESCALED, SEEDS, SmallCell

TITLE = "What decides the sign of ΔD and ΔM: experiment sign, tier small"
PARTS = {
    "1": "LoRA: r of q and of v is positive in every seed",
    "2": "FT: r of q, k, v, o is lower at δ/ΔD 5 than at 0; the predicted sign where its range excludes 0",
    "3": "The sign can be set by hand: at 2.5 r of q, v and up is positive with norms with |E|, negative against it",
    "4": "The size: r lies within the range that the norms alone give, in 24 of 35 cells",
}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = {"norms": "Norms", "ratio": "δ / ΔD", "law": "r by the norms"}
SHARE, WITHIN = 0.75, 24
FALL = 0.2  # of z: a LoRA's that falls as much as full fine-tuning's would refute part 2
RULE = (
    "r over layers and checkpoints from 0.7 of the training on, z Fisher's of it. Value: mean over seeds, or a share "
    "of cells, each by its mean over seeds; 95 %: t over seeds of z. Three seeds (two where norms are set) repeat "
    "one base: how far r hangs on its layers, say the intervals by resampling layers below."
)
NO_PAIR = "LoRA was run under one Σηλ alone: its fall with decay is not measured here."
_RANGE = re.compile(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]")


class Range(NamedTuple):
    """r as predicted: the median of draws by the norms alone, 5 % and 95 % of them, and with the measured |E|."""

    r: float
    low: float
    high: float
    measured: float


def build(results: Path) -> list[Path]:
    """Write results/tables/sign_small.{md,csv,tex}; returns their paths, none without runs."""
    probes = of_small(results)
    if not len(probes):
        return []
    ranges = predicted()
    blocks, outcomes = judged(list(outcomes_of(zs(probes), ranges)), PARTS, f"{RULE} {NO_PAIR}")
    rows = [row | row["cell"]._asdict() for row in measured(probes)]
    order = {name: place for place, name in enumerate(("found", *RESCALED))}
    rows.sort(key=lambda row: (order[row["norms"]], row["ratio"], KINDS.index(row["kind"])))
    rows = [row | _texts(row, ranges) for row in rows]
    for method, look in report.METHODS.items():
        if mine := [row for row in rows if row["method"] == method]:
            cells = shown(mine, NAMES, KINDS)
            blocks.append(Block(title=look.label, cells=cells, text=("Norms", "Matrix"), notes=(READ,)))
    plain = [{name: value for name, value in row.items() if name not in ("cell", "law")} for row in rows]
    data = pd.concat([outcomes.assign(what="prediction"), pd.DataFrame(plain).assign(what="cell")])
    source = report.provenance(probes, probes.attrs["statuses"])
    return report.save_table(results / "tables", "sign_small", TITLE, blocks, data, source, isnt(["small"]))


def of_small(results: Path) -> pd.DataFrame:
    """The probe rows of the tier's complete runs, with the column `cell`."""
    data = frame(results, "sign", "record").reindex(columns=["tier", "data.sha256"])
    hashes = data[data["tier"] == "small"]["data.sha256"].unique()
    if len(hashes) > 1:
        raise ValueError(f"experiment sign, tier small: runs on {len(hashes)} sets of data; move one of them away")
    return of_cells(results, "sign", sign.small_cells(hashes[0]) if len(hashes) else {})


def predicted() -> dict[tuple[str, float], Range]:
    """(kind, δ / ΔD) -> what the registered file says."""
    found = {}
    for line in (REGISTERED / "sign.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in KINDS and len(cells) == 1 + 2 * len(RATIOS):
            for ratio, by_norms, with_e in zip(RATIOS, cells[1:], cells[1 + len(RATIOS) :], strict=False):
                r, low, high = map(float, _RANGE.fullmatch(by_norms).groups())
                found[cells[0], ratio] = Range(r, low, high, float(with_e))
    return found


def outcomes_of(z: ZS, ranges: Mapping[tuple[str, float], Range]) -> Iterator[dict[str, Any]]:
    """A row for each registered prediction."""

    def at(kind: str, ratio: float, method: str = "ft", norms: str = "found") -> Mapping[int, float]:
        return z.get((SmallCell(method, ratio, norms), kind, "late"), {})

    for kind in ("q_proj", "v_proj"):
        of_lora = at(kind, RATIOS[-1], "lora")
        (row,) = judge([Prediction(part="1", statement=f"LoRA: r of {_name(kind)} is positive in every seed", unit="r",
                                   per_seed=of_lora, low=0)], len(SEEDS))  # fmt: skip
        if len(of_lora) == len(SEEDS):
            row["outcome"] = HOLDS if min(of_lora.values()) > 0 else NOT
        yield row
    lower = [
        Prediction(part="2", statement=f"FT: z of {_name(kind)} at 5 less at 0 is negative", high=0,
                   per_seed=less(at(kind, 5.0), at(kind, 0.0)), refutes=kind in ("q_proj", "v_proj"))
        for kind in KINDS[:4]
    ]  # fmt: skip
    yield from judge(lower, len(SEEDS))
    r = {place: math.tanh(float(np.mean([*of.values()]))) for place in ranges if (of := at(*place))}
    sure = [place for place in r if ranges[place].low * ranges[place].high > 0]
    right = sum(r[place] * ranges[place].low > 0 for place in sure)
    yield _counted(
        "2", "FT: the predicted sign, share of cells", right, len(sure), SHARE * len(sure), len(ranges) == len(r), True
    )
    yield _counted("2", f"LoRA's z falls less than FT's by {FALL} or more", 0, 0, 0, False, True)
    for kind in ("q_proj", "v_proj", "up_proj"):
        with_, against = at(kind, 2.5, norms="with"), at(kind, 2.5, norms="against")
        of = f"r of {_name(kind)}"
        hand = [
            Prediction(part="3", statement=f"{of}, norms with |E|, is positive", unit="r", per_seed=with_, low=0),
            Prediction(part="3", statement=f"{of}, norms against |E|, is negative", unit="r", per_seed=against, high=0),
            Prediction(part="3", statement=f"z of {_name(kind)}: with less against is positive", low=0, refutes=True,
                       per_seed=less(with_, against)),
        ]  # fmt: skip
        yield from judge(hand, 2)
    within = sum(ranges[place].low <= r[place] <= ranges[place].high for place in r)
    whole = len(ranges) == len(r)
    yield _counted(
        "4", "r within the range by the norms alone, share of cells", within, len(ranges), WITHIN, whole, False
    )


def _counted(
    part: str, statement: str, found: int, of: int, needed: float, complete: bool, refutes: bool
) -> dict[str, Any]:
    """A row of a prediction that counts cells."""
    outcome = (HOLDS if found >= needed else REFUTED if refutes else NOT) if complete else NOT_RUN
    return {
        "part": part, "statement": statement, "unit": "cells", "value": found / of if of else None, "low": None,
        "high": None, "agree": f"{found}/{of}" if of else None, "outcome": outcome,
    }  # fmt: skip


def _name(kind: str) -> str:
    return kind.removesuffix("_proj")


def _texts(row: Mapping[str, Any], ranges: Mapping[tuple[str, float], Range]) -> dict[str, str | None]:
    known = ranges.get((row["kind"], row["ratio"])) if row["method"] == "ft" and row["norms"] == "found" else None
    law = known and f"{number(known.r, digits=2)} [{number(known.low, digits=2)}, {number(known.high, digits=2)}]"
    return {"law": law}


if __name__ == "__main__":
    script(build, __doc__)
