"""The correlation of ΔD with ΔM in a frame of probe rows: by axis, kind of matrix and view."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from dora_lab.report import statistics
from dora_lab.report.labels import METHODS
from dora_lab.report.statistics import Estimate

FACTORS = {  # what a grid changes, one at a time: name -> column
    "learning rate": "optim.learning_rate",
    "rank": "rank",
    "alpha / rank": "scale",
    "training items": "data.train_items",
}
AXES = {"out": ("delta_d", "delta_m"), "in": ("delta_d_in", "delta_m_in")}  # one magnitude per output / input feature


def correlate(probes: pd.DataFrame, kind: str, axis: str = "out", view: str = "pooled") -> Estimate | None:
    """Correlation of ΔD with ΔM over the layers and checkpoints of runs that differ in the seed alone.

    Args: probes: rows of the probe stream of one setting; kind: of matrix, "q_proj"; axis: "out" (the paper's) or "in";
        view: one of `statistics.VIEWS`.
    Returns the estimate of `statistics.layer_correlation`; None where there are no rows, the axis was not recorded, or
        nothing has moved.
    Raises: ValueError for an unknown axis or view, and if two runs have the same seed.
    """
    points = paired(probes, kind, axis)
    return None if points is None else statistics.layer_correlation(points, view)


def paired(probes: pd.DataFrame, kind: str, axis: str = "out") -> dict[int, tuple[np.ndarray, np.ndarray]] | None:
    """(ΔD_LC, ΔM_LC) of each seed, as `statistics` takes them; None and errors as `correlate`."""
    if axis not in AXES:
        raise ValueError(f"axis {axis!r} is not one of {', '.join(AXES)}")
    columns = list(AXES[axis])
    if not set(columns) <= set(probes.columns):
        return None
    rows = probes.loc[probes["kind"] == kind, ["spec_id", "seed", "module", "step", *columns]]
    if not len(rows) or rows[columns].isna().any().any():
        return None
    # modules, not layers: an encoder and a decoder number theirs alike
    rows = rows.sort_values(["seed", "spec_id", "module", "step"], kind="stable")
    runs, modules, seeds, steps = (
        pd.factorize(rows[name])[0] if name in ("spec_id", "module") else rows[name].to_numpy()
        for name in ("spec_id", "module", "seed", "step")
    )
    if len(set(zip(seeds, runs, strict=True))) > len(set(seeds)):
        raise ValueError("correlate: these runs differ in more than the seed; select the rows of one setting")
    # of a run so short that two fractions fall on one step, the step is one point, not two
    new = np.r_[True, (np.diff(runs) != 0) | (np.diff(modules) != 0) | (np.diff(steps) != 0)]
    values, modules, seeds, steps = rows[columns].to_numpy(dtype=float)[new], modules[new], seeds[new], steps[new]
    points = {}
    for seed in sorted(set(seeds)):
        mine = seeds == seed
        shape = len(set(modules[mine])), len(set(steps[mine]))
        if mine.sum() != shape[0] * shape[1]:
            run = rows["spec_id"].to_numpy()[new][mine][0]
            raise ValueError(f"correlate: run {run} lacks a module at a step; check its probe.jsonl")
        points[int(seed)] = tuple(values[mine, axis].reshape(shape) for axis in (0, 1))
    return points


def z_by_seed(probes: pd.DataFrame, kind: str) -> dict[int, float]:
    """Fisher's z of `correlate` ("out", "pooled") for each seed alone; seeds in which nothing varies are left out."""
    varying = {s: of for s, of in (paired(probes, kind) or {}).items() if min(np.ptp(of[0]), np.ptp(of[1])) > 0}
    return {
        seed: float(statistics.fisher_z(np.corrcoef(x.ravel(), y.ravel())[0, 1])) for seed, (x, y) in varying.items()
    }


def how(probes: pd.DataFrame) -> str:
    """Where the intervals of `statistics.cautious` come from, in words, for the seeds of a frame."""
    seeds = probes["seed"].nunique()
    return f"t over {seeds} seeds of Fisher's z" if seeds > 1 else "layers resampled, one seed"


def around_the_middle(probes: pd.DataFrame) -> Iterator[tuple[str, str, float, float, pd.DataFrame]]:
    """(method label, factor, level, level of the middle, rows) of a grid that changes one factor at a time.

    The middle of a method is the most frequent level of each of `FACTORS` (of equally frequent ones the middle one); it
    is a level of every factor, so its rows come once for each. Runs that differ from it in two factors are left out.
    """
    grid = probes.assign(scale=probes["method.alpha"] / probes["method.rank"])
    labels = {name: look.label for name, look in METHODS.items()}
    for method in [name for name in METHODS if (grid["method"] == name).any()]:
        rows = grid[grid["method"] == method]
        varied = {name: column for name, column in FACTORS.items() if rows[column].notna().all()}
        counts = rows.drop_duplicates("spec_id")
        modes = {column: counts[column].mode() for column in varied.values()}
        middle = {column: values.iloc[len(values) // 2] for column, values in modes.items()}
        for name, column in varied.items():
            others = [other for other in varied.values() if other != column]
            mine = rows[(rows[others] == [middle[other] for other in others]).all(axis=1)]
            if mine[column].nunique() > 1:
                for level, part in mine.groupby(column):
                    yield labels[method], name, float(level), float(middle[column]), part


def middle(probes: pd.DataFrame) -> pd.DataFrame:
    """The rows of every method's middle, `label` the plain name of the method; empty if there is no grid."""
    found = {
        label: rows.assign(label=label)
        for label, _, level, central, rows in around_the_middle(probes)
        if level == central
    }
    return pd.concat(found.values()) if found else probes.iloc[:0]
