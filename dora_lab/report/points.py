"""Rows with ΔD and ΔM from anywhere as the points of a figure: live rows, files of `dora-lab probe`, frames of runs."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dora_lab.io.files import parse_json
from dora_lab.report.labels import KINDS, ordered_labels

ENDINGS = (".csv", ".jsonl", ".parquet")
MEASURES = ("delta_d", "delta_m")
_NUMBERS = (*MEASURES, "layer", "step", "fraction", "seed")
_FROM = "rows of DecompositionCallback, of `dora-lab probe` or of runs have it"
COLUMNS = ["label", "kind", "layer", "unit", "seed", "at", "checkpoint", *MEASURES]


def points(rows: pd.DataFrame | Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A point per matrix, checkpoint and seed, in the order of labels and kinds that a figure shows.

    rows: with delta_d, delta_m, kind and module; and as they have them label (or tuned, a path), seed, layer (from 0),
        expert, fraction, step. Rows without ΔD or ΔM are left out, and two checkpoints of one step are one.
    Returns `COLUMNS`: label ("" where rows have none), layer counted from 1 (NaN: of none), unit (the matrix), at
        (share of the training where all rows have it, else the step; infinite: a saved model), checkpoint (the same in
        words); `attrs["lost"]` counts the rows that were left out.
    Raises: ValueError naming row and field for a field that is not there or no finite number, for rows of both axes,
        and for a matrix that is there twice.
    """
    frame = pd.DataFrame(rows if isinstance(rows, pd.DataFrame) else list(rows)).reset_index(drop=True)
    if not len(frame):
        raise ValueError("there are no rows to plot")
    for name in ("kind", "module", *MEASURES):
        if name not in frame:
            raise ValueError(f"field '{name}' is in no row; {_FROM}")
    for name in ("kind", "module"):
        if frame[name].isna().any():
            raise ValueError(f"row {int(frame[name].isna().argmax()) + 1}: field '{name}' has no value; {_FROM}")
    for name in _NUMBERS:
        frame[name] = _numbers(frame[name], name) if name in frame else np.nan
    if "axis" in frame and frame["axis"].nunique() > 1:
        raise ValueError("field 'axis': rows with a magnitude per output and per input feature; give those of one axis")
    shares = frame["fraction"].notna().all()
    found = frame.assign(
        label=_labels(frame),
        layer=frame["layer"] + 1,
        unit=frame["module"] + (_expert(frame["expert"]) if "expert" in frame else ""),
        seed=frame["seed"].fillna(0).astype(int),
        at=frame["fraction"] if shares else frame["step"].fillna(np.inf),
    )
    found["checkpoint"] = found["at"].map(_share if shares else _step)
    run = [name for name in ("spec_id", "label", "seed") if name in found]
    found = found[found["step"].isna() | ~found.duplicated([*run, "unit", "step"])]
    twice = found.duplicated(["label", "seed", "unit", "at"])
    if twice.any():
        first = found[twice].iloc[0]
        raise ValueError(
            f"row {first.name + 1}: '{first['unit']}' is there twice ({first['checkpoint']}); give the rows of one "
            "training, or a field 'label' or 'seed' that tells them apart"
        )
    whole = found[list(MEASURES)].notna().all(axis=1)
    order = {name: place for place, name in enumerate(_in_order(found))} | {
        name: place for place, name in enumerate(dict.fromkeys([*KINDS, *found["kind"]]))
    }
    found = found.sort_values(["label", "kind"], key=lambda column: column.map(order), kind="stable")
    found = found.loc[whole, COLUMNS]
    found.attrs = {"lost": int((~whole).sum())}
    if not len(found):
        raise ValueError("fields 'delta_d' and 'delta_m': no row has both; nothing is to be plotted")
    return found


def read(file: Path) -> pd.DataFrame:
    """The rows of a file that `dora-lab probe` or a run has written: .csv, .jsonl or .parquet.

    Raises ValueError, naming the file, for another ending and for what cannot be read.
    """
    if file.suffix not in ENDINGS:
        raise ValueError(f"{file}: a file of rows ends in {', '.join(ENDINGS)}; write one with `dora-lab probe --out`")
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; write it with `dora-lab probe --out`")
    try:
        if file.suffix == ".csv":
            return pd.read_csv(file)
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
        return pd.DataFrame([parse_json(line) for line in file.read_bytes().splitlines() if line.strip()])
    except (ValueError, OSError, AttributeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{file}: cannot be read as {file.suffix[1:]} ({why:.120}); write it again with `dora-lab probe --out`"
        ) from None


def _numbers(values: pd.Series, name: str) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    wrong = (numbers.isna() & values.notna()) | np.isinf(numbers)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row + 1}: field '{name}' = {values.tolist()[row]!r:.60} is no finite number; mend the row"
        )
    return numbers


def _labels(frame: pd.DataFrame) -> pd.Series:
    """The column `label`, else the last part of `tuned` where it tells the models apart, else nothing."""
    if "label" in frame:
        return frame["label"].fillna("").astype(str)
    if "tuned" not in frame:
        return pd.Series("", index=frame.index)
    paths = frame["tuned"].fillna("").astype(str)
    short = {path: Path(path).name for path in paths.unique()}
    return paths.map(short) if len(set(short.values())) == len(short) else paths


def _in_order(found: pd.DataFrame) -> list[str]:
    return ordered_labels(found) if {"method", "rank"} <= set(found) else list(found["label"].unique())


def _expert(values: pd.Series) -> pd.Series:
    return values.map(lambda value: "" if pd.isna(value) else f"[{int(value)}]")


def _share(at: float) -> str:
    return "final" if at == 1 else f"{at:.0%} of steps"


def _step(at: float) -> str:
    return "as saved" if np.isinf(at) else f"step {at:.0f}"
