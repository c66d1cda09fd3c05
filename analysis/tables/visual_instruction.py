"""Table 12: LLaVA-1.5 by FT, LoRA and DoRA on seven benchmarks, runs beside the paper's own rows.

Of tier mini the mean over tasks of (score - floor) / (ceiling - floor) and the NLL carry verdicts, no plain average.
Nothing is written where there are no runs of experiment `visual_instruction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import frame, isnt, script
from dora_lab import paper, report
from dora_lab.report import Block, number
from dora_lab.report.items import item_values
from dora_lab.report.labels import ordered_labels
from dora_lab.report.statistics import mean_sd
from dora_lab.tasks import load_task
from dora_lab.tasks.visual_instruction.benchmarks import TASKS

TITLE = "Visual instruction tuning of LLaVA-1.5: scores in percent"
PAPER = "The paper's table 12 (arXiv 2402.09353 v6)"
PRINTED = "measured here. Single runs, as the paper prints them; FT and LoRA it quotes from LLaVA."
ORDER = [task.name for task in TASKS]
NLL = (
    "Answer NLL: -log p per token of the right answer, where no answers are offered its first letter small or capital, "
    "in nats, a mean over {}; lower is better."
)
NOTES = (
    "Mean ± standard deviation over seeds. SQA: right answers of the questions with an image. POPE: F1 of yes, mean "
    "of its three parts. MMBench: right in every rotation, by what can be read here; the paper's is its server's, "
    "which asks a language model about what cannot.",
    "Nothing stands where a server has the right answers (VQAv2 test-dev, VizWiz test): what was said is in the run's "
    "samples/*.submission.json. The average is over all tasks of a run, and missing where one of them is.",
    NLL.format("tasks"),
)

RATE = "optim.learning_rate"
EMBEDDED, BLIND = "mini_llava", "mini_llava_blind"
MINI = {"vqav2_val": "mini-VQA", "vizwiz_val": "mini-VizWiz", "science_qa": "mini-SQA", "pope": "mini-POPE"}
NORMALISED = (
    "Normalised: (share of right answers - floor) / (1 - floor), in percent; of mini-SQA with the questions in prose."
)
RULE = "no row above it by twice its standard error over seeds"
BOUNDED = (
    "Trained on short answers about pictures (mini-VQA) and on prose alone; of pictures no other form is trained on. "
    "mini-SQA: questions with a picture. mini-POPE: F1 of yes; unparsed: answers without yes or no, taken as yes.",
    f"{NORMALISED} A mean over tasks. Floor: mini-VQA's most frequent answer of the kind in training, Unanswerable, A, "
    "Yes. Blind: all pictures grey, in training and test.",
    NLL.format("tasks"),
)
EASY = "easy_vqa"
SECOND = (
    "Pictures and questions of the package easy-vqa, not this lab's, at the rates of the embedded world; no claim. "
    "Whole: of all its test questions, yes or no and other as they come (7,136 and 2,537), 1,000 of each asked. Floor: "
    "what is right of the very question most often in training.",
    NLL.format("both kinds"),
)


def build(results: Path) -> list[Path]:
    """Write results/tables/visual_instruction.{md,csv,tex}; returns their paths, none if there are no runs."""
    evals = frame(results, "visual_instruction")
    evals = evals[evals["split"] == "test"] if len(evals) else evals
    if not len(evals):
        return []
    printed = table_12()
    grey = evals[evals["data"] == BLIND]
    shown = evals if len(grey) == len(evals) else evals[evals["data"] != BLIND]
    blocks = []
    for _, rows in report.groups(shown):
        blocks.append(_block(rows, grey))
        if rows.iloc[0]["data"] == EMBEDDED:
            blocks += [_parts(rows, grey), _nlls(rows, grey)]
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


def _block(evals: pd.DataFrame, grey: pd.DataFrame) -> Block:
    """The runs of one tier, model and data; of the embedded one those that saw nothing, and its bounds, too."""
    if evals.iloc[0]["data"] == EMBEDDED:
        return _mini(evals, grey)
    first, tasks = evals.iloc[0], sorted(evals["task"].unique(), key=ORDER.index)
    if first["data"] == EASY:
        return _easy(evals, tasks)
    return Block(
        title=f"visual_instruction, tier {first['tier']}, model {first['model']}, data {first['data']}",
        cells=pd.DataFrame([_row(evals[evals["label"] == label], tasks) for label in ordered_labels(evals)]),
        text=("Method",),
        notes=NOTES,
        isnt=isnt([first["tier"]]),
    )


def _mini(evals: pd.DataFrame, grey: pd.DataFrame) -> Block:
    """Tier mini: a row a setting, and what can be reached."""
    tasks = [task for task in MINI if task in set(evals["task"])]
    rows = [_bounded(evals[evals["label"] == label], tasks) for label in ordered_labels(evals)]
    for label in ordered_labels(grey) if len(grey) else ():
        blind = _bounded(grey[grey["label"] == label], tasks)
        rows.append(blind | {"Method": f"Blind {blind['Method']}"})
    for bound in ("floor", "ceiling"):
        held = evals.drop_duplicates("task").set_index("task")[bound]
        known = {MINI[task]: number(100 * held[task]) for task in tasks if task not in ("science_qa", "pope")}
        rows.append({"Method": bound} | known | {"Normalised": number(100.0 * (bound != "floor"))})
    return Block(
        title=f"visual_instruction, tier mini, model {evals.iloc[0]['model']}, data {EMBEDDED}",
        cells=pd.DataFrame(rows), text=("Method",), notes=BOUNDED, isnt=isnt(["mini"]),
    )  # fmt: skip


def _parts(evals: pd.DataFrame, grey: pd.DataFrame) -> Block:
    """What the normalised mean of tier mini is made of, task by task, the floors, and which tasks are at theirs."""
    tasks = [task for task in MINI if task in set(evals["task"])]
    held = evals.drop_duplicates("task").set_index("task")["floor"]
    rows = _by_task(evals, grey, lambda row: 100 * float(item_values(row, "normalised").mean()), 1)
    rows.append({"Method": "floor, share right"} | {MINI[task]: number(100 * held[task]) for task in tasks})
    low = ", ".join(MINI[task] for task in at_floor(evals, tasks)) or "none"
    notes = (f"{NORMALISED} Unparsed answers of mini-POPE count as yes. Tasks at their floor ({RULE}): {low}.",)
    return Block(
        title=f"visual_instruction, tier mini, model {evals.iloc[0]['model']}, data {EMBEDDED}: normalised by task",
        cells=pd.DataFrame(rows), text=("Method",), notes=notes, isnt=isnt(["mini"]),
    )  # fmt: skip


def at_floor(evals: pd.DataFrame, tasks: Sequence[str]) -> list[str]:
    """The tasks that show nothing of a method: no trained row is above the floor by twice its standard error.

    They are no part of a verdict: `tasks` of experiments/registered/visual_instruction.md is without them.
    """
    trained = evals[(evals["method"] != "base") & evals["task"].isin(tasks)]
    above = trained.assign(over=[item_values(row, "normalised").mean() for row in trained.to_dict("records")])
    rows = above.groupby(["task", "label"])["over"].agg(["mean", "std", "count"]).fillna({"std": 0.0})
    clear = rows["mean"] > 2 * rows["std"] / rows["count"] ** 0.5
    return [task for task in tasks if task in clear.index and not clear[task].any()]


def _nlls(evals: pd.DataFrame, grey: pd.DataFrame) -> Block:
    """The answer NLL of tier mini, task by task: a mean over tasks may be one task's."""
    return Block(
        title=f"visual_instruction, tier mini, model {evals.iloc[0]['model']}, data {EMBEDDED}: answer NLL by task",
        cells=pd.DataFrame(_by_task(evals, grey, lambda row: float(row["answer_nll"]), 3)),
        text=("Method",), notes=(BOUNDED[-1],), isnt=isnt(["mini"]),
    )  # fmt: skip


