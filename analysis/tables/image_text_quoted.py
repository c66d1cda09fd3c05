"""What LoRA as quoted lacks on pictures: LoRA matched with one thing changed, between the two rows of `image_text`."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from analysis import frame, isnt, script
from analysis.vl_bart import MEANS, score_rows, shown
from dora_lab import report
from dora_lab.report import Block
from dora_lab.spec import Method
from experiments.image_text import CELLS, RATES, TASKS
from experiments.image_text_quoted import ROWS

EXPERIMENT, BESIDE = "image_text_quoted", "image_text"
NOTES = (
    MEANS,
    "The first and the last row are image_text's. Frozen: the weights of layer norms (biases are trained in all rows). "
    "Scale: alpha over rank; of LoRA matched 1.",
)


def build(results: Path) -> list[Path]:
    """Write results/tables/image_text_quoted.{md,csv,tex}; returns their paths, none where nothing was run."""
    evals = frame(results, EXPERIMENT)
    if not len(evals):
        return []
    both = pd.concat([evals, frame(results, BESIDE)])
    asked = both[(both["split"] == "test") & (both["data"] == "mini_vl")]
    first, last = ({name: (CELLS[name], RATES[name])} for name in ("LoRA, matched", "LoRA, quoted"))
    rows, used = [], []
    for name, (method, rate) in (first | ROWS | last).items():
        used.append(_of(asked, method, rate))
        rows += score_rows(used[-1], dict(zip(TASKS, TASKS, strict=True)), {name: method}, {})
    cells = shown(rows, TASKS, bounded=True).drop(columns="Train, s")  # beside other work, and halted for it
    block = Block(
        title="tier mini, model mini_vl, data mini_vl", cells=cells, notes=NOTES, isnt=isnt(["mini"]), wide=(*cells,)
    )
    source = report.provenance(pd.concat(used), evals.attrs["statuses"])
    title = "Image-text understanding: what LoRA as quoted lacks"
    return report.save_table(results / "tables", EXPERIMENT, title, [block], pd.DataFrame(rows), source)


def _of(evals: pd.DataFrame, method: Method, rate: float) -> pd.DataFrame:
    """The runs of a method as it is trained here: rows that differ by scale, or by what else is trained, are others."""
    trained = evals["method.also_train"] == json.dumps([*method.also_train])
    scaled = (evals["method"] == method.name) & (evals["method.alpha"] == method.alpha)
    return evals[
        trained & scaled & (evals["method.dropout"] == method.dropout) & (evals["optim.learning_rate"] == rate)
    ]


if __name__ == "__main__":
    script(build, __doc__)
