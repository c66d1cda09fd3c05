"""Directional claims against runs: which quantity should be above or below zero, and whether it is.

A verdict is "holds" (the 95 % interval lies on the claimed side of zero and every seed does), "does not hold" (both on
the other side), "undecided" (anything else), or "no runs" (the runs that the claim is about do not exist).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false, reportUnhashable=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dora_lab.report import statistics
from dora_lab.report.statistics import Estimate

VERDICTS = ("holds", "does not hold", "undecided", "no runs")
_KINDS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_GROUP = ["experiment", "tier", "model", "data", "eval_data"]


def verdicts(evals: pd.DataFrame, probes: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """One row per directional claim and group of runs (tier, model, data; for accuracies also protocol).

    Args: evals, probes: `report.frame` of one or all experiments, streams "eval" and "probe"; rows: `claims()` of
        them. Each claim is put to the runs of its own experiment; validation splits are left out.
    Returns columns claim, statement, source, tier, model, data, protocol, n, effect, low, high, unit ("points" of
        accuracy or "r"), seeds (k/n with the claimed sign), p, test, paper (the printed number, None if none),
        verdict. Claims without runs appear once per group, with effect None.
    """
    out: list[dict[str, Any]] = []
    directions = rows[rows["kind"] == "direction"]
    evals, probes = (f[f["split"] == "test"] for f in (evals, probes))  # a sweep on the validation split is no result
    for name in directions["experiment"].unique():
        both = pd.concat([f.loc[f["experiment"] == name, _GROUP] for f in (evals, probes)])
        keys = sorted(set(both.itertuples(index=False, name=None)), key=str) or [(name, *[None] * (len(_GROUP) - 1))]
        for key in keys:
            in_group = [_select(f, dict(zip(_GROUP, key, strict=True))) for f in (evals, probes)]
            where = {"tier": key[1], "model": key[2], "data": key[3] if key[3] == key[4] else f"{key[3]} → {key[4]}"}
            out += _of_group(rows, directions[directions["experiment"] == name], in_group, where)
    return pd.DataFrame(out)


def _of_group(
    rows: pd.DataFrame, directions: pd.DataFrame, in_group: Sequence[pd.DataFrame], where: dict[str, Any]
) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for claim in directions.to_dict("records"):
        printed = _printed(rows, claim)
        if claim["metric"] == "correlation":
            estimate = layer_correlation(in_group[1], str(claim["method"]), _KINDS[str(claim["subject"])])
            row = _row(claim, where | {"protocol": None}, estimate, printed, scale=1.0, unit="r")
            points = _select(in_group[1], {"label": claim["method"], "kind": _KINDS[str(claim["subject"])]})
            if estimate is None and len(points):  # there are runs, but nothing varies in them
                row |= {"n": f"undefined (n={len(points)})", "verdict": "undecided"}
            out.append(row)
            continue
        for protocol in sorted(in_group[0]["protocol"].dropna().unique()) or [None]:
            scored = _select(in_group[0], {"protocol": protocol, "metric": "accuracy"})
            estimate = _contrast(scored, _coefficients(claim, scored))
            out.append(_row(claim, where | {"protocol": protocol}, estimate, printed, scale=100.0, unit="points"))
    return out


def layer_correlation(probes: pd.DataFrame, label: str, kind: str) -> Estimate | None:
    """Correlation of ΔD with ΔM over layers and checkpoints for one method and kind of matrix ("q_proj").

    Args: probes: rows of the probe stream (`label`, `kind`, `seed`, `delta_d`, `delta_m`) of one group of runs.
    Returns the estimate of `statistics.correlation`, None where there are no rows or nothing varies.
    """
    rows = _select(probes, {"label": label, "kind": kind})
    # of a run so short that two fractions fall on one step, the step is one point, not two
    rows = rows.drop_duplicates([name for name in ("spec_id", "seed", "module", "step") if name in rows])
    return (
        statistics.correlation(
            {int(seed): (part["delta_d"].to_numpy(), part["delta_m"].to_numpy()) for seed, part in rows.groupby("seed")}
        )
        if len(rows)
        else None
    )


def _coefficients(claim: dict[str, Any], scored: pd.DataFrame) -> dict[str, int] | None:
    """Label -> coefficient of the contrast that the claim is about; None if the runs do not have what it needs."""
    if claim["metric"] == "accuracy_difference":
        return {claim["method"]: 1, claim["other"]: -1}
    lost: dict[str, int] = {}  # (method at its highest rank − at its lowest) − (the other's)
    lowest: list[int] = []
    for method, sign in ((claim["method"].lower(), 1), (claim["other"].lower(), -1)):
        ranks = scored.loc[scored["method"] == method, ["label", "rank"]].drop_duplicates().sort_values("rank")
        plain = ranks["label"].map(lambda label: "(" not in str(label)).astype(bool)
        ranks = ranks[plain]  # variants of a setting are no step of a rank
        if ranks["rank"].nunique() < 2:
            return None
        lost |= {ranks["label"].iloc[-1]: sign, ranks["label"].iloc[0]: -sign}
        lowest.append(int(ranks["rank"].iloc[0]))
    return lost if len(set(lowest)) == 1 else None


def _contrast(scored: pd.DataFrame, coefficients: dict[str, int] | None) -> Estimate | None:
    """Paired over the seeds and tasks that all labels share; over items where every row has its `correct` string."""
    if not coefficients or not set(coefficients) <= set(scored["label"]):
        return None
    cells: dict[tuple[str, str], dict[int, pd.Series]] = defaultdict(dict)
    for _, row in scored[scored["label"].isin(list(coefficients)) & scored["value"].notna()].iterrows():
        cells[row["label"], row["task"]][int(row["seed"])] = row
    tasks = sorted(set.intersection(*({t for (lab, t) in cells if lab == label} for label in coefficients)))
    shared = [set(cells[label, task]) for label in coefficients for task in tasks]
    seeds = sorted(set.intersection(*shared)) if shared else []
    if not seeds:
        return None
    used = [cells[label, task][seed] for label in coefficients for task in tasks for seed in seeds]
    if all(isinstance(row.get("correct"), str) for row in used):
        items: dict[str, NDArray[np.float64]] = {}
        for task in tasks:
            _require_same_items([cells[label, task][seed] for label in coefficients for seed in seeds])
            items[task] = np.array(
                [sum(sign * _bits(cells[label, task][seed]) for label, sign in coefficients.items()) for seed in seeds],
                dtype=float,
            )
        return statistics.contrast_over_items(items)
    return statistics.contrast_over_tasks(
        {
            task: [
                sum(sign * float(cells[label, task][seed]["value"]) for label, sign in coefficients.items())
                for seed in seeds
            ]
            for task in tasks
        }
    )


def _bits(row: pd.Series) -> NDArray[np.float64]:
    text = str(row["correct"])
    if set(text) - {"0", "1"} or len(text) != int(row["n"]):
        raise ValueError(
            f"eval.jsonl of run {row['spec_id']}, task {row['task']}, field correct: expected {row['n']} "
            f"characters 0 or 1, got {len(text)} of {sorted(set(text))}. Evaluate the run again."
        )
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(float) - ord("0")


def _require_same_items(rows: Sequence[pd.Series]) -> None:
    seen = {(int(row["n"]), row.get("prompt_sha256")) for row in rows}
    if len(seen) > 1:
        raise ValueError(
            f"task {rows[0]['task']}: runs {', '.join(sorted({r['spec_id'] for r in rows}))} answered "
            f"different items (n, prompt_sha256: {sorted(seen, key=str)}), so they cannot be paired. "
            f"Run them again on the same data."
        )


def _row(
    claim: dict[str, Any],
    where: dict[str, Any],
    estimate: Estimate | None,
    paper: float | None,
    scale: float,
    unit: str,
) -> dict[str, Any]:
    base = {"claim": claim["claim"], "statement": claim["statement"], "source": claim["source"], **where}
    if estimate is None:
        return (
            base
            | dict.fromkeys(("n", "effect", "low", "high"))
            | {"unit": unit, "seeds": None, "p": None, "test": None, "paper": paper, "verdict": "no runs"}
        )
    sign = 1 if claim["relation"] == ">" else -1
    agree = sum(sign * value > 0 for value in estimate.per_seed)
    against = sum(sign * value < 0 for value in estimate.per_seed)
    verdict, seeds = "undecided", len(estimate.per_seed)
    if estimate.low is not None and estimate.high is not None:
        near = min(sign * estimate.low, sign * estimate.high)
        far = max(sign * estimate.low, sign * estimate.high)
        if near > 0 and agree == seeds:
            verdict = "holds"
        elif far < 0 and against == seeds:
            verdict = "does not hold"
    scaled = {
        name: None if (v := getattr(estimate, field)) is None else scale * v
        for name, field in (("effect", "value"), ("low", "low"), ("high", "high"))
    }
    return base | {
        "n": estimate.n,
        **scaled,
        "unit": unit,
        "seeds": f"{agree}/{seeds}",
        "p": estimate.p,
        "test": estimate.test,
        "paper": paper,
        "verdict": verdict,
    }


def _printed(rows: pd.DataFrame, claim: dict[str, Any]) -> float | None:
    """The paper's own number for a claim where it prints exactly one: the correlations (Table 1 has four models)."""
    found = rows[
        (rows["kind"] == "number")
        & (rows["metric"] == claim["metric"])
        & (rows["method"] == claim["method"])
        & (rows["subject"] == claim["subject"])
    ]
    return float(found["value"].iloc[0]) if len(found) == 1 else None


def _select(data: pd.DataFrame, wanted: dict[str, Any]) -> pd.DataFrame:
    for column, value in wanted.items():
        data = data[data[column].isna() if value is None or value != value else data[column] == value]
    return data
