"""Table 1: accuracy per method and task, mean ± sd over seeds, and the paper's own table as a block of its own.

Reads every experiment named `commonsense`, `commonsense_…` or `small`, test split only (a sweep on the validation split
is not a result). Experiments, tiers, models, data and protocols never share a block.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from analysis import PRINTED, frame, isnt, script
from dora_lab import paper, report
from dora_lab.report import Block, number
from dora_lab.report.statistics import mean_sd
from dora_lab.runs.caveats import caveats

TITLE = "Commonsense reasoning: accuracy in percent"
PAPER = "The paper's table 1 (arXiv 2402.09353 v6; other models and data, single runs)"
NARROW = ("Method", "r", "α", "Rate", "#Params %", "Train, s", "Peak, MB", "Average")
BESIDE = (
    "r, α, Rate: rank, alpha, peak learning rate. Train, Peak: means over seeds of what the records say, on a machine "
    "that did other work, too: no benchmark."
)


def build(results: Path) -> list[Path]:
    """Write results/tables/commonsense.{md,csv,tex}; returns their paths."""
    evals, statuses = load(results)
    scores = scored(results, evals)
    paper = table_1()
    data = pd.concat([scores.assign(source="this lab"), paper_data(paper)], ignore_index=True)
    return report.save_table(
        results / "tables",
        "commonsense",
        TITLE,
        [*our_blocks(scores, evals, frame(results), caveats_of(results)), paper_block(paper)],
        data[["source", *(c for c in scores.columns)]],
        report.provenance(evals, statuses),
    )


def readme(results: Path) -> str:
    """The text of the README's table block: the embedded default, then the paper's LLaMA-7B."""
    evals, statuses = load(results)
    evals = evals[evals["tier"] == "mini"]
    newer = evals["eval_data"] == "mini2"
    evals = evals[newer if newer.any() else (evals["eval_data"] == "mini") & (evals["protocol"] == "generate")]
    scores = scored(results, evals)
    paper = table_1()
    blocks = [
        *our_blocks(scores, evals, frame(results), caveats_of(results)),
        paper_block(paper[paper["model"] == "LLaMA-7B"]),
    ]
    source = report.provenance(evals, statuses)
    return "\n\n".join(
        [*(report.markdown(block, level=3) for block in blocks), source.caption(), *filter(None, [source.incomplete()])]
    )


def scored(results: Path, evals: pd.DataFrame) -> pd.DataFrame:
    """Scores over seeds, with what can stand beside them."""
    return report.scores(evals).merge(report.beside(frame(results, stream="record")), how="left")


def load(results: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Evaluation rows of the complete runs, and how many runs were left out, by status."""
    evals = frame(results, stream="eval")
    of_table = evals["experiment"].astype(str).str.fullmatch(r"commonsense(_\w+)?|small") & (evals["split"] == "test")
    return evals[of_table], evals.attrs["statuses"]


def caveats_of(results: Path) -> dict[tuple[str, ...], list[str]]:
    """What has to be known with the scores (items that were trained on, answers that were cut), by `report.GROUP`."""
    found: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for row in report.frame(results, stream="record").to_dict("records"):
        sources, cut = row.get("inputs.sources"), row.get("training.answers_cut")
        record = {
            "inputs": {"sources": json.loads(sources) if isinstance(sources, str) else []},
            "training": {"answers_cut": int(cut) if pd.notna(cut) else 0},
        }
        for text in caveats(record):
            group = tuple(row[name] for name in report.GROUP)
            found.setdefault(group, {}).setdefault(text, set()).add(str(row["label"]))
    return {
        group: [f"{text} ({', '.join(sorted(labels))})." for text, labels in texts.items()]
        for group, texts in found.items()
    }


def our_blocks(
    scores: pd.DataFrame,
    evals: pd.DataFrame,
    everything: pd.DataFrame,
    known: dict[tuple[str, ...], list[str]],
) -> list[Block]:
    """One block per experiment, tier, model, data and protocol, the embedded default first.

    Args: evals: the rows that the scores are of; everything: those of all experiments, with the searches for settings;
        known: `caveats_of`.
    """
    blocks = []
    parts = [
        pair for _, rows in report.groups(scores) for pair in rows.groupby([*report.GROUP, "protocol"], dropna=False)
    ]
    for key, part in parts:
        experiment, tier, model, trained, evaluated, _, protocol = key
        group = dict(zip(report.GROUP, key, strict=False))
        tasks = [task for task in part["task"].unique() if task != "average"]
        of_group = evals[(evals[[*group]] == pd.Series(group)).all(axis=1)]
        mine = of_group[of_group["protocol"] == protocol]
        rows = [
            _method_row(part[part["label"] == label], tasks, mine[mine["label"] == label])
            for label in part["label"].unique()
        ]
        rows += [
            {"Method": name}
            | {_head(task): _reference(part[part["task"] == task], field) for task in [*tasks, "average"]}
            for name, field in (
                ("chance level", "chance"),
                ("always the most frequent label", "majority"),
                ("items per run", "n_items"),
            )
        ]
        heads = tuple(_head(task) for task in [*tasks, "average"])
        data = trained if trained == evaluated else f"trained on {trained}, evaluated on {evaluated}"
        likelihoods = mine["choice_nll"].notna().any()
        said = report.sets_apart(of_group, everything)
        blocks.append(
            Block(
                title=f"{experiment}, tier {tier}, model {model}, data {data}, protocol {protocol}",
                cells=pd.DataFrame(rows).drop(columns=[] if likelihoods else "Choice NLL"),
                apart=3,
                narrow=NARROW,
                wide=("Method", "Rate", *heads, *(["Choice NLL"] if likelihoods else []), "Unparsed %", "Seeds"),
                isnt=isnt([tier]),
                notes=(*_notes(part, likelihoods), *known.get(key[:-1], ()), *([said] if said else [])),
            )
        )
    return blocks


