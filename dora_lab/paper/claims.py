"""The paper's numbers and claims, and those of others beside them: the rows of `experiments/claims.csv`."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false, reportUnhashable=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab.house import CLAIMS
from dora_lab.runs.doctor import Finding, of_error

_COLUMNS = (
    "experiment",
    "kind",
    "claim",
    "source",
    "model",
    "method",
    "setting",
    "other",
    "rank",
    "trainable_percent",
    "subject",
    "metric",
    "relation",
    "value",
    "statement",
    "read_from",
    "verified",
)
KINDS = ("number", "direction", "reprint", "rerun", "computed", "data")


def claims(experiment: str | None = None, path: Path = CLAIMS) -> pd.DataFrame:
    """The rows of claims.csv; `value`, `rank` and `trainable_percent` are numbers (missing: NaN), the rest text.

    `kind` is "number" (printed by the paper, version 6), "direction" (relation ">" or "<" to `value`), "reprint" (the
    same cell as printed elsewhere by those whom it is from), "rerun" (somebody else's run of the same setting),
    "computed" (arithmetic from layer shapes) or "data" (numbers of items, the majority label). `source` says where the
    number stands, `setting` what else was done (a rerun's packages, the modules of table 6), `read_from` how it got
    here and `verified` whether it was read there: "yes", or "no" for what is known from memory alone. Accuracies are
    percent, correlations in [-1, 1], exact match a fraction, memory GB.
    Args: experiment: rows that one experiment is about (of some there is no file in `experiments/` yet); None = all.
    Raises: FileNotFoundError; ValueError naming line and field for a malformed row.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(f"{path}: the columns must be {', '.join(_COLUMNS)}; found {reader.fieldnames}")
        rows: list[dict[str, Any]] = []
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: expected {len(_COLUMNS)} fields; put a field with commas into quotes")
            for field, known in (("kind", KINDS), ("verified", ("yes", "no"))):
                if row[field] not in known:
                    raise ValueError(f"{where}, field {field}: {row[field]!r} is not one of {', '.join(known)}")
            if row["relation"] not in (("<", ">") if row["kind"] == "direction" else ("=",)):
                raise ValueError(f"{where}, field relation: {row['relation']!r} does not fit kind {row['kind']!r}")
            for field in ("value", "rank", "trainable_percent"):
                try:
                    row[field] = float(row[field]) if row[field] else math.nan
                except ValueError:
                    raise ValueError(f"{where}, field {field}: {row[field]!r} is not a number") from None
            if math.isnan(row["value"]):
                raise ValueError(f"{where}, field value: empty; a row is there for its number")
            rows.append(row)
    found = pd.DataFrame(rows, columns=list(_COLUMNS))
    return found if experiment is None else found[found["experiment"] == experiment].reset_index(drop=True)


def examine(file: Path = CLAIMS) -> Iterator[Finding]:
    """What is wrong with the file of claims, as `doctor` says it."""
    try:
        if not len(claims(path=file)):
            yield Finding(file, "holds no claim", "restore it")
    except (OSError, ValueError) as error:
        yield of_error(file, error)
