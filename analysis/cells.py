"""Runs by the cells that an experiment's specs are of: r, its Fisher's z and what it hangs on, cell by cell.

For `sign` and `sign_norms`, whose registered files say where a z will lie. A cell is a tuple, all of a run's spec but
its seed; runs that the experiment does not declare are in none.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import frame
from dora_lab import report
from dora_lab.paper.predicted import together
from dora_lab.report import Block, correlations, interval, number, statistics

WINDOWS = {"late": 0.7, "early": 0.25}  # the first checkpoint that is pooled, as a share of the training
KINDS = ("q_proj", "v_proj", "k_proj", "up_proj")  # of tables and figures; the csv has all
ZS = Mapping[tuple[Any, str, str], Mapping[int, float]]  # (cell, kind, window) -> seed -> z
COLUMNS = (  # of all that a frame has: the others would only slow it down
    "experiment", "tier", "model.name", "spec_id", "commit", "modified", "method", "rank", "label", "seed",
    "optim.learning_rate", "optim.weight_decay", "step", "fraction", "module", "layer", "kind", "delta_m", "delta_d",
    "radial", "rotation",
)  # fmt: skip
RULE = (
    "r over layers and checkpoints from 0.7 of the training on, z Fisher's of it. Value: mean over seeds; 95 %: t over "
    "seeds of z. A prediction holds where the interval lies where it was said to, is refuted (where the file names no "
    "refutation: does not hold) where none of it does, and is undecided else. Agree: seeds alone. Every claim is on "
    "these layers: others may differ, see the intervals by resampling layers."
)
READ = (
    "[95 %: t over seeds of Fisher's z, of one seed layers resampled]; layers: 95 % by resampling layers with all "
    "their checkpoints, and seeds, of few layers a rough one; slope: ΔM per ΔD, in weight units. ΔD, radial (mean of "
    "p - 1) and rotation (mean of p d / (1 - d)): means over layers at the last checkpoint; the two add up to the mean "
    "growth of a row. Late: checkpoints from 0.7 of the training on, early: from 0.25 on."
)


def of_cells(results: Path, experiment: str, cells: Mapping[str, Any]) -> pd.DataFrame:
    """The probe rows of the complete runs that are of a cell, with the column `cell`."""
    probes = frame(results, experiment, "probe")
    found = probes[probes["spec_id"].isin(cells)].reindex(columns=list(COLUMNS))
    found = found.assign(cell=found["spec_id"].map(cells))
    found.attrs = probes.attrs
    return found


def zs(probes: pd.DataFrame) -> dict[tuple[Any, str, str], dict[int, float]]:
    """Fisher's z of every cell, kind of matrix and window, seed by seed."""
    return {
        (cell, kind, window): correlations.z_by_seed(rows[rows["fraction"] >= since], kind)
        for (cell, kind), rows in probes.groupby(["cell", "kind"])
        for window, since in WINDOWS.items()
    }


def measured(probes: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per cell, kind and window in which something moved: r, slope, z and intervals, ΔD, radial and rotation."""
    found = []
    for (cell, kind), rows in probes.groupby(["cell", "kind"], sort=False):
        last = rows[rows["fraction"] == 1][["delta_d", "delta_m", "radial", "rotation"]].mean()
        for window, since in WINDOWS.items():
            points = correlations.paired(rows[rows["fraction"] >= since], kind)
            estimate = None if points is None else statistics.layer_correlation(points)
            if points is None or estimate is None:
                continue
            r, slope = statistics.cautious(estimate), statistics.layer_slope(points)
            over_layers = estimate.resampled or (None, None)
            found.append(
                {"cell": cell, "kind": kind, "window": window, "seeds": len(r.per_seed), "r": r.value, "low": r.low,
                 "high": r.high, "layers_low": over_layers[0], "layers_high": over_layers[1],
                 "z": float(statistics.fisher_z(r.value)), "slope": slope and slope.value,
                 "slope_low": slope and slope.low, "slope_high": slope and slope.high} | last.to_dict()
            )  # fmt: skip
    return found


def less(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """The difference, of the seeds that have both."""
    return {seed: value - other[seed] for seed, value in one.items() if seed in other}


def per_doubling(levels: Mapping[float, Mapping[int, float]]) -> dict[int, float]:
    """The change of a number per doubling of the level, by least squares, of the seeds that have every level."""
    seeds = set.intersection(*(set(z) for z in levels.values()))
    log = np.log2(list(levels))
    return {seed: float(np.polyfit(log, [z[seed] for z in levels.values()], 1)[0]) for seed in sorted(seeds)}


def judged(
    rows: Sequence[Mapping[str, Any]], parts: Mapping[str, str], rule: str = RULE
) -> tuple[list[Block], pd.DataFrame]:
    """Two blocks, the outcome of every part of the registered file and of every prediction in it (rows of
    `paper.predicted.judge`); and the rows as a frame."""
    outcomes = {part: [row["outcome"] for row in rows if row["part"] == part] for part in parts}
    whole = pd.DataFrame(
        [{"Part": part, "What": said, "Outcome": together(outcomes[part])} for part, said in parts.items()]
    )
    shown = pd.DataFrame(rows).assign(
        value=lambda found: [number(value, digits=2) for value in found["value"]],
        interval=[interval(row["low"], row["high"], digits=2) for row in rows],
    )
    heads = {"part": "Part", "statement": "Prediction", "unit": "Of", "value": "Value", "interval": "95 %"}
    heads |= {"agree": "Agree", "outcome": "Outcome"}
    shown = shown[list(heads)].rename(columns=heads)
    return [
        Block(title="Registered predictions, by part", cells=whole, text=tuple(whole)),
        Block(title="Registered predictions, one by one", cells=shown, text=("Part", "Prediction", "Of", "Outcome"),
              notes=(rule,)),
    ], pd.DataFrame(rows)  # fmt: skip


def shown(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], kinds: Sequence[str] = KINDS) -> pd.DataFrame:
    """The rows of `measured` as a table, a line per cell and kind; names: column -> head of what tells cells apart."""
    lines = []
    by_place: dict[tuple[Any, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] in kinds:
            by_place.setdefault((row["cell"], row["kind"]), {})[row["window"]] = row
    for windows in by_place.values():
        first = next(iter(windows.values()))
        cells = {head: first[column] for column, head in names.items()} | {"Matrix": report.KINDS[first["kind"]]}
        for window in WINDOWS:
            row = windows.get(window, {})
            cells[f"r, {window}"] = _with(row.get("r"), row.get("low"), row.get("high"))
        late = windows.get("late", {})
        cells |= {
            "Layers": interval(late.get("layers_low"), late.get("layers_high"), digits=2),
            "z": number(late.get("z"), digits=2), "Slope": number(late.get("slope"), digits=2),
            "ΔD %": number(100 * first["delta_d"], digits=2), "Radial %": number(100 * first["radial"], digits=2),
            "Rotation %": number(100 * first["rotation"], digits=2), "Seeds": str(first["seeds"]),
        }  # fmt: skip
        lines.append(cells)
    return pd.DataFrame(lines)


def _with(value: float | None, low: float | None, high: float | None) -> str | None:
    found = number(value, digits=2)
    return found and f"{found} {interval(low, high, digits=2) or ''}".strip()
