"""A run beside the others changes nothing about them: labels, verdicts and figures go by what a spec says."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from conftest import make_spec as conftest_spec
from conftest import write_run

from analysis import declared, frame
from dora_lab import paper, report
from dora_lab.launch.experiments import declared_specs, load_experiment
from dora_lab.launch.select import chosen
from dora_lab.spec import Spec, derive, to_dict

SKILL = {None: 0.6, 8: 0.55, 4: 0.5}
EARLIER = ModuleType("commonsense")  # 13 runs, of which every kind of neighbour can be made
EARLIER.TIERS, EARLIER.specs = ("mini",), lambda tier: load_experiment("commonsense").earlier()  # type: ignore[attr-defined]


def specs(*changes: str, only: Iterable[str] = ()) -> list[Spec]:
    return chosen(EARLIER, "mini", list(only), changes)


def tree(results: Path, runs: Iterable[Spec]) -> Path:
    for spec in runs:
        write_run(results, to_dict(spec), skill=SKILL.get(spec.method.rank, 0.9))
    return results


def labels(results: Path) -> dict[str, int]:
    """Label -> number of runs."""
    found = frame(results, "commonsense", "record")
    return found.groupby("label")["spec_id"].nunique().to_dict()


def verdicts(results: Path) -> pd.DataFrame:
    evals, probes = (frame(results, "commonsense", stream) for stream in ("eval", "probe"))
    return paper.verdicts(evals, probes, paper.claims("commonsense"))


PLAIN = {"Base": 1, "FT": 3, "LoRA": 3, "DoRA": 3, "DoRA†": 3}
BESIDE: dict[str, tuple[list[str], list[str], dict[str, int]]] = {
    # name: --only, --with, the labels that it adds
    "the README's own example": (["method.name=dora", "rank=8"], ["method.rank=16"], {"DoRA r=16": 3}),
    "one seed of it": (["method.name=dora", "rank=8", "seed=0"], ["method.rank=16"], {"DoRA r=16": 1}),
    "another learning rate": (
        ["method.name=dora", "rank=8", "seed=0"],
        ["optim.learning_rate=0.5"],
        {"DoRA (optim.learning_rate=0.5)": 1},
    ),
    "fewer items": (["method.name=lora"], ["data.train_items=96"], {"LoRA (data.train_items=96)": 3}),
    "a third rank of LoRA": (["method.name=lora", "seed=1"], ["method.rank=2"], {"LoRA r=2": 1}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_run_beside_the_default_changes_no_label_and_no_verdict(name: str, tmp_path: Path) -> None:
    """The oracle is the tree without it."""
    only, changes, more = BESIDE[name]
    alone = tree(tmp_path / "alone", specs())
    assert labels(alone) == PLAIN
    both = tree(tmp_path / "both", [*specs(), *specs(*changes, only=only)])
    assert labels(both) == PLAIN | more
    before, after = verdicts(alone), verdicts(both)
    found, again = (table.to_dict("records") for table in (before, after))
    decided = [i for i, row in enumerate(found) if row["verdict"] != "no runs"]
    assert len(decided) >= 8 and len(found) == len(again)
    assert [repr(found[i]) for i in decided] == [repr(again[i]) for i in decided]


def test_without_the_experiment_it_was_lost(tmp_path: Path) -> None:
    """What `declared` is for: among each other alone, a third rank renames the others."""
    results = tree(tmp_path, [*specs(), *specs("method.rank=16", only=["method.name=dora", "rank=8", "seed=0"])])
    assert "DoRA r=8" in set(report.frame(results, "commonsense")["label"])


def test_half_the_rank_alone_is_still_half_the_rank(tmp_path: Path) -> None:
    assert labels(tree(tmp_path, specs(only=["rank=4"]))) == {"DoRA†": 3}


@pytest.mark.parametrize("change", ["data.train_items=96", "optim.epochs=2", "model.revision=abc", "data.test_items=7"])
def test_a_whole_experiment_changed_alike_keeps_its_names(change: str, tmp_path: Path) -> None:
    results = tree(tmp_path, [*specs(change), *specs(change, "method.rank=16", only=["method.name=dora", "rank=8"])])
    assert labels(results) == PLAIN | {"DoRA r=16": 3}


def test_other_data_keeps_the_names(tmp_path: Path) -> None:
    there: list[dict[str, Any]] = [{"data.name": "llm_adapters", "data.sha256": "0" * 64}]
    assert labels(tree(tmp_path, [derive(spec, there[0]) for spec in specs()])) == PLAIN


def test_commands_call_runs_by_the_specs_that_scripts_do() -> None:
    assert set(declared_specs()) == set(declared()) >= set(load_experiment("commonsense").earlier())


def test_the_specs_of_all_experiments_are_known() -> None:
    assert len({(spec.experiment, spec.tier) for spec in declared()}) >= 5


def test_no_two_lines_of_a_figure_look_alike() -> None:
    """Twenty labels: each its marker and line; a variant has its method's colour, a method its own look."""
    variants = [f"{name} r={rank}" for name in ("LoRA", "DoRA") for rank in (2, 4, 8, 16, 32, 64, 128)]
    asked = ["Base", "FT", "LoRA", "DoRA", "DoRA†", *variants, "something else"]
    looks = report.styles(asked)
    assert list(looks) == asked
    assert len({(look.marker, look.line) for look in looks.values()}) == len(asked)
    for label in variants:
        assert looks[label].colour == looks[label.split()[0]].colour
    assert looks["DoRA"] == report.style("DoRA") and looks["DoRA†"] == report.style("DoRA†")
    few = report.styles(["DoRA r=8", "DoRA r=4", "DoRA r=2"]).values()
    assert len({look.marker for look in few}) == len({look.line for look in few}) == 3


