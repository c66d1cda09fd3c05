"""Claims against runs: a verdict for each claim of the paper, and our committed numbers against a user's own.

The paper's numbers and directional claims are rows of `experiments/claims.csv`; a row of kind "direction" says which
quantity should be above or below zero. `verdicts` computes it from the frames of `report.frame`, `compare` reads run
directories itself. Nothing here imports torch.

A verdict is "holds" (the 95 % interval lies on the claimed side of zero and every seed does), "does not hold" (both on
the other side), "undecided" (anything else), or "no runs" (the runs that the claim is about do not exist).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false, reportUnhashable=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dora_lab import statistics, store
from dora_lab.statistics import Estimate

CLAIMS = Path(__file__).resolve().parents[1] / "experiments" / "claims.csv"
VERDICTS = ("holds", "does not hold", "undecided", "no runs")
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
_KINDS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_GROUP = ["experiment", "tier", "model", "data", "eval_data"]


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


# ---------------------------------------------------------------------------------------------------------- verdicts
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


# ----------------------------------------------------------------------------------------------------------- compare
@dataclass(frozen=True)
class _Score:
    spec_id: str
    setting: str  # experiment, tier, model and data
    method: str
    protocol: str
    by_task: dict[str, tuple[float, int]]  # accuracy (fraction), items

    @property
    def average(self) -> float:
        return sum(value for value, _ in self.by_task.values()) / len(self.by_task)

    @property
    def variance(self) -> float:
        return sum(v * (1 - v) / n for v, n in self.by_task.values() if n) / len(self.by_task) ** 2


def compare(local_root: Path, committed_root: Path, experiment: str | None = None) -> tuple[str, bool]:
    """A user's runs against the committed records, run by run of the same spec_id, summarised per method.

    Training on another CPU adds up floats in another order, which can flip single items; so besides "agree exactly"
    (every task of every run equal) there is "within tolerance": the method's averages differ by at most two binomial
    standard errors of the difference of two such averages (items counted once, not once per seed, since all seeds
    answer the same items). Beyond that they "differ"; without a local run they are "missing". Committed runs on data, a
    model or a tier that none of the user's runs is about are left out: nobody asked for them.

    Args: the roots are results folders (with `runs/` in them); experiment: one name, None = all of the committed ones.
    Returns (text for a terminal, ok); ok means that every committed method has all its runs and none differs.
    """
    packages: dict[str, dict[str, str]] = {}
    local, committed = _scores(local_root, experiment, packages), _scores(committed_root, experiment, packages)
    if not committed:
        return f"No complete committed runs in {committed_root}: there is nothing to compare with.", False
    asked = {score.setting for score in local.values()}
    by_method: dict[tuple[str, str, str], list[_Score]] = defaultdict(list)
    for score in committed.values():
        if not asked or score.setting in asked:
            by_method[score.setting, score.method, score.protocol].append(score)
    if not by_method:
        return f"No complete committed run in {committed_root} is about {', '.join(sorted(asked))}.", False
    lines = [f"{'method':<18} {'protocol':<14} {'runs':>5} {'local':>7} {'committed':>10} {'tolerance':>10}  agreement"]
    counts: dict[str, int] = defaultdict(int)
    before = ""
    for (setting, method, protocol), scores in sorted(by_method.items()):
        if setting != before:
            lines.append(f"{setting}:")
        before = setting
        pairs = [(local[s.spec_id, protocol], s) for s in scores if (s.spec_id, protocol) in local]
        status, ours, theirs, tolerance = _agreement(pairs, len(scores))
        counts[status] += 1
        cells = [f"{100 * v:.2f}" if v is not None else "–" for v in (ours, theirs, tolerance)]
        lines.append(
            f"{method:<18} {protocol:<14} {len(pairs)}/{len(scores):<3} {cells[0]:>7} {cells[1]:>10} "
            f"{cells[2]:>10}  {status}"
        )
    extra = len({spec_id for spec_id, _ in set(local) - set(committed)})
    if extra:
        lines.append(f"{extra} of your runs have no committed record and are not compared.")
    ok = not counts["differ"] and not counts["missing"]
    lines.append(
        "Average accuracy in percent over tasks and the runs that both have; tolerance: two binomial standard "
        "errors of the difference."
    )
    lines.append(
        ("The numbers agree with the committed records" if ok else "The numbers do not all agree")
        + ": "
        + ", ".join(f"{n} {status}" for status, n in sorted(counts.items()) if n)
        + "."
    )
    if counts["differ"] and packages:
        lines += _package_differences(packages)
    return "\n".join(lines), ok


def _agreement(
    pairs: Sequence[tuple[_Score, _Score]], wanted: int
) -> tuple[str, float | None, float | None, float | None]:
    if not pairs:
        return "missing", None, None, None
    ours, theirs = (sum(pair[side].average for pair in pairs) / len(pairs) for side in (0, 1))
    tolerance = 2 * math.sqrt(sum(a.variance + b.variance for a, b in pairs) / len(pairs))
    if any(set(a.by_task) != set(b.by_task) for a, b in pairs):
        return "differ", ours, theirs, tolerance
    if len(pairs) < wanted:
        return "missing", ours, theirs, tolerance
    if all(a.by_task == b.by_task for a, b in pairs):
        return "agree exactly", ours, theirs, tolerance
    return ("within tolerance" if abs(ours - theirs) <= tolerance else "differ"), ours, theirs, tolerance


def _scores(root: Path, experiment: str | None, packages: dict[str, dict[str, str]]) -> dict[tuple[str, str], _Score]:
    found: dict[tuple[str, str], _Score] = {}
    for path, record in store.iter_runs(Path(root), experiment):
        if record["status"] != "complete":
            continue
        packages[str(root)] = dict(record.get("packages") or {})
        method, rank = record["spec"]["method"]["name"], record["spec"]["method"].get("rank")
        for row in store.read_rows(path, "eval"):
            if row["metric"] == "accuracy" and row["value"] is not None:
                key = record["spec_id"], row["protocol"]
                name = method if rank is None else f"{method} rank {rank}"
                spec = record["spec"]
                data = spec["data"].get("eval_name") or spec["data"]["name"]
                setting = f"{spec['experiment']}, tier {spec['tier']}, model {spec['model']['name']}, data {data}"
                found.setdefault(key, _Score(record["spec_id"], setting, name, row["protocol"], {}))
                found[key].by_task[row["task"]] = (float(row["value"]), int(row["n"]))
    return found


def _package_differences(packages: dict[str, dict[str, str]]) -> list[str]:
    if len(packages) != 2:
        return []
    ours, theirs = packages.values()
    changed = [
        f"{name} {ours.get(name, '–')} (committed: {theirs.get(name, '–')})"
        for name in sorted(set(ours) | set(theirs))
        if ours.get(name) != theirs.get(name)
    ]
    return [f"Packages that differ: {', '.join(changed)}."] if changed else []
