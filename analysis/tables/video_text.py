"""Table 3: VL-BART's scores on VALUE's validation items, and the paper's, of its test items, as a block of its own.

Tier mini has two of the tasks, about the embedded world of clips, with what can be reached on it.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import frame, isnt, script
from analysis.vl_bart import MEANS, printed, score_rows, seconds_of, shown
from dora_lab import report
from dora_lab.report import Block, number
from dora_lab.spec import Method
from experiments.video_text import ASKED, CELLS, MINI_ASKED, MINI_CELLS, TASKS

EXPERIMENT, EMBEDDED, BLIND = "video_text", "mini_clips", "mini_clips_blind"
PAPER = "The paper's table 3 (arXiv 2402.09353 v6; VL-BART, VALUE's test items, single runs)"
NOTES = (
    MEANS,
    "val: VALUE's validation items; the paper's numbers are of its test items, whose server is shut, and no verdict "
    "compares the two.",
    "Cut: of all texts, those that lost their ends to a cutoff; question cut: words of what is asked among them. "
    "Unparsed: of all questions, answers that are no label.",
    "LoRA, quoted: scale 1/4, dropout, batch 50, as in the runs that the paper quotes. LoRA, matched: all as DoRA has "
    "it.",
)
BOUNDED = (
    "Two tasks, of which Average is the mean. val: the files in which VALUE has validation items; rates were chosen by "
    "items about other clips. TVQA cloze: the question alone is asked, without the list of answers that the paper's "
    "model reads, and the words of the answer are to be given.",
    "Normalised: mean over tasks of (score - floor) / (ceiling - floor), in percent. Floor: what "
    "training clips have most often as answer to the same question, one caption for all. Ceiling: the "
    "truth; of captions one person's, against the other three, which a model that says what most would say can pass. "
    "Blind: FT whose features are all zero, in training and test.",
    "Unparsed: of all questions, answers that are none of the five. LoRA, matched: all as DoRA has it; layer norms are "
    "frozen. Train, s: beside other work, it is no speed.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/video_text.{md,csv,tex}; returns their paths, none where nothing was run."""
    evals = frame(results, EXPERIMENT)
    tested = evals[evals["split"] == "test"] if len(evals) else evals
    if not len(tested):
        return []
    seconds = seconds_of(frame(results, EXPERIMENT, "record"))
    blocks, data = [], []
    for (tier, model, name), part in tested.groupby(["tier", "model", "data"], sort=True):
        if name == BLIND and (tested["data"] == EMBEDDED).any():
            continue
        embedded = name in (EMBEDDED, BLIND)
        asked, methods = (MINI_ASKED, MINI_CELLS) if embedded else (ASKED, CELLS)
        rows = _rows(part, asked, methods, seconds)
        if name == EMBEDDED:
            blind = _rows(tested[tested["data"] == BLIND], asked, methods, seconds)
            rows += [row | {"name": f"Blind {row['name']}"} for row in blind]
        if not rows:
            continue
        data += [{"tier": tier, "model": model, "data": name} | row for row in rows]
        cells = shown(rows, asked, embedded)
        for head, key in (("Cut %", "cut"), ("Question cut %", "question_cut"), ("Unparsed %", "unparsed")):
            if key == "unparsed" or not embedded:  # there is no cutoff
                told = [number(row[key], digits=1) for row in rows]
                cells[head] = told + [None] * (len(cells) - len(rows))  # floor and ceiling stand below
        notes = (MEANS, *BOUNDED) if embedded else NOTES
        title = f"tier {tier}, model {model}, data {name}"
        blocks.append(Block(title=title, cells=cells, notes=notes, isnt=isnt([tier]), wide=(*cells,)))
    source = report.provenance(tested, evals.attrs["statuses"])
    title = "Video-text understanding: scores on four tasks"
    blocks = [*blocks, printed(EXPERIMENT, TASKS, PAPER)]
    return report.save_table(results / "tables", EXPERIMENT, title, blocks, pd.DataFrame(data), source)


def _rows(
    evals: pd.DataFrame, asked: Sequence[str], methods: Mapping[str, Method], seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    rows = score_rows(evals, dict(zip(asked, asked, strict=True)), methods, seconds)
    return [row | _lost(evals[evals["label"] == row["label"]]) for row in rows]


def _lost(evals: pd.DataFrame) -> dict[str, float]:
    """Percent of the texts that were cut, and in their question too, and of the questions without a readable answer."""
    asked = evals[evals["metric"] == "accuracy"]
    texts = {"cut": "n_shortened", "question_cut": "n_questions_cut"}
    found = {key: 100 * float(evals[column].sum() / evals["n"].sum()) for key, column in texts.items()}
    return found | {"unparsed": 100 * float(asked["n_unparsed"].sum() / asked["n"].sum())}


if __name__ == "__main__":
    script(build, __doc__)
