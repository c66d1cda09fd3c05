"""Directional claims against runs: which quantity should be above or below zero, and whether it is.

The verdicts are those of `verdict`; what is not registered before its runs is exploratory, its p adjusted by Benjamini
and Hochberg over the claims of one group of runs. "no runs": the runs that the claim is about do not exist.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false, reportUnhashable=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dora_lab.paper.paired import paired
from dora_lab.paper.verdict import MARGINS, Contrast, benjamini_hochberg, contrast, decide
from dora_lab.report import statistics
from dora_lab.report.statistics import Estimate

NO_RUNS = "no runs"
SUPERIOR = "superior"
NO_MARGIN = 0.0  # of correlations: none is equivalent to none
_KINDS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_GROUP = ["experiment", "tier", "model", "data", "eval_data"]


def verdicts(evals: pd.DataFrame, probes: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """One row per directional claim and group of runs (tier, model, data; for accuracies also protocol).

    Args: evals, probes: `report.frame` of one or all experiments, streams "eval" and "probe"; rows: `claims()` of
        them. Each claim is put to the runs of its own experiment; validation splits are left out.
    Returns columns claim, statement, source, tier, model, data, protocol, n, effect, low, high (the unadjusted 95 %
        interval), unit ("points" of accuracy or "r"), seeds (k/n with the claimed sign), p, p_adjusted, test, paper
        (the printed number, None if none), verdict. Claims without runs appear once per group, with effect None.
        Protocols that every run answers alike, item by item, are one row.
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
    scored = in_group[0][in_group[0]["metric"] == "accuracy"]
    ranked = _ranked(pd.concat([f[["label", "method", "rank"]] for f in in_group]).drop_duplicates())
    for claim in directions.to_dict("records"):
        printed = _printed(rows, claim)
        names = [name for name in (claim["method"], claim["other"]) if name in ranked]
        if names and claim["metric"] != "accuracy_drop_difference":
            ranks = ", ".join(ranked[name] for name in names)
            claim = claim | {name: ranked.get(claim[name], claim[name]) for name in ("method", "other")}
            claim["statement"] += f" ({ranks})"
        if claim["metric"] == "correlation":
            points = _select(in_group[1], {"label": claim["method"], "kind": _KINDS[str(claim["subject"])]})
            out.append(_row(claim, where | {"protocol": None}, _over_seeds(points), printed, "r"))
            if not out[-1]["n"] and len(points):  # there are runs, but nothing varies in them
                out[-1] |= {"n": f"undefined (n={len(points)})", "verdict": "undecided"}
            continue
        for protocol, part in protocols(scored) or [(None, scored)]:
            found = _contrast(part, _coefficients(claim, part))
            out.append(_row(claim, where | {"protocol": protocol}, found, printed, "points"))
    known = [row for row in out if row["p"] is not None]
    for row, p in zip(known, benjamini_hochberg([row["p"] for row in known]), strict=True):
        row["p_adjusted"] = p
    for row in out:
        found = row.pop("_found")
        if found is not None:
            margin = NO_MARGIN if row["unit"] == "r" else MARGINS["accuracy"]
            row["verdict"] = decide(found, SUPERIOR, margin, row["p_adjusted"])
    return out


