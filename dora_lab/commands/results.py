"""What runs add up to: report, reproduce."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dora_lab.commands.app import (
    LOCAL,
    RESULTS,
    ReadOption,
    ResultsOption,
    app,
    examples,
    progress_bar,
    say,
)
from dora_lab.commands.judge import told_apart
from dora_lab.commands.run import tell
from dora_lab.house import ANALYSIS, HOUSE, INSTALLED
from dora_lab.launch.experiments import experiment_name, experiment_names, house_first, load_experiment
from dora_lab.launch.pool import run_many
from dora_lab.launch.runtime import Paths
from dora_lab.launch.select import chosen
from dora_lab.runs.survey import survey
from dora_lab.spec import Spec, SpecError, spec_id

README = HOUSE / "README.md"
ALL = "all"


@app.command(epilog=examples("report --results results/local", "report"))
def report(results: ReadOption = LOCAL if INSTALLED else RESULTS) -> None:
    """Rebuild every table and figure of a results folder from its runs (and, of the committed one, the README's)."""
    ours = f"copy the records that come with dora-lab (`cp -r {RESULTS} committed`) and `report --results committed`"
    if INSTALLED and results.resolve() == RESULTS.resolve():
        raise SpecError(f"{results} is part of the installed package, where nothing is written: {ours}")
    if not any((results / name).is_dir() for name in ("runs", "bench")):
        raise SpecError(f"{results} has no runs yet: `dora-lab run EXPERIMENT` makes some; or {ours}")
    if not rebuild(results, say):
        raise typer.Exit(1)


def rebuild(results: Path, written: Callable[[Path], object] = lambda path: None) -> bool:
    """Run every script of analysis/ on a results folder; `written` hears of each file.

    What a script refuses keeps it alone from being built, and a run that `survey` refuses is in none: both are said on
    stderr. Returns whether every table and figure was built.
    """
    from dora_lab.report import readme_block

    whole = True
    for lost in survey(results).left_out:
        say(f"left out: {lost.why}", err=True)

    if not ANALYSIS.is_dir():
        raise SpecError(f"{ANALYSIS} is not there: install dora-lab's wheel, or work in a clone of it")
    house_first()
    committed = results.resolve() == RESULTS.resolve()
    names = importlib.import_module("analysis").modules()
    with progress_bar("tables and figures", len(names)) as bar:
        for name in names:
            bar.set_postfix_str(name.rpartition(".")[2])
            script = importlib.import_module(name)
            try:
                for path in script.build(results):
                    written(path)
                if committed and hasattr(script, "readme") and readme_block(README, script.readme(results)):
                    written(README)
            except (ValueError, OSError) as error:
                whole = False
                say(f"not built, its files stay as they were: {name.replace('.', '/')}.py: {error}", err=True)
            bar.update()
    return whole


def _named_or_all(text: str) -> str:
    return text if text == ALL else experiment_name(text)


@app.command(epilog=examples("reproduce commonsense --quick", "reproduce all --jobs 2"))
def reproduce(
    experiment: Annotated[
        str,
        typer.Argument(
            help="An experiment, see `dora-lab list`, or all that have a mini tier.",
            callback=_named_or_all,
            autocompletion=lambda: [*experiment_names(), ALL],
        ),
    ],
    results: ResultsOption = LOCAL,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one per core.")] = None,
    quick: Annotated[bool, typer.Option("--quick", envvar="QUICK", help="One seed of each setting.")] = False,
) -> None:
    """Run the mini tier, rebuild tables and figures, print the table and compare with the committed runs."""
    names = [experiment]
    if experiment == ALL:
        names = [name for name in experiment_names() if "mini" in load_experiment(name).TIERS]
    specs = {name: _reproduced(name, quick) for name in names}
    say(announced(specs))
    for of_name in specs.values():
        tell(run_many(of_name, Paths(results), jobs=jobs), results)
    rebuild(results)
    for name, of_name in specs.items():
        table = results / "tables" / f"{name}.md"
        if table.exists():
            say(f"\n{table.read_text(encoding='utf-8')}")
        # a difference is told, not failed on: another processor may round its way to another answer
        told_apart(results, RESULTS, name, only={spec_id(spec) for spec in of_name})
    say(f"\ntables and figures: {results / 'tables'}, {results / 'figures'}")


def _reproduced(experiment: str, quick: bool) -> list[Spec]:
    """What is run of an experiment."""
    module = load_experiment(experiment)
    if quick and hasattr(module, "quick"):
        return module.quick()
    specs = module.reproduced() if hasattr(module, "reproduced") else chosen(module, "mini")
    if not quick:
        return specs
    lowest_last = sorted(specs, key=lambda spec: -spec.seed)
    return list({replace(spec, seed=0): spec for spec in lowest_last}.values())


def announced(specs: Mapping[str, Sequence[Spec]], committed: Path = RESULTS) -> str:
    """How many runs of each experiment, and how long one core takes for them by the time of the committed ones.

    A run that is not among these is taken to last as long as the mean of its experiment's.
    """
    number = sum(map(len, specs.values()))
    seconds, unknown = 0.0, 0
    for name, of_name in specs.items():
        took = {path.name: sum(record["seconds"].values()) for path, record in survey(committed, name).runs}
        known = [took[spec_id(spec)] for spec in of_name if spec_id(spec) in took]
        mean = sum(known or took.values()) / len(known or took) if took else 0.0
        seconds += sum(known) + mean * (len(of_name) - len(known))
        unknown += 0 if took else len(of_name)
    parts = ", ".join(f"{name} {len(of_name)}" for name, of_name in specs.items()) if len(specs) > 1 else ""
    lasts = f"some {seconds / 60:.0f} minutes" if seconds < 7200 else f"some {seconds / 3600:.0f} hours"
    said = f"{number} runs{f' ({parts})' if parts else ''}: {lasts} of one core, as the committed ones took"
    return said + (f"; how long {unknown} of them last is not known" if unknown else "")
