"""What decides the sign of figure 2: the registered predictions of experiment `sign`, tier mini, and r cell by cell.

Thresholds are those of experiments/registered/sign.md, parts 1 to 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import isnt, script
from analysis.cells import READ, ZS, judged, less, measured, of_cells, per_doubling, shown, zs
from dora_lab import report
from dora_lab.paper.predicted import Prediction, judge
from dora_lab.report import Block, law
from experiments import sign
from experiments.sign import CONSTANT, DECAYS, FACTORS_ALONE, M_ALONE, MATRICES, SAME, SGD, Cell

TITLE = "What decides the sign of ΔD and ΔM: experiment sign, tier mini"
PARTS = {
    "1": "LoRA: r of q and v is positive at every δ and λ, and decay hardly moves it",
    "2": "FT: z of q and v falls with δ; r of v is negative from 1 % on, of q from 2.5 % on",
    "3": "DoRA under the same λ: as FT from the λ of 2.5 % on; by the decay of m alone",
    "4": "Both are needed: with checkpoints from 0.25 on, r of q under FT is positive up to 2.5 %",
    "5": "FT of the matrices alone is as FT; a constant rate makes late r more positive",
    "6": "It is no matter of AdamW: under SGD z of q and v falls with decay, too",
}
QV = {"q_proj": "q", "v_proj": "v"}
SOME = tuple(decay for decay in DECAYS if decay)
NAMES = {"setting": "Setting", "decay": "δ %", "ratio": "δ / ΔD"}


def build(results: Path) -> list[Path]:
    """Write results/tables/sign.{md,csv,tex}; returns their paths, none without runs."""
    probes = of_cells(results, "sign", sign.cells())
    if not len(probes):
        return []
    blocks, outcomes = judged(judge(list(predictions(zs(probes))), len(sign.MINI_SEEDS)), PARTS)
    rows = with_decay(probes)
    for method in report.METHODS:
        if mine := [row | _texts(row) for row in rows if row["cell"].method == method]:
            blocks.append(
                Block(title=report.METHODS[method].label, cells=shown(mine, NAMES), text=("Setting", "Matrix"))
            )
    blocks[-1] = Block(title=blocks[-1].title, cells=blocks[-1].cells, text=blocks[-1].text, notes=(READ,))
    cells = pd.DataFrame([row["cell"]._asdict() | {"delta": row["decay"]} | _plain(row) for row in rows])
    data = pd.concat([outcomes.assign(what="prediction"), cells.assign(what="cell")])
    source = report.provenance(probes, probes.attrs["statuses"])
    return report.save_table(results / "tables", "sign", TITLE, blocks, data, source, isnt(["mini"]))


def with_decay(probes: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `measured`, with the δ that decayed weights have in the end and its ratio to the kind's ΔD."""
    optim = ["optim.learning_rate", "optim.weight_decay"]
    of_cell = {
        cell: law.decayed(*rows.iloc[0][optim], steps=int(rows["step"].max())) if cell.control == SAME else cell.decay
        for cell, rows in probes.groupby("cell")
    }
    rows = sorted(measured(probes), key=lambda row: (row["cell"].control, of_cell[row["cell"]]))
    return [row | {"decay": (decay := of_cell[row["cell"]]), "ratio": decay / row["delta_d"]} for row in rows]