def _method_row(rows: pd.DataFrame, tasks: list[str], evals: pd.DataFrame) -> dict[str, str | None]:
    """evals: the single scores behind `rows`."""
    by_task = rows.set_index("task")
    average = by_task.loc["average"]
    nll = evals.groupby("seed")["choice_nll"].mean().dropna()  # over tasks within a run first
    return {
        "Method": average["label"],
        "r": None if pd.isna(average["rank"]) else str(average["rank"]),
        "α": average["alpha"],
        "Rate": average["learning_rate"],
        "#Params %": number(average["trainable_percent"], digits=2),
        "Train, s": number(average["seconds_train"]),
        "Peak, MB": number(average["peak_memory_bytes"] / 1e6, digits=0),
        **{_head(task): number(by_task.loc[task, "mean"], by_task.loc[task, "sd"]) for task in [*tasks, "average"]},
        "Choice NLL": number(*mean_sd(nll.tolist()), digits=3) if len(nll) else None,
        "Unparsed %": number(average["unparsed_percent"]),
        "Seeds": str(by_task["n_seeds"].max()),
    }


def _head(task: str) -> str:
    return "Average" if task == "average" else report.TASKS.get(task, task)


def _reference(rows: pd.DataFrame, field: str) -> str | None:
    values = sorted(set(rows[field].dropna()))
    if not values:
        return None
    return "–".join(f"{v:.0f}" for v in values) if field == "n_items" else "–".join(f"{v:.1f}" for v in values)


def _notes(part: pd.DataFrame, likelihoods: bool) -> tuple[str, ...]:
    notes = [
        "Mean ± standard deviation over seeds; the average is taken over tasks within a run first. An answer that "
        "cannot be parsed counts as wrong and is counted under unparsed.",
        BESIDE,
    ]
    if likelihoods:
        notes.append(
            "Choice NLL: -log of what the right option has of the likelihood of all that the item offers, in nats, a "
            "mean over tasks; lower is better."
        )
    if part["label"].str.endswith(report.HALF_RANK).any():
        notes.append(f"{report.HALF_RANK}: half the rank.")
    averages = part[part["task"] == "average"].set_index("label")["n_seeds"]
    lacking = int((part.groupby("label")["n_seeds"].max() - averages).clip(lower=0).sum())
    if lacking:
        notes.append(f"{lacking} run{'' if lacking == 1 else 's'} without a score for every task: not in the averages.")
    return tuple(notes)


def table_1() -> pd.DataFrame:
    """The paper's own table 1, a row per printed accuracy (claims.csv)."""
    rows = paper.claims("commonsense")
    return rows[(rows["kind"] == "number") & (rows["source"] == "Table 1")]


def paper_block(paper: pd.DataFrame) -> Block:
    """All rows of the paper's table 1, in its order."""
    rows = []
    for (model, method), part in paper.groupby(["model", "method"], sort=False):
        values = part.set_index("subject")["value"]
        rows.append(
            {
                "Model": model,
                "Method": method,
                "r": None if pd.isna(part["rank"].iloc[0]) else f"{part['rank'].iloc[0]:.0f}",
                "#Params %": number(part["trainable_percent"].iloc[0], digits=2),
                **{_head(task): number(value) for task, value in values.items()},
            }
        )
    return Block(
        title=PAPER,
        cells=pd.DataFrame(rows),
        text=("Model", "Method"),
        notes=(f"{report.HALF_RANK}: half the rank.",),
        isnt=PRINTED,
    )


def paper_data(paper: pd.DataFrame) -> pd.DataFrame:
    """The same rows for the csv file, source "paper"."""
    return pd.DataFrame(
        {
            "source": "paper",
            "experiment": "commonsense",
            "tier": None,
            "model": paper["model"],
            "data": "commonsense_170k",
            "eval_data": "llm_adapters",
            "split": "test",
            "protocol": "generate",
            "label": paper["method"],
            "task": paper["subject"],
            "mean": paper["value"],
            "n_seeds": 1,
            "rank": paper["rank"],
            "trainable_percent": paper["trainable_percent"],
        }
    )


if __name__ == "__main__":
    script(build, __doc__, readme=readme)
