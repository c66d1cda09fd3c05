"""Every experiment: documented, its specs valid and distinct, and what the issue says about the commonsense one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab.house import EXPERIMENTS
from dora_lab.launch.experiments import experiment_names, load_experiment
from dora_lab.spec import from_dict, spec_id, to_dict, validate
from dora_lab.tasks import load_task, table_1

HOUSE = Path(__file__).resolve().parents[1]
NAMES = experiment_names()


def test_there_are_experiments() -> None:
    assert {"commonsense", "commonsense_sweep"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_specs_are_valid(name: str) -> None:
    module = load_experiment(name)
    assert "dora-lab run" in (module.__doc__ or "")
    for tier in module.TIERS:
        specs = module.specs(tier)
        assert specs
        assert len({spec_id(spec) for spec in specs}) == len(specs)
        for spec in specs:
            validate(spec)
            assert spec.experiment == name and spec.tier == tier
            assert from_dict(to_dict(spec)) == spec
            for task in spec.data.tasks:
                load_task(task)


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name: str) -> None:
    for tier in load_experiment(name).TIERS:
        done = CliRunner().invoke(command.app, ["run", name, "--tier", tier, "--dry-run"])
        assert done.exit_code == 0, done.output
        assert "steps" in done.output


def test_an_experiment_that_takes_from_another_one_loads_from_anywhere(tmp_path: Path) -> None:
    copied = shutil.copy(EXPERIMENTS / "decomposition.py", tmp_path / "mine.py")
    code = (
        f"import sys; from pathlib import Path; from dora_lab.launch import experiments as e; "
        f"sys.path.remove({str(HOUSE)!r})\n"
        f"e.EXPERIMENTS = Path({str(tmp_path)!r}); print(len(e.load_experiment('mine').specs('mini')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=copied.parent, check=False,
        env={**os.environ, "PYTHONPATH": str(HOUSE)},
    )  # fmt: skip
    assert done.stdout.strip() == "125", done.stderr


def test_commonsense_mini_sweeps_every_cell_alike_and_looks_at_no_test_item() -> None:
    module = load_experiment("commonsense")
    specs = module.sweep()
    assert all(spec.data.tasks == tuple(task.name for task in table_1()) for spec in specs)
    tries = Counter((spec.method.name, spec.method.rank) for spec in specs)
    assert set(tries) == set(module.CELLS) and set(tries.values()) == {7 * 3}
    assert {spec.evaluation.split for spec in specs} == {"validation"}
    for cell in module.CELLS:
        grids = {
            seed: sorted(
                s.optim.learning_rate for s in specs if (s.method.name, s.method.rank, s.seed) == (*cell, seed)
            )
            for seed in module.SWEEP_SEEDS
        }
        assert len({tuple(grid) for grid in grids.values()}) == 1
        grid = next(iter(grids.values()))
        assert [after / before for before, after in pairwise(grid)] == pytest.approx([2.0] * 6)


def test_commonsense_mini_confirms_on_seeds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_experiment("commonsense")
    monkeypatch.setattr(module, "RATES", dict.fromkeys(module.CELLS, 0.01))
    specs = module.confirmation()
    runs = Counter((spec.method.name, spec.method.rank) for spec in specs)
    assert runs == {("base", None): 1, **dict.fromkeys(module.CELLS, 40)}
    assert {spec.seed for spec in specs} == set(range(40)) and not set(range(40)) & set(module.SWEEP_SEEDS)
    assert {(spec.evaluation.split, spec.evaluation.text, spec.data.name) for spec in specs} == {
        ("test", "pretraining", "mini2")
    }
    shown = Counter((spec.method.name, spec.method.rank) for spec in module.reproduced())
    assert shown == {("base", None): 1, ("ft", None): 3, ("lora", 8): 3, ("dora", 8): 3, ("dora", 4): 3}


def test_commonsense_earlier_runs_are_those_of_source_mini() -> None:
    specs = load_experiment("commonsense").earlier()
    runs = Counter((spec.method.name, spec.method.rank) for spec in specs)
    assert runs == {("base", None): 1, ("ft", None): 3, ("lora", 8): 3, ("dora", 8): 3, ("dora", 4): 3}
    assert {spec.data.name for spec in specs} == {"mini"} and {spec.seed for spec in specs} == {0, 1, 2}


def test_commonsense_paper_is_table_8() -> None:
    specs = load_experiment("commonsense").specs("paper")
    rates = {
        (spec.model.name.split("/")[1], spec.method.name, spec.method.rank): spec.optim.learning_rate
        for spec in specs
        if spec.optim
    }
    assert len(specs) == 36 and len(rates) == 12
    assert rates["llama-7b-hf", "dora", 32] == 1e-4 and rates["llama-7b-hf", "dora", 16] == 2e-4
    assert rates["llama-13b-hf", "dora", 32] == 2e-4 and rates["llama-13b-hf", "dora", 16] == 3e-4
    assert {rate for (_, method, _), rate in rates.items() if method == "lora"} == {3e-4}
    for spec in specs:
        assert spec.optim is not None and spec.method.rank is not None
        assert spec.method.alpha == 2 * spec.method.rank and spec.method.dropout == 0.05
        assert (spec.optim.batch_size, spec.optim.epochs, spec.optim.warmup_steps) == (16, 3.0, 100)
        assert spec.data.template == "published" and spec.data.train_on_prompt and spec.data.validation_items == 120
        assert spec.evaluation.num_beams == 4 and spec.optim.keep == "best_loss" and spec.optim.eval_steps == 80


def test_sweep_gives_every_method_the_same_number_of_tries_and_no_test_item() -> None:
    specs = load_experiment("commonsense_sweep").specs("mini")
    tries = Counter((spec.method.name, spec.method.rank) for spec in specs)
    assert len(set(tries.values())) == 1
    assert {spec.evaluation.split for spec in specs} == {"validation"}
    used = {spec.seed for spec in load_experiment("commonsense").earlier()}
    assert not used & {spec.seed for spec in specs}
