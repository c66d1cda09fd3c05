"""Rows of `dora-lab probe` as a table in the terminal, a file, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab.io.atomic import replacing, write_text
from dora_lab.report import plots, points
from dora_lab.report.statistics import layer_correlation
from dora_lab.report.tables import csv_text

INTERVAL = "[95 %: matrices resampled; of few matrices such an interval is too narrow]"
ENDINGS = {"out": points.ENDINGS, "plot": plots.ENDINGS}


def refuse_endings(out: Path | None, plot: Path | None) -> None:
    """Raise ValueError for a file name that does not say a format that we write, before anything is computed."""
    for option, path in (("out", out), ("plot", plot)):
        if path is not None and path.suffix not in ENDINGS[option]:
            raise ValueError(f"--{option} {path}: must end in {', '.join(ENDINGS[option])}")
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"--{option} {path}: the folder {path.absolute().parent} does not exist; create it")


def summary(rows: list[dict[str, Any]]) -> str:
    """A line per tuned model, step and kind: means over layers, and Pearson's r of ΔD and ΔM over them.

    The interval of r is by resampling the matrices. What a reader should not miss is said below: outputs without a
    direction, weights that are tied, magnitudes of DoRA that never moved.
    """
    lines = []
    groups: Any = pd.DataFrame(rows).groupby(["tuned", "step", "kind"], dropna=False)
    for (tuned, step, kind), part in groups:
        known = part.dropna(subset=["delta_d", "delta_m"])
        x, y = (known[name].to_numpy(float)[:, None] for name in ("delta_d", "delta_m"))
        found = layer_correlation({0: (x, y)}) if len(known) > 3 else None
        line = {"tuned": Path(tuned).name, "step": "" if pd.isna(step) else int(step), "kind": kind, "n": len(part)}
        numbers = {name: f"{part[name].mean():.3g}" for name in ("delta_m", "delta_d", "relative_change", "grown")}
        r = f"undefined (n={len(known)})"
        if found is not None and found.resampled is not None:
            low, high = found.resampled
            r = f"{found.value:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(line | numbers | {"r(ΔD, ΔM)": r})
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    note = ["", INTERVAL] if any("[" in line["r(ΔD, ΔM)"] for line in lines) else []
    return "\n".join([table, *note, *_remarks(rows)])


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    still = [row for row in rows if row["magnitude_still"]]
    tied = {f"{row['module']} is {row['tied_with']} too (tied), counted once" for row in rows if row["tied_with"]}
    zero = [row for row in rows if row["undirected"]]
    remarks = sorted(tied)
    if zero:
        where = f"{zero[0]['module']} and {len(zero) - 1} others" if len(zero) > 1 else zero[0]["module"]
        count = sum(row["undirected"] for row in zero)
        remarks.append(f"{count} vectors are zero in W or W0, have no direction and are left out of ΔD: {where}")
    if still:
        names = sorted({Path(row["tuned"]).name for row in still})
        remarks.append(f"warning: in {', '.join(names)} no magnitude of {len(still)} matrices has left its start: were "
                       "they trained?")  # fmt: skip
    return ["", *remarks] if remarks else []


def save(rows: list[dict[str, Any]], path: Path) -> Path:
    """Write the rows in the format of the file's ending; returns the path."""
    frame = pd.DataFrame(rows)
    for name in {"step", "layer", "expert"} & {*frame}:  # whole numbers, though some rows have none
        frame[name] = frame[name].astype("Int64")
    if path.suffix == ".csv":
        write_text(path, csv_text(frame))
    elif path.suffix == ".jsonl":
        rows_text = frame.to_json(orient="records", lines=True, force_ascii=False, double_precision=15)
        write_text(path, str(rows_text))
    else:
        with replacing(path) as temporary:
            frame.to_parquet(temporary, index=False)
    return path


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """The scatter of `plots.plot`, a panel per tuned model and kind; returns the path."""
    plots.plot(rows, path)
    return path