def predictions(z: ZS) -> Iterator[Prediction]:
    """Those of experiments/registered/sign.md."""
    none: Mapping[int, float] = {}

    def at(method: str, decay: float, kind: str, control: str = "", window: str = "late") -> Mapping[int, float]:
        return z.get((Cell(method, control, decay), kind, window), none)

    def slope(method: str, kind: str, control: str = "") -> Mapping[int, float]:
        return per_doubling({decay: at(method, decay, kind, control) for decay in SOME})

    for kind, name in QV.items():
        for control, letter in (("", "δ"), (SAME, "λ of δ")):
            for decay in SOME if control else DECAYS:
                said = f"LoRA, {letter} {decay:.1%}: r of {name} is positive"
                yield Prediction(part="1", statement=said, unit="r", per_seed=at("lora", decay, kind, control), low=0,
                                 refutes=True)  # fmt: skip
        yield Prediction(part="1", statement=f"LoRA: z of {name} changes by less than 0.2 a doubling of δ",
                         per_seed=slope("lora", kind), low=-0.2, high=0.2)  # fmt: skip
        falls = less(slope("lora", kind), slope("ft", kind))
        yield Prediction(part="1", statement=f"z of {name} falls less under LoRA than under FT, a doubling", low=0,
                         per_seed=falls, refutes=True)  # fmt: skip
    for kind, name in QV.items():
        yield Prediction(part="2", statement=f"FT: z of {name} falls, a doubling of δ", per_seed=slope("ft", kind),
                         high=0, refutes=True)  # fmt: skip
        for decay in (0.01, 0.025, 0.05) if kind == "v_proj" else (0.025, 0.05):
            yield Prediction(part="2", statement=f"FT, δ {decay:.1%}: r of {name} is negative", unit="r", high=0,
                             per_seed=at("ft", decay, kind), refutes=decay == 0.05)  # fmt: skip
    for kind, name in QV.items():
        yield from _dora(at, kind, name)
    for decay in (0.0, 0.005, 0.01, 0.025):
        yield Prediction(part="4", statement=f"FT, δ {decay:.1%}, checkpoints from 0.25 on: r of q is positive",
                         unit="r", per_seed=at("ft", decay, "q_proj", window="early"), low=0)  # fmt: skip
    for kind, name in QV.items():
        for decay in (0.0, 0.025):
            of = f"δ {decay:.1%}: z of {name}"
            matrices, constant = (less(at("ft", decay, kind, c), at("ft", decay, kind)) for c in (MATRICES, CONSTANT))
            yield Prediction(part="5", statement=f"{of}, FT of the matrices alone less FT, below 0.3", low=-0.3,
                             high=0.3, per_seed=matrices)  # fmt: skip
            yield Prediction(part="5", statement=f"{of} under a constant rate less a falling one's is positive", low=0,
                             per_seed=constant)  # fmt: skip
        falls = less(at("ft", 0.025, kind, SGD), at("ft", 0.0, kind, SGD))
        yield Prediction(part="6", statement=f"SGD: z of {name} at δ 2.5% less without decay is negative", high=0,
                         per_seed=falls, refutes=True)  # fmt: skip


def _dora(at: Any, kind: str, name: str) -> Iterator[Prediction]:
    for decay in (0.025, 0.05):
        yield Prediction(part="3", statement=f"DoRA, λ of δ {decay:.1%}: r of {name} is negative", unit="r", high=0,
                         per_seed=at("dora", decay, kind, SAME))  # fmt: skip
    with_, without = ("decay on all", at("dora", 0.025, kind)), ("no decay", at("dora", 0.0, kind))
    for control, like, unlike in ((M_ALONE, with_, without), (FACTORS_ALONE, without, with_)):
        one, of = at("dora", 0.025, kind, control), f"z of {name}: decay on {control}"
        near, far = less(one, like[1]), less(one, unlike[1])
        yield Prediction(part="3", statement=f"{of} less {like[0]}, below 0.3", per_seed=near, low=-0.3, high=0.3)
        nearer = {seed: abs(value) - abs(far[seed]) for seed, value in near.items() if seed in far}
        yield Prediction(part="3", statement=f"{of} is nearer to {like[0]} than to {unlike[0]}", per_seed=nearer,
                         high=0, refutes=True)  # fmt: skip


def _texts(row: Mapping[str, Any]) -> dict[str, str | None]:
    cell = row["cell"]
    setting = f"λ of δ {cell.decay:.1%}" if cell.control == SAME else cell.control or None
    return {"setting": setting, "decay": f"{100 * row['decay']:.1f}", "ratio": f"{row['ratio']:.1f}"}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("cell", "decay")}


if __name__ == "__main__":
    script(build, __doc__)
