"""The sign of figure 2 set by hand: the registered predictions of experiment `sign_norms`, and r beside the law's.

Thresholds are those of experiments/registered/sign_norms.md. A base that is not in the package stands apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import isnt, script
from analysis.cells import READ, ZS, judged, less, measured, of_cells, shown, zs
from dora_lab import report
from dora_lab.paper.predicted import Prediction, judge
from dora_lab.report import Block, number
from experiments import sign_norms
from experiments._sign_norms import BASES, predicted
from experiments.sign_norms import NORMS, RATIOS, SCALED, Cell, grid

TITLE = "The sign of ΔD and ΔM set by hand: experiment sign_norms, tier mini"
PARTS = {
    "1": "LoRA: r of q and v is positive with all norms and at every decay",
    "2": "At Σηλ/ΔD 20, FT and DoRA: r of q, v and up is positive with norms set with |E|, negative against it",
    "3": "The same at 2.4, the paper's place: z with above z against; up of FT is positive with all norms",
    "4": "It takes decay: with less against is larger at 20 than at 0",
    "5": "The law as a whole: the predicted sign in three quarters of the cells whose range excludes 0",
}
SHARE = 0.75
LETTERS = {"q_proj": "q", "v_proj": "v", "up_proj": "up"}
DECAYED = {method: report.METHODS[method].label for method in ("ft", "dora")}
NAMES = {"norms": "Norms", "ratio": "Σηλ / ΔD", "law": "r by the law"}


def build(results: Path) -> list[Path]:
    """Write results/tables/sign_norms.{md,csv,tex}; returns their paths, none without runs."""
    probes = of_cells(results, "sign_norms", sign_norms.cells())
    if not len(probes):
        return []
    blocks, data = [], []
    for base in BASES:
        mine = probes[probes["model.name"] == base]
        if not len(mine):
            continue
        made, outcomes = judged(judge(list(predictions(base, zs(mine))), len(grid(base)[1])), PARTS)
        rows = [row | row["cell"]._asdict() for row in measured(mine)]
        rows = [row | _by_law(row) for row in sorted(rows, key=_place)]
        for method, look in report.METHODS.items():
            if of_method := [row for row in rows if row["method"] == method]:
                cells = shown(of_method, NAMES)
                made.append(Block(title=look.label, cells=cells, text=("Norms", "Matrix"), notes=(READ,)))
        blocks += [_of(base, block) for block in made]
        data += [outcomes.assign(what="prediction", base=base), pd.DataFrame(rows).assign(what="cell")]
    source = report.provenance(probes, probes.attrs["statuses"])
    table = pd.concat(data).drop(columns=["cell", "law"])
    return report.save_table(results / "tables", "sign_norms", TITLE, blocks, table, source, isnt(["mini"]))


def predictions(base: str, z: ZS) -> Iterator[Prediction]:
    """Those of experiments/registered/sign_norms.md, for one base."""
    none: Mapping[int, float] = {}
    of_base, _ = grid(base)

    def at(method: str, norms: str, ratio: float, kind: str) -> Mapping[int, float]:
        return z.get((Cell(base, method, norms, ratio), kind, "late"), none)

    def apart(method: str, ratio: float, kind: str) -> dict[int, float]:
        return less(at(method, "with", ratio, kind), at(method, "against", ratio, kind))

    for kind in ("q_proj", "v_proj"):
        for norms in of_base:
            for ratio in RATIOS:
                yield Prediction(part="1", statement=f"LoRA, {norms}, {ratio:g}: r of {LETTERS[kind]} is positive",
                                 unit="r", per_seed=at("lora", norms, ratio, kind), low=0, refutes=True)  # fmt: skip
    for method, label in DECAYED.items():
        for kind, name in LETTERS.items():
            signed = partial(Prediction, part="2", unit="r")
            yield signed(statement=f"{label}, with |E|, 20: r of {name} is positive", low=0,
                         per_seed=at(method, "with", 20.0, kind))  # fmt: skip
            yield signed(statement=f"{label}, against |E|, 20: r of {name} is negative", high=0,
                         per_seed=at(method, "against", 20.0, kind))  # fmt: skip
        for kind in ("q_proj", "v_proj"):
            name, above = LETTERS[kind], partial(Prediction, low=0, refutes=True)
            far, near, without = (apart(method, ratio, kind) for ratio in (20.0, 2.4, 0.0))
            yield above(part="2", statement=f"{label}, 20: z of {name} with above against", per_seed=far)
            yield above(part="3", statement=f"{label}, 2.4: z of {name} with above against", per_seed=near)
            yield above(part="4", statement=f"{label}, {name}: with less against is larger at 20 than at 0",
                        per_seed=less(far, without))  # fmt: skip
    for norms in of_base:
        yield Prediction(part="3", statement=f"FT, {norms}, 2.4: r of up is positive", unit="r", low=0,
                         per_seed=at("ft", norms, 2.4, "up_proj"))  # fmt: skip
    yield Prediction(part="5", statement=f"share of cells with the predicted sign, above {SHARE:g}", unit="share",
                     per_seed=_right(base, at), low=SHARE - 1e-9, refutes=True)  # fmt: skip


def _right(base: str, at: Any) -> dict[int, float]:
    """The share of cells whose r, mean over seeds, has the predicted sign; of the seeds that have all of the cells.

    The cells are those whose predicted range excludes 0. One number, given for each of its seeds.
    """
    expected = []
    signed = [norms for norms in grid(base)[0] if norms != "flat"]
    for method, kind, norms, ratio in product(DECAYED, SCALED, signed, RATIOS):
        decay = sign_norms.decay(BASES[base], method, ratio)
        r, low, high = predicted(BASES[base], method, kind, norms, decay)
        if low * high > 0:
            expected.append((r, at(method, norms, ratio, kind)))
    seeds = sorted(set.intersection(*(set(z) for _, z in expected)))
    right = [r * np.mean([z[seed] for seed in seeds]) > 0 for r, z in expected if seeds]
    return {seed: float(np.mean(right)) for seed in seeds}


def _by_law(row: Mapping[str, Any]) -> dict[str, Any]:
    base = BASES[row["base"]]
    if row["kind"] not in base.lengths[row["method"]]:
        return {"law": None, "law_r": None, "law_low": None, "law_high": None}
    decay = sign_norms.decay(base, row["method"], row["ratio"])
    r, low, high = predicted(base, row["method"], row["kind"], row["norms"], decay)
    text = f"{number(r, digits=2)} [{number(low, digits=2)}, {number(high, digits=2)}]"
    return {"law": text, "law_r": r, "law_low": low, "law_high": high}


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["ratio"], NORMS.index(row["norms"])


def _of(base: str, block: Block) -> Block:
    title = block.title if base == "mini" else f"{block.title}, base {base}"
    return Block(title=title, cells=block.cells, text=block.text, notes=block.notes)


if __name__ == "__main__":
    script(build, __doc__)
