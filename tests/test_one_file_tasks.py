"""One file each: in a copy of the house a task, an experiment, a table and a figure of one's own, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import boolq_items

HOUSE = Path(__file__).resolve().parents[1]
OWN = {
    "dora_lab/tasks/commonsense/colour.py": '''
"""Colour: which of two a thing has. The paper has no such column, the embedded world no such items."""

from dora_lab.tasks.task import Task

TASK = Task(name="colour", column="Colour", labels=("red", "blue"), chance=1 / 2)
''',
    "experiments/commonsense_own.py": '''
"""What the base knows of colours.

    dora-lab run commonsense_own --data-dir FOLDER
"""

from dora_lab.spec import Data, Evaluation, Method, Model, Spec

TIERS = ("mini",)


def specs(tier: str) -> list[Spec]:
    return [
        Spec(
            experiment="commonsense_own",
            tier="mini",
            seed=0,
            model=Model(name="mini"),
            data=Data(name="llm_adapters", tasks=("boolq", "colour")),
            method=Method(name="base"),
            optim=None,
            probe=None,
            evaluation=Evaluation(protocols=("generate", "loglikelihood"), max_new_tokens=8),
        )
    ]
''',
    "analysis/tables/own.py": '''
"""How many items each task has."""

from pathlib import Path

import pandas as pd

from dora_lab import report


def build(results: Path) -> list[Path]:
    evals = report.frame(results, stream="eval")
    cells = pd.DataFrame({"Task": evals["task"], "Items": evals["n"].astype(str)}).drop_duplicates()
    block = report.Block(title="Items", cells=cells)
    source = report.provenance(evals, evals.attrs["statuses"])
    return report.save_table(results / "tables", "own", "Items", [block], cells, source)
''',
    "analysis/figures/own.py": '''
"""The scores, as bars."""

from pathlib import Path

from dora_lab import report


def build(results: Path) -> list[Path]:
    evals = report.frame(results, stream="eval")
    figure, axes = report.new_figure(1, 1, width=4.0, height=3.0)
    axes[0, 0].bar(evals["task"] + " " + evals["protocol"], evals["value"])
    return report.save_figure(figure, results / "figures", "own", report.provenance(evals, evals.attrs["statuses"]))
''',
}
CLAIM = (
    "commonsense_own,number,,Table 0,LLaMA-13B,LoRA,,,4,,Colour,accuracy_percent,=,50.0,,a table,yes\n"
    "commonsense_own,number,,Table 0,LLaMA-13B,LoRA,,,4,,average,accuracy_percent,=,50.0,,a table,yes\n"
)
# what speaks of tasks, experiments and claims in general holds for these too
TESTS = ["test_tasks", "test_cells", "test_verify", "test_experiments", "test_lm_eval_tasks", "test_builtin"]
SLOW = "not item_by_item and not command_line and not dry_run and not numbers_are and not before_training"


def colour_items(count: int) -> list[dict[str, str]]:
    answers = ["red" if n % 3 else "blue" for n in range(count)]
    return [
        {"instruction": f"Please say the colour of thing {n}.\n\nAnswer format: red/blue", "input": "",
         "output": f"the correct answer is {answer}", "answer": answer}
        for n, answer in enumerate(answers)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the house with a file of each kind more, and two rows of claims."""
    root = tmp_path_factory.mktemp("house")
    for name in ("dora_lab", "experiments", "analysis", "tests"):
        shutil.copytree(HOUSE / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HOUSE / "pyproject.toml", root)
    for name, text in OWN.items():
        (root / name).write_text(text.lstrip(), encoding="utf-8")
    with (root / "experiments" / "claims.csv").open("a", encoding="utf-8") as file:
        file.write(CLAIM)
    python(root, "-m", "dora_lab.tasks.commonsense.lm_eval.write")
    assert python(root, "-c", "import dora_lab; print(dora_lab.__file__)").startswith(str(root))
    return root


def python(house: Path, *arguments: str) -> str:
    """Standard output of a Python that has the copy's packages, not ours."""
    environment = os.environ | {"PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=house, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def lab(house: Path, *arguments: str) -> str:
    return python(house, "-m", "dora_lab", *arguments)


def test_an_experiment_on_a_task_of_ones_own_with_a_table_and_a_figure(house: Path, tmp_path: Path) -> None:
    for name, items in {"boolq": boolq_items(5), "colour": colour_items(6)}.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.json").write_text(json.dumps(items))
    data, results = ("--data-dir", str(tmp_path / "data")), ("--results", str(tmp_path / "results"))
    assert "commonsense_own,What the base knows of colours.,1," in lab(house, "list", "--format", "csv")
    planned = lab(house, "run", "commonsense_own", *data, "--dry-run")
    assert "1 of them have no estimate" in planned  # nobody has published how many items there are
    assert "estimate, not a measurement" in lab(
        house, "run", "commonsense_own", "--with", "data.test_items=6", "--dry-run"
    )
    assert "complete" in lab(house, "run", "commonsense_own", *data, *results, "--jobs", "1")
    written = {
        Path(line).relative_to(tmp_path / "results").as_posix() for line in lab(house, "report", *results).split()
    }
    assert {"tables/own.md", "figures/own.png", "tables/commonsense.md"} <= written
    assert "| colour | 6 |" in (tmp_path / "results/tables/own.md").read_text(encoding="utf-8")
    _, head, *_ = [
        line for line in (tmp_path / "results/tables/commonsense.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| Method")
    ]  # fmt: skip
    assert head == "| Method | BoolQ | Colour |"
    cells = lab(house, "verify", "commonsense_own", *results)
    assert re.search(r"^Table 0 +(0 +){5}2 +0$", cells, re.M)  # two cells, not run, no flag
    (run,) = (tmp_path / "results" / "runs" / "commonsense_own").iterdir()
    assert "colour `red|blue`" in lab(house, "card", str(run))
    assert "colour" in lab(house, "rescore", str(run), "--pattern", "colour=(?i)blue|red")


def test_the_tests_of_the_house_hold_with_them(house: Path) -> None:
    found = python(
        house, "-m", "pytest", "-o", "addopts=", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", SLOW,
        *(f"tests/{name}.py" for name in TESTS),
    )  # fmt: skip
    passed = re.search(r"^(\d+) passed", found, re.M)
    assert passed and int(passed[1]) > 80, found
