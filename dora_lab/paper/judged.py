"""A registered experiment's claims against its runs: one row per claim and metric, the verdict by the one rule."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false, reportUnhashable=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from dora_lab.paper.paired import LOWER_IS_BETTER, paired
from dora_lab.paper.registered import Claim, Registered, Term
from dora_lab.paper.verdict import MARGINS, Contrast, benjamini_hochberg, decide, p_value
from dora_lab.report.statistics import holm

# metrics that are judged together, and the protocols whose rows have them
TOGETHER = (
    (("accuracy", "choice_nll"), ("loglikelihood", "cloze")),
    (("normalised", "answer_nll"), ("generate",)),
)
COLUMNS = (
    "claim", "statement", "family", "metric", "carries", "hypothesis", "verdict", "effect", "low", "high", "unit", "p",
    "p_adjusted", "seeds", "n", "of", "facts", "items", "margin",
)  # fmt: skip


def judge(plan: Registered, evals: pd.DataFrame) -> pd.DataFrame:
    """Every claim of `plan` by its metric and those that are judged with it; columns `COLUMNS`.

    Args: evals: `report.frame`, stream "eval"; of it the test rows of the plan's experiments, of the protocols that go
        with its metric, on its tier, data and tasks count, with seeds below its number.
    effect, low and high (the unadjusted 95 % interval) are in `unit`, more is better; p_adjusted: Holm over the primary
    claims by the metrics that carry them, Benjamini-Hochberg over all the others; seeds: how many of them have the
    effect above 0; verdict: "k of n" while any condition has fewer than the registered n seeds.
    """
    mine = (evals["tier"] == plan.tier) & (evals["data"] == plan.data) & (evals["split"] == "test")
    mine &= evals["experiment"].isin((plan.experiment, *plan.beside))
    together, protocols = next(pair for pair in TOGETHER if plan.metric in pair[0])
    rows = evals[mine & evals["protocol"].isin(protocols) & (evals["seed"] < plan.seeds)]
    rows = rows[rows["task"].isin(plan.tasks)] if plan.tasks else rows
    found: list[dict[str, Any]] = []
    metrics = sorted(together, key=lambda metric: metric != plan.metric)
    for metric in metrics:
        for claim in plan.claims:
            here = paired([(term.coefficient, _of(term, rows)) for term in claim.terms], metric, plan.tasks)
            margin = plan.margin if metric == plan.metric else plan.also.get(metric, MARGINS[metric])
            found.append(_row(claim, metric, plan, here, margin))
    _adjust(found)
    return pd.DataFrame(found, columns=[*COLUMNS])


def _row(claim: Claim, metric: str, plan: Registered, here: Contrast | None, margin: float) -> dict[str, Any]:
    carries = metric in plan.carrying
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "claim": claim.name, "statement": claim.statement, "hypothesis": claim.hypothesis, "metric": metric,
        "family": "primary" if claim.primary and carries else "exploratory", "carries": carries,
        "n": 0 if here is None else len(here.per_seed),
        "of": plan.seeds, "unit": "%" if metric in LOWER_IS_BETTER else "points", "margin": margin, "_found": here,
    }  # fmt: skip
    if here is None:
        return row
    low, high = here.interval() or (None, None)
    agree = sum(value > 0 for value in here.per_seed)
    return row | {
        "effect": here.value, "low": low, "high": high, "p": p_value(here, claim.hypothesis, margin),
        "seeds": f"{agree}/{len(here.per_seed)}", "facts": here.facts, "items": here.items,
    }  # fmt: skip


def _adjust(found: Sequence[dict[str, Any]]) -> None:
    """Set p_adjusted and the verdict of each row, in place."""
    for family, adjusted in (("primary", holm), ("exploratory", benjamini_hochberg)):
        # a hypothesis without a p is still one of the family: the others' must not change once its runs are in
        every = [row for row in found if row["family"] == family]
        for row, p in zip(every, adjusted([1.0 if row["p"] is None else row["p"] for row in every]), strict=True):
            row["p_adjusted"] = None if row["p"] is None else p
    for row in found:
        here = row.pop("_found")
        if here is None or row["n"] < row["of"]:
            row["verdict"] = f"{row['n']} of {row['of']}"
        else:
            row["verdict"] = decide(here, row["hypothesis"], row["margin"], row["p_adjusted"])


def _of(term: Term, rows: pd.DataFrame) -> pd.DataFrame:
    rank = rows["rank"].isna() if term.rank is None else rows["rank"] == term.rank
    found = rows[(rows["method"] == term.method) & rank]
    for name, value in term.where.items():
        there = found[name] if name in found else pd.Series(None, found.index)  # without runs there is no such column
        found = found[there == (json.dumps(value) if isinstance(value, list) else value)]
    if found.duplicated(["task", "seed"]).any():
        said = ", ".join(sorted(found["label"].unique()))
        raise ValueError(
            f"two settings of {term.method} rank {term.rank} in one registered experiment ({said}): move the runs that "
            "are not registered to another results folder"
        )
    return found
