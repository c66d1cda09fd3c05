"""Table 2: VL-BART's scores on the four image-text tasks, ours by group of runs, and the paper's as a block of its own.

Beside the plain average that the paper prints stand the mean over tasks of (score - floor) / (ceiling - floor) and the
NLL of the best answer, which carry the verdicts: captions' CIDEr outweighs all else in a plain average.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import frame, isnt, script
from dora_lab import paper, report
from dora_lab.report import Block, number
from dora_lab.report.statistics import mean_sd
from dora_lab.tasks import load_task
from dora_lab.tasks.image_text_novel import ENDING
from experiments.image_text import CELLS, TASKS

EXPERIMENT, EMBEDDED, BLIND = "image_text", "mini_vl", "mini_vl_blind"
PAPER = "The paper's table 2 (arXiv 2402.09353 v6; VL-BART on the real data, single runs)"
PRINTED = (
    "measured here. Single runs, as the paper prints them; FT and LoRA it quotes, trained in another way than DoRA."
)
NAMES = {(m.name, m.dropout, m.detach_norm): name for name, m in CELLS.items()}
NOTES = (
    "Mean ± standard deviation over seeds. Accuracy in percent, captions CIDEr-D times 100. Average: as the paper has "
    "it, the plain mean of the four; no verdict stands on it. NLL: -log p per token of the best answer, in nats, mean "
    "over tasks; lower is better.",
    "LoRA, quoted: scale 1/4, dropout, layer norms frozen, as in the runs that the paper quotes. LoRA, matched: all as "
    "DoRA has it.",
)
BOUNDED = (
    "Normalised: mean over tasks of (score - floor) / (ceiling - floor), in percent. Floor: the answer that training "
    "items of the kind have most often, one caption for all. Ceiling: the truth; of captions a person's, against the "
    "other four. Blind: FT whose features are all zero, in training and test."
)


def build(results: Path) -> list[Path]:
    """Write results/tables/image_text.{md,csv,tex}; returns their paths, none where nothing was run."""
    evals = frame(results, EXPERIMENT)
    tested = evals[evals["split"] == "test"] if len(evals) else evals
    if not len(tested):
        return []
    seconds = _seconds(frame(results, EXPERIMENT, "record"))
    blocks, data = [], []
    for (tier, model, name), part in tested.groupby(["tier", "model", "data"], sort=True):
        if name == BLIND and (tested["data"] == EMBEDDED).any():
            continue
        blind = tested[tested["data"] == BLIND] if name == EMBEDDED else tested.iloc[:0]
        for ending, what in (("", ""), (ENDING, ", unseen combinations of colour and shape")):
            of_blind = _rows(blind, ending, seconds)
            rows = [*_rows(part, ending, seconds), *(row | {"name": f"Blind {row['name']}"} for row in of_blind)]
            if rows:
                data += [{"tier": tier, "model": model, "data": name, "items": ending[1:] or "test"} | r for r in rows]
                title = f"tier {tier}, model {model}, data {name}{what}"
                cells = _shown(rows, name == EMBEDDED)
                notes = (*NOTES, BOUNDED) if name == EMBEDDED else NOTES
                blocks.append(Block(title=title, cells=cells, notes=notes, isnt=isnt([tier]), wide=(*cells,)))
    source = report.provenance(tested, evals.attrs["statuses"])
    table = pd.DataFrame(data)
    title = "Image-text understanding: scores on four tasks"
    return report.save_table(results / "tables", EXPERIMENT, title, [*blocks, printed()], table, source)


def _rows(evals: pd.DataFrame, ending: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """A row per setting: name, label, seeds, seconds of training, mean and sd of each task's score (as printed), of the
    average, of the normalised mean (None without bounds) and of the NLL; floor and ceiling of each task."""
    wanted = [task + ending for task in TASKS]
    found = []
    for label in report.ordered_labels(evals):
        mine = evals[(evals["label"] == label) & evals["task"].isin(wanted)]
        runs = [run.set_index("task").loc[wanted] for _, run in mine.groupby("seed") if {*run["task"]} == {*wanted}]
        if not runs:
            continue
        first = runs[0].iloc[0]
        row: dict[str, Any] = {"name": NAMES.get((first["method"], *_told(first)), label), "label": label}
        row |= {"seeds": len(runs), "learning_rate": first.get("optim.learning_rate"), "spec_id": first["spec_id"]}
        spent = [seconds.get(name, float("nan")) for name in mine["spec_id"].unique()]
        row |= {
            "seconds": float(np.mean(spent)),
            "rank": first["rank"],
            "alpha": first["method.alpha"],
            "percent": first["trainable_percent"],
        }
        for task, plain in zip(wanted, TASKS, strict=True):
            row[plain], row[f"{plain}_sd"] = mean_sd([100 * run.loc[task, "value"] for run in runs])
            for bound in ("floor", "ceiling"):
                row[f"{plain}_{bound}"] = 100 * _known(runs[0].loc[task].get(bound))
        row["average"], row["average_sd"] = mean_sd([100 * run["value"].mean() for run in runs])
        row["nll"], row["nll_sd"] = mean_sd([run["answer_nll"].mean() for run in runs])
        normal = [value for run in runs if np.isfinite(value := _normalised(run))]
        row["normalised"], row["normalised_sd"] = mean_sd(normal) if len(normal) == len(runs) else (None, None)
        found.append(row)
    names = [row["name"] for row in found]
    return [row | {"name": row["label"] if names.count(row["name"]) > 1 else row["name"]} for row in found]


def _told(row: pd.Series) -> tuple[Any, Any]:
    return row["method.dropout"], row["method.detach_norm"]


def _one(values: Sequence[float]) -> float:
    """The value that all rows have; of runs that were asked other items there is none."""
    return values[0] if len({*values}) == 1 else float("nan")


def _known(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _normalised(run: pd.DataFrame) -> float:
    if not {"floor", "ceiling"} <= {*run.columns}:
        return float("nan")
    low, high = run["floor"].astype(float), run["ceiling"].astype(float)
    return float(100 * ((run["value"] - low) / (high - low)).mean(skipna=False))


def _seconds(records: pd.DataFrame) -> dict[str, float]:
    """Seconds of training by run."""
    return records.set_index("spec_id")["seconds.train"].to_dict() if "seconds.train" in records else {}


def _shown(rows: Sequence[dict[str, Any]], bounded: bool) -> pd.DataFrame:
    heads = {task: ("mini-" if bounded else "") + load_task(task).column for task in TASKS}
    cells = []
    for row in rows:
        trained = row["percent"] != 0
        line = {"Method": row["name"], "r": None if pd.isna(row["rank"]) else str(row["rank"])}
        line["Rate"] = f"{row['learning_rate']:g}" if trained and pd.notna(row["learning_rate"]) else None
        line["#Params %"] = number(row["percent"], digits=2)
        line["Train, s"] = number(row["seconds"]) if trained else None
        line |= {head: number(row[task], row[f"{task}_sd"]) for task, head in heads.items()}
        line["Average"] = number(row["average"], row["average_sd"])
        if bounded:
            line["Normalised"] = number(row["normalised"], row["normalised_sd"])
        cells.append(line | {"NLL": number(row["nll"], row["nll_sd"], digits=3), "Seeds": str(row["seeds"])})
    if bounded:
        for bound in ("floor", "ceiling"):
            values = [_one([row[f"{task}_{bound}"] for row in rows]) for task in TASKS]
            line = {"Method": bound} | dict(zip(heads.values(), map(number, values), strict=True))
            cells.append(
                line | {"Average": number(float(np.mean(values))), "Normalised": number(100.0 * (bound != "floor"))}
            )
    return pd.DataFrame(cells)


def printed() -> Block:
    """The paper's table 2, and what table 7 prints of VL-BART with the norm in the graph."""
    rows = paper.claims(EXPERIMENT)
    rows = rows[(rows["kind"] == "number") & (rows["metric"].isin(("accuracy_percent", "cider", "mean")))]
    cells = []
    for (source, method, setting), part in rows.groupby(["source", "method", "setting"], sort=False):
        values = part.set_index("subject")["value"]
        if source == "Table 7" and setting != "norm in graph":  # the other one is table 2's
            continue
        line = {"Source": source, "Method": f"{method}, {setting}" if setting else method}
        line["#Params %"] = number(part["trainable_percent"].iloc[0], digits=2)
        heads = [*(load_task(task).column for task in TASKS), "average"]
        cells.append(line | {head.replace("average", "Average"): number(values.get(head)) for head in heads})
    return Block(title=PAPER, cells=pd.DataFrame(cells), text=("Source", "Method"), isnt=PRINTED)


if __name__ == "__main__":
    script(build, __doc__)