def _by_task(
    evals: pd.DataFrame, grey: pd.DataFrame, value: Callable[[dict[Any, Any]], float], digits: int
) -> list[dict[str, str | None]]:
    """A row a setting, a column a task: a number of each run, its mean and standard deviation over seeds."""
    tasks, rows = [task for task in MINI if task in set(evals["task"])], []
    for blind, some in (("", evals), ("Blind ", grey)):
        for label in ordered_labels(some) if len(some) else ():
            runs = some[some["label"] == label]
            found = {task: [value(row) for row in runs[runs["task"] == task].to_dict("records")] for task in tasks}
            cells = {MINI[task]: number(*mean_sd(values), digits=digits) for task, values in found.items()}
            rows.append({"Method": f"{blind}{label}"} | cells | {"Seeds": str(runs["seed"].nunique())})
    return rows


def _easy(evals: pd.DataFrame, tasks: list[str]) -> Block:
    """The second source: a row a setting, and what can be said without looking."""
    items = {task: load_task(task).released_items or 0 for task in tasks}

    def whole(scores: Mapping[str, float]) -> float:
        return sum(100 * scores[task] * items[task] for task in tasks) / sum(items.values())

    rows = []
    for label in ordered_labels(evals):
        runs = evals[evals["label"] == label]
        by_run = [part.set_index("task")["value"].astype(float).to_dict() for _, part in runs.groupby("spec_id")]
        line = _row(runs, tasks)
        line["Average"] = number(*mean_sd([whole(scores) for scores in by_run if {*scores} == {*tasks}]))
        rows.append({"Whole" if name == "Average" else name: cell for name, cell in line.items()})
    held = evals.drop_duplicates("task").set_index("task")["floor"].to_dict()
    known = {report.TASKS[task]: number(100 * held[task]) for task in tasks}
    rows.append({"Method": "floor"} | known | {"Whole": number(whole(held))})
    return Block(
        title=f"visual_instruction, tier mini, model {evals.iloc[0]['model']}, data {EASY}",
        cells=pd.DataFrame(rows), text=("Method",), notes=SECOND, isnt=isnt(["mini"]),
    )  # fmt: skip


def _bounded(runs: pd.DataFrame, tasks: list[str]) -> dict[str, str | None]:
    """One setting of tier mini."""
    told = _row(runs, tasks)
    normal = [
        100 * sum(float(item_values(row, "normalised").mean()) for row in rows.to_dict("records")) / len(tasks)
        for _, rows in runs.groupby("spec_id")
        if {*rows["task"]} == {*tasks}
    ]
    unread = runs.loc[runs["task"] == "pope", ["n_unparsed", "n"]].sum()
    line = {MINI.get(_name(head), head): cell for head, cell in told.items() if head != "Average"}
    line["unparsed %"] = number(100 * unread["n_unparsed"] / unread["n"], digits=1) if unread["n"] else None
    last = {name: line.pop(name) for name in ("Answer NLL", "Seeds")}
    return line | {"Normalised": number(*mean_sd(normal)) if normal else None} | last


def _name(head: str) -> str:
    """The task of a column."""
    return next((task for task in MINI if report.TASKS[task] == head), head)


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
        "Rate": None if pd.isna(first.get(RATE)) else f"{first[RATE]:g}",
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