def _ranked(labels: pd.DataFrame) -> dict[str, str]:
    """LoRA, DoRA, DoRA† -> the label that stands for it where a method has several ranks, so that none is plain.

    It is the middle rank that both methods have, and half of it.
    """
    named = {
        name: {int(rank): f"{name} r={rank}" for rank in labels.loc[labels["method"] == name.lower(), "rank"].dropna()}
        for name in ("LoRA", "DoRA")
    }
    there = set(labels["label"])
    named = {name: {r: label for r, label in found.items() if label in there} for name, found in named.items()}
    shared = sorted(named["LoRA"].keys() & named["DoRA"].keys())
    if not shared:
        return {}
    middle = shared[len(shared) // 2]
    found = {name: ranks[middle] for name, ranks in named.items() if name not in there}
    if "DoRA†" not in there and middle // 2 in named["DoRA"]:
        found["DoRA†"] = named["DoRA"][middle // 2]
    return found


def protocols(scored: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(name, rows) of every protocol; those by which every item of every run is answered alike are one, "a = b"."""
    parts: dict[Any, list[str]] = {}
    for name in sorted(scored["protocol"].dropna().unique()):
        rows = scored[scored["protocol"] == name]
        # a base that was not trained to answer is no measurement that two protocols could agree in
        trained = rows[~(rows["trainable_percent"] == 0)]
        answers = zip(trained["spec_id"], trained["task"], trained["n"], trained["correct"].astype(str), strict=True)
        known = len(trained) and trained["correct"].notna().all()  # early records have the numbers alone
        parts.setdefault(tuple(sorted(answers)) if known else name, []).append(name)
    return [(" = ".join(names), scored[scored["protocol"] == names[0]]) for names in parts.values()]


def _over_seeds(points: pd.DataFrame) -> Contrast | None:
    """Fisher's z of the correlation of ΔD with ΔM of each seed; None where nothing varies."""
    z = []
    for _, rows in _distinct(points).groupby("seed"):
        x, y = rows["delta_d"].to_numpy(float), rows["delta_m"].to_numpy(float)
        if len(rows) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0:
            z.append(float(statistics.fisher_z(np.corrcoef(x, y)[0, 1])))
    if not z:
        return None
    one = {"": np.asarray(z)[:, None] / 100}  # a single "item" for each seed: what is left is the seeds' own spread
    return contrast([(1.0, one)], {"": np.zeros(1, np.int64)}, ratio=False)


def layer_correlation(probes: pd.DataFrame, label: str, kind: str) -> Estimate | None:
    """Correlation of ΔD with ΔM over layers and checkpoints for one method and kind of matrix ("q_proj").

    Args: probes: rows of the probe stream (`label`, `kind`, `seed`, `delta_d`, `delta_m`, `module` or `layer`, and
        `step` where a run has several) of one group of runs.
    Returns the estimate of `statistics.layer_correlation` with the interval of `statistics.cautious`; None where there
    are no rows or nothing varies.
    """
    rows = _distinct(_select(probes, {"label": label, "kind": kind}))
    unit = "module" if "module" in rows else "layer"
    points = {}
    for seed, part in (rows if "step" in rows else rows.assign(step=0)).groupby("seed"):
        wide = part.pivot(index=unit, columns="step", values=["delta_d", "delta_m"])
        points[int(seed)] = (wide["delta_d"].to_numpy(float), wide["delta_m"].to_numpy(float))
    found = statistics.layer_correlation(points)
    return found and statistics.cautious(found)


def _distinct(points: pd.DataFrame) -> pd.DataFrame:
    """Of a run so short that two fractions fall on one step, the step is one point, not two."""
    return points.drop_duplicates([name for name in ("spec_id", "seed", "module", "step") if name in points])


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


def _contrast(scored: pd.DataFrame, coefficients: dict[str, int] | None) -> Contrast | None:
    """Of the labels that the claim is about; None if any of them has no runs."""
    if not coefficients or not set(coefficients) <= set(scored["label"]):
        return None
    return paired([(sign, scored[scored["label"] == label]) for label, sign in coefficients.items()], "accuracy")


def _row(
    claim: dict[str, Any], where: dict[str, Any], found: Contrast | None, paper: float | None, unit: str
) -> dict[str, Any]:
    """A row without its verdict, which the other claims of the group have a say in."""
    base = {"claim": claim["claim"], "statement": claim["statement"], "source": claim["source"], **where}
    empty = dict.fromkeys(("n", "effect", "low", "high", "seeds", "p", "p_adjusted", "test"))
    row = base | empty | {"unit": unit, "paper": paper, "verdict": NO_RUNS, "_found": None}
    if found is None:
        return row
    shown = np.tanh if unit == "r" else float
    low, high = found.interval() or (None, None)
    sign = 1 if claim["relation"] == ">" else -1
    agree = sum(sign * value > 0 for value in found.per_seed)
    seeds = len(found.per_seed)
    counted = f"{seeds} seed{'' if seeds == 1 else 's'}"
    return row | {
        "n": counted if unit == "r" else f"{counted} × {found.items} items",
        "effect": float(shown(found.value)),
        "low": None if low is None else float(shown(low)), "high": None if high is None else float(shown(high)),
        "seeds": f"{agree}/{seeds}", "p": found.p(),
        "test": "t over seeds of Fisher's z" if unit == "r" else "paired t over seeds and facts",
        "_found": replace(found, value=sign * found.value),
    }  # fmt: skip


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
