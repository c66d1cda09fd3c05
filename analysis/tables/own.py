"""Own models: what each sweep found, the scores, and whether DoRA differs from the others, a part for every plan.

Reads experiment `own`. A plan is what runs share but for method, rate and seed: the model, the items, the protocol.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import itertools
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import frame, isnt, script
from analysis.tables.commonsense import caveats_of, our_blocks
from dora_lab import report
from dora_lab.paper.paired import paired
from dora_lab.paper.verdict import MARGINS, decide, p_value
from dora_lab.report import METHODS, Block, interval, number, p_text
from dora_lab.report.statistics import holm

TITLE = "Own models: accuracy in percent, and what sets the methods apart"
PLAN = ("tier", "model", "model.revision", "model.dtype", "data.sha256", "data.tasks", "data.train_items",
        "data.validation_items", "data.test_items", "data.template", "evaluation.protocols")  # fmt: skip
RULE = (
    "The first method less the second, more is better: points of accuracy, and percent of the likelihood that the "
    "right option has among all. 95 % interval over seeds and items; p adjusted by Holm over the pairs of a metric; a "
    "margin of 1 point and of 5 %. One seed has no interval, and so no verdict but undecided."
)


def build(results: Path) -> list[Path]:
    """Write results/tables/own.{md,csv,tex}; returns their paths, none without runs."""
    evals = load(results, "eval")
    blocks = [block for _, rows in plans(evals) for block in blocks_of(results, rows)]
    if not blocks:
        return []
    source = report.provenance(evals, evals.attrs.get("statuses"))
    data = report.scores(evals[evals["split"] == "test"])
    return report.save_table(results / "tables", "own", TITLE, blocks, data, source, isnt(evals["tier"]))


def text(results: Path, runs: Container[str]) -> str:
    """The part of the plan that the runs of some spec ids are of, as Markdown."""
    found = [rows for _, rows in plans(load(results, "eval")) if any(one in runs for one in rows["spec_id"])]
    return "\n\n".join(report.markdown(block) for rows in found for block in blocks_of(results, rows))


def load(results: Path, stream: str) -> pd.DataFrame:
    """The rows of all own runs; a method that a plan has one setting of is called by its name alone."""
    rows = frame(results, "own", stream)
    for _, part in plans(rows):
        tested = part[part["split"] == "test"]
        for method, of_method in tested.groupby("method"):
            settings = of_method[["rank", "label"]].drop_duplicates()
            if len(settings) == 1 and method in METHODS:
                rows.loc[of_method.index, "label"] = METHODS[method].label
    return rows


def plans(rows: pd.DataFrame) -> list[tuple[Any, pd.DataFrame]]:
    """(what they share, the rows) of each plan, its sweep among them."""
    return list(rows.groupby([*PLAN], dropna=False, sort=True)) if len(rows) else []


def blocks_of(results: Path, rows: pd.DataFrame) -> list[Block]:
    """The blocks of one plan: rates, scores, verdicts."""
    tested, first = rows[rows["split"] == "test"], rows.iloc[0]
    name = f"{first['model']} ({first['model.revision']}), {first['data.train_items']:.0f} training items"
    found = [Block(title=f"Rates, {name}", cells=_rates(rows), notes=(_tried(rows),))] if _swept(rows) else []
    if not len(tested):
        return found
    records = load(results, "record")
    records = records[records["spec_id"].isin(tested["spec_id"])]
    scores = report.scores(tested).merge(report.beside(records), how="left")
    for block in our_blocks(scores, tested, rows, caveats_of(results)):
        found.append(replace(block, title=f"Scores, {name}, {block.title.rpartition(', ')[2]}"))
    verdicts = _verdicts(tested)
    return [*found, *([Block(title=f"Verdicts, {name}", cells=verdicts, text=("Claim", "Metric", "Verdict"),
                             notes=(RULE,))] if len(verdicts) else [])]  # fmt: skip


def _swept(rows: pd.DataFrame) -> bool:
    return bool((rows["split"] == "validation").any())


def _rates(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per method: the rate of its test runs, and what each rate of its sweep came to."""
    rate, lines, tried = "optim.learning_rate", [], rows[rows["split"] == "validation"]
    for method in (name for name in METHODS if name in set(tried["method"])):
        of_method = tried[tried["method"] == method]
        used = rows[(rows["method"] == method) & (rows["split"] == "test")][rate].dropna().unique()
        nll = of_method["choice_nll"].notna().all()
        losses = of_method.groupby(rate)["choice_nll" if nll else "value"].mean()
        lines += [
            {"Method": METHODS[method].label, "Used": "/".join(f"{one:g}" for one in used) or None,
             "Tried": f"{one:g}",
             "Choice NLL": number(loss, digits=3) if nll else None,
             "Accuracy %": None if nll else number(100 * loss)}
            for one, loss in losses.items()
        ]  # fmt: skip
    return pd.DataFrame(lines).dropna(axis="columns", how="all")


def _tried(rows: pd.DataFrame) -> str:
    held = rows["data.validation_items"].iloc[0]
    return (
        f"On {held:.0f} validation items, one seed. The rate that is used is the vertex of the parabola through the "
        "lowest and its neighbours, over log2 of the rate."
    )


def _verdicts(tested: pd.DataFrame) -> pd.DataFrame:
    """A line for each pair of methods and each metric."""
    order = [name for name in METHODS if name in set(tested["method"])]
    lines: list[dict[str, Any]] = []
    for metric in ("accuracy", "choice_nll"):
        if metric != "accuracy" and tested["choice_nll"].isna().any():
            continue
        found = []
        for other, one in itertools.combinations(order, 2):
            both = [tested[tested["method"] == name] for name in (one, other)]
            if other == "base":  # it is not trained: the same answers beside every seed
                seeds = sorted(both[0]["seed"].unique())
                both[1] = pd.concat([both[1].assign(seed=seed) for seed in seeds])
            if any(part.duplicated(["task", "seed"]).any() for part in both):
                continue  # two settings of a method
            here = paired([(1, both[0]), (-1, both[1])], metric)
            if here is not None:
                found.append((one, other, here))
        known = [p_value(here, "superior", MARGINS[metric]) for _, _, here in found]
        adjusted = iter(holm([p for p in known if p is not None]))
        for (one, other, here), p in zip(found, known, strict=True):
            p = None if p is None else next(adjusted)
            low, high = here.interval() or (None, None)
            lines.append(
                {"Claim": f"{METHODS[one].label} above {METHODS[other].label}", "Metric": metric.replace("_", " "),
                 "Effect": number(here.value, digits=2), "95 %": interval(low, high, digits=2), "p": p_text(p),
                 "Seeds": str(len(here.per_seed)), "Verdict": decide(here, "superior", MARGINS[metric], p)}
            )  # fmt: skip
    return pd.DataFrame(lines)


if __name__ == "__main__":
    script(build, __doc__)
