"""Table 12: LLaVA-1.5 by FT, LoRA and DoRA on seven benchmarks, runs beside the paper's own rows.

Nothing is written where there are no runs of experiment `visual_instruction`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis import frame, isnt, script
from dora_lab import paper, report
from dora_lab.report import Block, number
from dora_lab.report.labels import ordered_labels
from dora_lab.report.statistics import mean_sd
from dora_lab.tasks.visual_instruction.benchmarks import TASKS

TITLE = "Visual instruction tuning of LLaVA-1.5: scores in percent"
PAPER = "The paper's table 12 (arXiv 2402.09353 v6)"
PRINTED = "measured here. Single runs, as the paper prints them; FT and LoRA it quotes from LLaVA."
ORDER = [task.name for task in TASKS]
NOTES = (
    "Mean ± standard deviation over seeds. SQA: right answers of the questions with an image. POPE: F1 of yes, mean "
    "of its three parts. MMBench: right in every rotation, by what can be read here; the paper's is its server's, "
    "which asks a language model about what cannot.",
    "Nothing stands where a server has the right answers (VQAv2 test-dev, VizWiz test): what was said is in the run's "
    "samples/*.submission.json. The average is over all tasks of a run, and missing where one of them is.",
    "Answer NLL: -log p per token of the right answer, in nats, a mean over tasks; lower is better.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/visual_instruction.{md,csv,tex}; returns their paths, none if there are no runs."""
    evals = frame(results, "visual_instruction")
    evals = evals[evals["split"] == "test"] if len(evals) else evals
    if not len(evals):
        return []
    printed = table_12()
    blocks = [_block(rows) for _, rows in report.groups(evals)]
    return report.save_table(
        results / "tables",
        "visual_instruction",
        TITLE,
        [*blocks, paper_block(printed)],
        pd.concat([_data(evals), _paper_data(printed)], ignore_index=True),
        report.provenance(evals, frame(results, "visual_instruction").attrs["statuses"]),
    )


def table_12() -> pd.DataFrame:
    """The paper's own numbers, a row each (claims.csv)."""
    rows = paper.claims("visual_instruction")
    return rows[(rows["kind"] == "number") & (rows["metric"] == "score")]


def paper_block(printed: pd.DataFrame) -> Block:
    """The three rows of table 12."""
    rows = [
        {
            "Method": method,
            "r": None if pd.isna(part["rank"].iloc[0]) else f"{part['rank'].iloc[0]:.0f}",
            "#Params %": number(part["trainable_percent"].iloc[0], digits=2),
            **{subject.capitalize() if subject == "average" else subject: number(value) for subject, value in scores},
        }
        for method, part in printed.groupby("method", sort=False)
        for scores in [list(zip(part["subject"], part["value"], strict=True))]
    ]
    return Block(title=PAPER, cells=pd.DataFrame(rows), text=("Method",), isnt=PRINTED)


def _block(evals: pd.DataFrame) -> Block:
    """The runs of one tier, model and data."""
    first, tasks = evals.iloc[0], sorted(evals["task"].unique(), key=ORDER.index)
    return Block(
        title=f"visual_instruction, tier {first['tier']}, model {first['model']}, data {first['data']}",
        cells=pd.DataFrame([_row(evals[evals["label"] == label], tasks) for label in ordered_labels(evals)]),
        text=("Method",),
        notes=NOTES,
        isnt=isnt([first["tier"]]),
    )


def _row(runs: pd.DataFrame, tasks: list[str]) -> dict[str, str | None]:
    """One method: its runs' rows, by task."""
    first = runs.iloc[0]
    scores = {task: runs.loc[runs["task"] == task, "value"].dropna().astype(float) for task in tasks}
    by_run = [rows["value"].astype(float) for _, rows in runs.groupby("spec_id")]
    averages = [100 * values.mean() for values in by_run if len(values) == len(tasks) and values.notna().all()]
    nlls = [rows["answer_nll"].astype(float).mean() for _, rows in runs.groupby("spec_id")]
    return {
        "Method": first["label"],
        "r": None if pd.isna(first["rank"]) else str(first["rank"]),
        "α": number(first.get("method.alpha"), digits=0),
        "Rate": f"{first['optim.learning_rate']:g}",
        "#Params %": number(first["trainable_percent"], digits=2),
        **{report.TASKS[task]: number(*mean_sd((100 * values).tolist())) for task, values in scores.items()},
        "Average": number(*mean_sd(averages)) if averages else None,
        "Answer NLL": number(*mean_sd(nlls), digits=3),
        "Seeds": str(runs["seed"].nunique()),
    }


def _data(evals: pd.DataFrame) -> pd.DataFrame:
    names = ["tier", "model", "data", "label", "rank", "seed", "task", "metric", "n", "n_unparsed", "answer_nll"]
    percent = {"source": "this lab", "value": 100 * evals["value"].astype(float)}
    return evals[[*names, "choice_nll", "trainable_percent"]].assign(**percent)


def _paper_data(printed: pd.DataFrame) -> pd.DataFrame:
    renamed = printed.rename(columns={"method": "label", "subject": "task"})
    return renamed[["model", "label", "rank", "trainable_percent", "task", "metric", "value"]].assign(source="paper")


if __name__ == "__main__":
    script(build, __doc__)
