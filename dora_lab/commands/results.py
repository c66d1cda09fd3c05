"""What runs add up to: report, verify, compare, reproduce."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dora_lab.commands.app import HOUSE, LOCAL, README, RESULTS, ResultsOption, app, say
from dora_lab.commands.run import summary
from dora_lab.launch.pool import run_many
from dora_lab.launch.runtime import Paths
from dora_lab.launch.select import all_specs, chosen, experiment_names, load_experiment, published_specs
from dora_lab.runs.survey import survey
from dora_lab.spec import SpecError, did_you_mean


@app.command()
def report(results: ResultsOption = RESULTS) -> None:
    """Rebuild every table and figure of a results folder from its runs (and, of the committed one, the README's)."""
    if not any((results / name).is_dir() for name in ("runs", "bench")):
        raise SpecError(f"--results {results}: neither runs/ nor bench/ is there, so there is nothing to report")
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

    if str(HOUSE) not in sys.path:  # the scripts are part of the repository, not of the installed package
        sys.path.insert(0, str(HOUSE))
    for kind in ("tables", "figures"):
        for file in sorted((HOUSE / "analysis" / kind).glob("[!_]*.py")):
            script = importlib.import_module(f"analysis.{kind}.{file.stem}")
            committed = results.resolve() == RESULTS.resolve()
            try:
                for path in script.build(results):
                    written(path)
                if committed and hasattr(script, "readme") and readme_block(README, script.readme(results)):
                    written(README)
            except (ValueError, OSError) as error:
                whole = False
                say(f"not built, its files stay as they were: {file.relative_to(HOUSE)}: {error}", err=True)
    return whole


@app.command()
def verify(
    experiment: Annotated[str | None, typer.Argument(help="One experiment; all without it.")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Print the verdict on each claim of the paper that the runs can speak about, and on the numbers it prints."""
    from dora_lab import paper as verifying
    from dora_lab import report

    rows = verifying.claims(experiment)
    if experiment is not None and not len(rows) and experiment not in experiment_names():
        known = sorted({*experiment_names(), *verifying.claims()["experiment"]})
        raise SpecError(f"unknown experiment '{experiment}'; {did_you_mean(experiment, known)}")
    if not (results / "runs").is_dir():
        raise SpecError(f"--results {results}: no runs/ is there, so there is nothing to verify")
    for lost in survey(results, experiment).left_out:
        say(f"left out: {lost.why}", err=True)
    declared = [spec for name in experiment_names() for spec in all_specs(name)]
    evals, probes = (report.frame(results, experiment, stream, declared) for stream in ("eval", "probe"))
    found = verifying.verdicts(evals, probes, rows)
    nothing = f"no claim of the paper is about {experiment or 'these runs'}"
    say(found.to_string(index=False) if len(found) else nothing)
    cells = verifying.cells(results, verifying.claims(), published_specs())
    say("\n" + verifying.summary(cells, experiment))


@app.command()
def compare(
    results: ResultsOption = LOCAL,
    committed: Annotated[Path, typer.Option(help="Results folder to compare with.")] = RESULTS,
    experiment: Annotated[str | None, typer.Option(help="One experiment; all without it.")] = None,
) -> None:
    """Say whether your runs agree with the committed ones; exit code 1 if they do not."""
    from dora_lab import paper as verifying

    text, agrees = verifying.compare(results, committed, experiment)
    say(text)
    raise typer.Exit(0 if agrees else 1)


@app.command()
def reproduce(
    experiment: Annotated[str, typer.Argument(help="An experiment, see `dora-lab list`.")],
    results: ResultsOption = LOCAL,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: one per core.")] = None,
) -> None:
    """Run the mini tier, rebuild tables and figures, print the table and compare with the committed runs."""
    module = load_experiment(experiment)
    specs = module.reproduced() if hasattr(module, "reproduced") else chosen(module, "mini")
    outcomes = run_many(specs, Paths(results), jobs=jobs)
    say(summary(outcomes, results))
    if any(outcome.status in ("failed", "interrupted") for outcome in outcomes):
        raise typer.Exit(1 if any(outcome.status == "failed" for outcome in outcomes) else 130)
    rebuild(results)
    table = results / "tables" / f"{experiment}.md"
    if table.exists():
        say(f"\n{table.read_text(encoding='utf-8')}")
    from dora_lab import paper as verifying

    # a difference is told, not failed on: another processor may round its way to another answer
    text, _ = verifying.compare(results, RESULTS, experiment)
    say(f"{text}\n\ntables and figures: {results / 'tables'}, {results / 'figures'}")
