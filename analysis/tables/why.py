"""The correlation of ΔD with ΔM under other learning rates, ranks, scales and lengths.

The grid of `decomposition`. What is tested, over seeds: the trend of Fisher's z over the levels of each factor, and the
differences between methods in the middle of the grid; the p of all these tests are adjusted by Holm together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import frame, isnt, script
from analysis.cells import per_doubling
from dora_lab import report
from dora_lab.report import Block, correlations, interval, number, p_text, statistics
from dora_lab.report.statistics import Estimate

KINDS = ("q_proj", "v_proj")
VIEWS = ("pooled", "between layers", "changes")
TESTS = (
    "z is Fisher's, atanh r. Mean over seeds [95 % interval, Student's t over seeds], p adjusted by Holm for all tests "
    "of these three tables."
)
DOUBLE = "1.00: twice the factor, twice as far; −0.15: a tenth less far. Mean over layers at the last checkpoint."
SIGN = "Above zero: the first method's correlation is the more positive one."
NOTES = (
    "r, mean over seeds, with the 95 % interval that takes layers and checkpoints for independent points (Fisher); the "
    "interval by resampling layers is in the csv file, and far wider between layers: there are four.",
    "ΔM, ΔD: mean over layers and seeds at the last checkpoint. Spread of ΔM: its standard deviation over layers by its"
    " mean, mean over seeds.",
)
COLUMNS = ["what", "kind", "view", "label", "other", "factor", "level", "n_seeds", "r", "fisher_low", "fisher_high"]
COLUMNS += ["layers_low", "layers_high", "seeds", "delta_m", "delta_d", "spread_m", "z", "z_low", "z_high", "p"]
MEASURES = {"delta_m": "ΔM", "delta_d": "ΔD"}
Setting = tuple[str, str, float, float, pd.DataFrame]


def build(results: Path) -> list[Path]:
    """Write results/tables/why{suffix}.{md,csv,tex}, one set per grid; returns the paths (none without a grid)."""
    probes = frame(results, "decomposition", "probe")
    paths = []
    for suffix, rows in report.groups(probes):
        settings = list(correlations.around_the_middle(rows))
        if settings:
            found = measured(settings)
            paths += report.save_table(
                results / "tables",
                f"why{suffix}",
                "What the correlation of ΔD with ΔM depends on",
                blocks(found),
                found,
                report.provenance(rows, probes.attrs["statuses"]),
                isnt(rows["tier"]),
            )
    return paths


def measured(settings: list[Setting]) -> pd.DataFrame:
    """A row per kind and view: `what` = level (of a factor), trend (over them), methods (two of them), distance."""
    out: list[dict[str, Any]] = []
    for kind, view in itertools.product(KINDS, VIEWS):
        about = {"kind": kind, "view": view}
        found = [(setting, correlations.correlate(setting[4], kind, "out", view)) for setting in settings]
        z = [_z_by_seed(estimate, setting[4]) for setting, estimate in found]
        middles = {
            label: by_seed for (label, _, level, middle, _), by_seed in zip(settings, z, strict=True) if level == middle
        }
        for (label, first), (other, second) in itertools.combinations(middles.items(), 2):
            differences = [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]
            out.append(about | {"what": "methods", "label": label, "other": other} | _tested(differences))
        for label, factor in dict.fromkeys(setting[:2] for setting in settings):
            levels = {s[2]: by_seed for s, by_seed in zip(settings, z, strict=True) if s[:2] == (label, factor)}
            out.append(
                about | {"what": "trend", "label": label, "factor": factor} | _tested(per_doubling(levels).values())
            )
        for (label, factor, level, _, rows), estimate in found:
            named = {
                "what": "level",
                "label": label,
                "factor": factor,
                "level": level,
                "n_seeds": rows["seed"].nunique(),
            }
            out.append(about | named | _moved(rows[rows["kind"] == kind]) | (_numbers(estimate) if estimate else {}))
    for kind, measure in itertools.product(KINDS, MEASURES):
        for label, factor in dict.fromkeys(setting[:2] for setting in settings):
            levels = {s[2]: _log_by_seed(s[4], kind, measure) for s in settings if s[:2] == (label, factor)}
            about = {"what": "distance", "kind": kind, "view": measure, "label": label, "factor": factor}
            out.append(about | _tested(per_doubling(levels).values()))
    table = pd.DataFrame(out).reindex(columns=COLUMNS)
    tested = table["p"].notna()
    table["p_holm"] = pd.Series(statistics.holm(table.loc[tested, "p"].tolist()), index=table.index[tested])
    return table


def _numbers(found: Estimate) -> dict[str, Any]:
    low, high = found.resampled or (None, None)
    named = {"r": found.value, "fisher_low": found.low, "fisher_high": found.high}
    return named | {"layers_low": low, "layers_high": high, "seeds": str([round(r, 3) for r in found.per_seed])}


def _moved(rows: pd.DataFrame) -> dict[str, float]:
    """Mean ΔM and ΔD at the last checkpoint, and how much ΔM differs between layers (sd over mean)."""
    last = rows[rows["fraction"] == rows["fraction"].max()]
    by_seed = last.groupby("seed")["delta_m"].agg(["mean", "std"])
    spread = float((by_seed["std"] / by_seed["mean"]).mean())
    return {"delta_m": float(last["delta_m"].mean()), "delta_d": float(last["delta_d"].mean()), "spread_m": spread}


def _z_by_seed(found: Estimate | None, rows: pd.DataFrame) -> dict[int, float]:
    seeds = sorted(rows["seed"].unique())
    if found is None or len(found.per_seed) != len(seeds):  # a seed in which nothing moved has no correlation
        return {}
    return dict(zip(seeds, statistics.fisher_z(found.per_seed).tolist(), strict=True))


def _log_by_seed(rows: pd.DataFrame, kind: str, measure: str) -> dict[int, float]:
    """log2 of the mean over layers at the last checkpoint."""
    last = rows[(rows["kind"] == kind) & (rows["fraction"] == rows["fraction"].max())]
    return {int(seed): float(np.log2(part[measure].mean())) for seed, part in last.groupby("seed")}


def _tested(values_S: Iterable[float]) -> dict[str, Any]:
    found = statistics.over_seeds(list(values_S))
    return {} if found is None else {"z": found.value, "z_low": found.low, "z_high": found.high, "p": found.p}


def blocks(table: pd.DataFrame) -> list[Block]:
    """Methods against each other, the trends, and the numbers of every level for each kind and method."""
    tests = table.assign(Methods=table["label"] + " − " + table["other"].astype(str)).rename(
        columns={"label": "Method", "factor": "Factor"}
    )
    found = [
        Block(title=title, cells=_tests(part, names), text=tuple(names), notes=notes)
        for what, names, title, notes in (
            (
                "methods",
                ["Methods"],
                "Methods against each other, in the middle of the grid: difference of z",
                (TESTS, SIGN),
            ),
            ("trend", ["Method", "Factor"], "Trends: change of z per doubling of the factor", (TESTS,)),
            (
                "distance",
                ["Method", "Factor"],
                "Distances: change of log2 ΔM and log2 ΔD per doubling",
                (TESTS, DOUBLE),
            ),
        )
        if len(part := tests[tests["what"] == what])
    ]
    levels = table[table["what"] == "level"]
    for (kind, label), part in levels.groupby(["kind", "label"], sort=False):
        rows = [_row(setting) for _, setting in part.groupby(["factor", "level"], sort=False)]
        title = f"{label}, {report.KINDS[kind]} matrices"
        found.append(Block(title=title, cells=pd.DataFrame(rows), text=("Factor",)))
    return [*found[:-1], replace(found[-1], notes=NOTES)] if len(levels) else found


def _tests(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A line per comparison, a column per kind and view: `−0.31 [−0.40, −0.22], p 0.002`."""
    rows = []
    for key, part in table.groupby(names, sort=False):
        cells = dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True))
        for row in part.to_dict("records"):
            z = number(row["z"], digits=2)
            text = z and f"{z} {interval(row['z_low'], row['z_high'], digits=2)}, p {p_text(row['p_holm'])}"
            cells[f"{report.KINDS[row['kind']]}, {MEASURES.get(row['view'], row['view'])}"] = text
        rows.append(cells)
    return pd.DataFrame(rows)


def _row(setting: pd.DataFrame) -> dict[str, Any]:
    """One level: how far the weights moved, and the correlation in each view."""
    first = setting.iloc[0]
    cells = {
        "Factor": first["factor"],
        "Level": f"{first['level']:g}",
        "Seeds": str(int(first["n_seeds"])),
        "ΔM": f"{first['delta_m']:.3g}",
        "Spread of ΔM": number(first["spread_m"], digits=2),
        "ΔD": f"{first['delta_d']:.2g}",
    }
    for row in setting.to_dict("records"):
        r, fisher = number(row["r"], digits=2), interval(row["fisher_low"], row["fisher_high"], digits=2)
        cells[row["view"].capitalize()] = r and f"{r} {fisher or report.MISSING}"
    return cells


if __name__ == "__main__":
    script(build, __doc__)