def test_figures_draw_every_variant_in_its_own_way(tmp_path: Path) -> None:
    for rank in (2, 4, 8):
        write_run(tmp_path, conftest_spec("dora", rank, 0))
    probes = report.frame(tmp_path, "commonsense", "probe")
    for figure, _ in (report.over_layers(probes), report.over_training(probes)):
        lines = [line for line in figure.axes[0].get_lines() if line.get_marker() not in ("", "None", None, "|", "_")]
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines if line.get_linestyle() != "None"}) == 3


def test_what_sets_rows_apart_is_printed(tmp_path: Path) -> None:
    """The oracle is the experiment's own table of learning rates and its sweep."""
    from analysis.tables import commonsense
    from analysis.tables import verdicts as of_claims

    results = tree(tmp_path, [*specs(), *load_experiment("commonsense_sweep").specs("mini")])
    commonsense.build(results)
    of_claims.build(results)
    rates = import_module("experiments._mini").MINI["learning_rate"]
    said = ", ".join(
        f"{label} {rates[key]:g}"
        for label, key in {"FT": ("ft", None), "LoRA": ("lora", 8), "DoRA": ("dora", 8), "DoRA†": ("dora", 4)}.items()
    )
    for name in ("commonsense", "verdicts"):
        text = " ".join((results / "tables" / f"{name}.md").read_text(encoding="utf-8").split())
        assert f"peak learning rate: {said} (the highest of the 5 tried)." in text
        assert "alpha: LoRA 16, DoRA 16, DoRA† 8" in text


def test_nothing_is_said_of_rows_that_differ_in_method_alone(tmp_path: Path) -> None:
    for name in ("lora", "dora"):
        write_run(tmp_path, conftest_spec(name, 8, 0))
    runs = report.frame(tmp_path)
    assert report.sets_apart(runs, runs) is None


def test_seeds_without_a_probe_are_seeds_of_their_cell(tmp_path: Path) -> None:
    runs = load_experiment("small").confirmation(seeds=(0, 5))  # rows of the first five are kept
    assert len({spec.probe for spec in runs if spec.method.name == "lora"}) == 2
    found = frame(tree(tmp_path, runs), "small", "record").groupby("label")["spec_id"].nunique()
    assert found.to_dict() == {"Base": 1, "FT": 2, "LoRA": 2, "DoRA": 2, "DoRA†": 2}


def test_one_seed_with_two_probes_is_two_rows(tmp_path: Path) -> None:
    first, *_ = specs(only=["method.name=lora"])
    again = derive(first, {"probe.fractions": (1.0,)})
    assert len(labels(tree(tmp_path, [first, again]))) == 2
