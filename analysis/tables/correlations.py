"""The correlations of ΔD with ΔM beside the paper's and other people's, with intervals of two kinds, on both axes.

Runs of `commonsense`, and the middle of `decomposition` (the same settings, more seeds, both axes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import frame, isnt, script
from dora_lab import report
from dora_lab.paper import claims
from dora_lab.report import Block, correlations, interval, number, statistics
from dora_lab.report.statistics import Estimate

KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
TITLE = "Correlation of ΔD with ΔM (Pearson's r)"
NOTES = (
    "r is computed within a seed and averaged over seeds as Fisher z. Fisher: 95 % interval that takes layers and "
    "checkpoints for independent points, which checkpoints of one layer are not. Layers: 95 % interval by resampling "
    "layers with all their checkpoints, and seeds; with four layers even that is a rough one.",
    *(f"{view}: {what}." for view, what in statistics.VIEWS.items()),
)


def build(results: Path) -> list[Path]:
    """Write results/tables/correlations.{md,csv,tex}; returns their paths."""
    paper = claims("commonsense")
    printed = paper[(paper["metric"] == "correlation") & paper["kind"].isin(("number", "rerun"))]
    rows, blocks, used, statuses = [], [], [], {}
    for experiment in ("commonsense", "decomposition"):
        probes = frame(results, experiment, "probe")
        statuses = statuses or probes.attrs["statuses"]
        for _, part in report.groups(probes):
            part = correlations.middle(part) if experiment == "decomposition" else part
            part = part[part["split"] == "test"]
            found = [row for axis in correlations.AXES for row in _rows(part, axis)]
            if found:
                used.append(part)
                rows += found
                blocks += _blocks(found, printed)
    blocks.append(_printed_block(printed))
    columns = [*report.GROUP, "label", "kind", "axis", "view", "r", "fisher_low", "fisher_high"]
    data = pd.DataFrame(rows, columns=[*columns, "layers_low", "layers_high", "p", "n", "seeds"])
    source = report.provenance(pd.concat(used) if used else frame(results, "commonsense", "probe"), statuses)
    return report.save_table(results / "tables", "correlations", TITLE, blocks, data, source, isnt(data["tier"]))


def _rows(probes: pd.DataFrame, axis: str) -> list[dict[str, Any]]:
    """One row per method, kind and view that has a value."""
    rows = []
    for label in report.ordered_labels(probes):
        mine = probes[probes["label"] == label]
        for kind in KINDS:
            for view in statistics.VIEWS:
                found = correlations.correlate(mine, kind, axis, view)
                if found is not None:
                    about = {name: mine[name].iloc[0] for name in report.GROUP} | {"label": label, "kind": kind}
                    rows.append(about | {"axis": axis, "view": view} | _numbers(found))
    return rows


def _numbers(found: Estimate) -> dict[str, Any]:
    low, high = found.resampled or (None, None)
    return {
        "r": found.value,
        "fisher_low": found.low,
        "fisher_high": found.high,
        "layers_low": low,
        "layers_high": high,
        "p": found.p,
        "n": found.n,
        "seeds": str([round(r, 3) for r in found.per_seed]),
    }


def _blocks(rows: list[dict[str, Any]], printed: pd.DataFrame) -> list[Block]:
    """A block per axis: methods and kinds down, views across."""
    blocks = []
    for axis in correlations.AXES:
        mine = pd.DataFrame([row for row in rows if row["axis"] == axis])
        if not len(mine):
            continue
        cells = []
        for (label, kind), part in mine.groupby(["label", "kind"], sort=False):
            views = part.set_index("view")
            cells.append(
                {"Method": label, "Matrix": report.KINDS[kind]}
                | ({"Paper": _theirs(printed, label, kind, "number")} if axis == "out" else {})
                | ({"Others": _theirs(printed, label, kind, "rerun")} if axis == "out" else {})
                | {
                    "Pooled": number(views.loc["pooled", "r"], digits=2),
                    "Fisher": interval(views.loc["pooled", "fisher_low"], views.loc["pooled", "fisher_high"], digits=2),
                    "Layers": interval(views.loc["pooled", "layers_low"], views.loc["pooled", "layers_high"], digits=2),
                    "Between layers": _both(views.loc["between layers"]),
                    "Over time": number(views.loc["over time", "r"], digits=2),
                    "Changes": _both(views.loc["changes"]),
                }
            )
        where = rows[0]
        blocks.append(
            Block(
                title=f"{where['experiment']}, tier {where['tier']}, model {where['model']}, data {where['data']}: one "
                f"magnitude per {'output' if axis == 'out' else 'input'} feature ({mine['n'].iloc[0]} pooled)",
                cells=pd.DataFrame(cells),
                text=("Method", "Matrix"),
            )
        )
    return blocks


def _both(row: pd.Series) -> str | None:
    """`−0.38, Fisher [−0.64, −0.04], layers [−0.97, 0.85]`."""
    fisher, layers = (interval(row[f"{name}_low"], row[f"{name}_high"], digits=2) for name in ("fisher", "layers"))
    return f"{number(row['r'], digits=2)}, Fisher {fisher or report.MISSING}, layers {layers or report.MISSING}"


def _theirs(printed: pd.DataFrame, label: str, kind: str, source: str) -> str | None:
    rows = printed[
        (printed["kind"] == source) & (printed["method"] == label) & (printed["subject"] == report.KINDS[kind])
    ]
    return ", ".join(str(number(value, digits=2)) for value in rows["value"]) or None


def _printed_block(printed: pd.DataFrame) -> Block:
    """What the paper and others print, with where."""
    return Block(
        title="Printed by the paper and by others (not measured here)",
        isnt="measured here. The paper's single runs, and what others printed of theirs.",
        cells=pd.DataFrame(
            {
                "Source": printed["source"],
                "Model": printed["model"],
                "Setting": [text or None for text in printed["setting"]],
                "Method": printed["method"],
                "Matrix": printed["subject"],
                "r": [number(value, digits=2) for value in printed["value"]],
            }
        ),
        text=("Source", "Model", "Setting", "Method", "Matrix"),
        notes=(
            *NOTES,
            "The paper pools four checkpoints of all layers, one run per method, and prints no interval.",
        ),
    )


if __name__ == "__main__":
    script(build, __doc__)
