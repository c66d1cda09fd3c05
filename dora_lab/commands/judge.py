"""Runs against what the paper says, and against the committed ones: verify, compare."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
# pandas ships no stubs: read from its source, a row of itertuples is a plain tuple, a group's key any hashable

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dora_lab.commands.app import (
    LOCAL,
    RESULTS,
    ReadOption,
    app,
    examples,
    experiment_names,
    progress_bar,
    results_folder,
    say,
)
from dora_lab.commands.show import Format, FormatOption, show
from dora_lab.launch.experiments import declared_specs, experiment_name, published_specs
from dora_lab.runs.survey import survey

if TYPE_CHECKING:
    import pandas as pd

AnyExperiment = Annotated[
    str | None,
    typer.Argument(help="One experiment; all without it.", autocompletion=experiment_names, show_default=False),
]


@app.command(epilog=examples("verify commonsense", "verify --results results/local --format csv > verdicts.csv"))
def verify(
    experiment: AnyExperiment = None,
    results: ReadOption = RESULTS,
    form: FormatOption = Format.text,
) -> None:
    """Print the verdict on each claim of the paper that the runs can speak about, and on the numbers it prints."""
    import pandas as pd

    from dora_lab import paper as verifying
    from dora_lab import report

    about = sorted(verifying.claims()["experiment"].unique())
    if experiment is not None:
        experiment = experiment_name(experiment, {*experiment_names(), *about})
    with progress_bar("reading runs", total=3, unit="stream") as bar:
        for lost in survey(results, experiment).left_out:
            say(f"left out: {lost.why}", err=True)
        bar.update()
        declared = declared_specs()
        evals = report.frame(results, experiment, "eval", declared)
        bar.update()
        probes = report.frame(results, experiment, "probe", declared)
        bar.update()
    found = verifying.verdicts(evals, probes, verifying.claims(experiment))
    counts, ran = verifying.summary(verifying.cells(results, verifying.claims(), published_specs()), experiment)
    groups = found.groupby(["tier", "model", "data"], sort=False, dropna=False) if len(found) else ()
    views = [(", ".join(map(str, key)) if pd.notna(key[0]) else "no runs", _claims(rows)) for key, rows in groups]
    views += [("Numbers that the paper prints, against runs of tier paper", counts), ("Those with runs", _cells(ran))]
    nothing = f"No claim and no number of the paper is about {experiment}; they are about {', '.join(about)}."
    some = len(found) or len(counts)
    show({"claims": found, "numbers": counts, "cells": ran}, views, form, () if some else (nothing,))


def _claims(rows: pd.DataFrame) -> pd.DataFrame:
    """The claims of a group of runs in the columns that a person needs; all there are: --format csv."""
    import pandas as pd

    from dora_lab.report.block import interval, p_text

    intervals = [interval(row.low, row.high, digits=2) for row in rows.itertuples()]
    return pd.DataFrame(
        {
            "claim": rows["statement"],
            "protocol": rows["protocol"].str.replace(" = ", " =\n"),
            "effect": [_two(value) for value in rows["effect"]],
            "95 %": intervals,
            "in": rows["unit"].replace("points", "pt"),
            "seeds": rows["seeds"],
            "p": [p_text(value) for value in rows["p_adjusted"]],
            "paper": [_two(value) for value in rows["paper"]],
            "verdict": rows["verdict"],
        }
    )


def _cells(ran: pd.DataFrame) -> pd.DataFrame:
    """The printed numbers with runs of ours beside them, and how those runs were flagged."""
    import pandas as pd

    from dora_lab.report.block import number

    ours = [number(row.mean, row.sd) for row in ran.itertuples()]
    columns = {"table": ran["source"], "model": ran["model"], "method": ran["method"], "rank": ran["rank"]}
    columns |= {"number": ran["subject"], "paper": ran["paper"], "ours": ours, "runs": ran["n"]}
    return pd.DataFrame(columns | {"verdict": ran["verdict"], "flags": ran["flags"]})


@app.command(epilog=examples("compare", "compare commonsense --tasks --format md"))
def compare(
    experiment: AnyExperiment = None,
    results: ReadOption = LOCAL,
    committed: Annotated[Path, typer.Option(help="Results folder to compare with.", callback=results_folder)] = RESULTS,
    tasks: Annotated[bool, typer.Option("--tasks", help="Accuracies by task, yours beside the committed.")] = False,
    form: FormatOption = Format.text,
) -> None:
    """Say whether your runs agree with the committed ones; exit code 1 if they do not."""
    raise typer.Exit(0 if told_apart(results, committed, experiment, form, tasks) else 1)


def told_apart(
    results: Path,
    committed: Path,
    experiment: str | None,
    form: Format = Format.text,
    tasks: bool = False,
    only: Container[str] | None = None,
) -> bool:
    """Print how a user's runs (of spec ids `only`) agree with the committed ones, a table per setting; whether they do.

    Args and what raises: as of `paper.compare`.
    """
    import pandas as pd

    from dora_lab import paper as verifying

    if experiment is not None:
        there = {path.name for root in (results, committed) for path in (root / "runs").glob("*")}
        experiment = experiment_name(experiment, {*experiment_names(), *there})
    with progress_bar("reading runs", total=verifying.STEPS, unit="step") as bar:
        found = verifying.compare(results, committed, experiment, only, bar.update)
    for why in found.left_out:
        say(f"left out: {why}", err=True)
    rows, beside = pd.DataFrame(found.rows), pd.DataFrame(found.beside)
    groups = rows.groupby("setting", sort=False) if len(rows) else ()
    views = [(str(setting), _compared(group)) for setting, group in groups]
    if tasks and len(beside):
        groups = beside.groupby(["setting", "protocol"], sort=False)
        views += [(f"{setting}, protocol {protocol}", _percent(rows)) for (setting, protocol), rows in groups]
    show({"compare": rows} | ({"tasks": beside} if tasks else {}), views, form, found.notes)
    if form in (Format.json, Format.csv) and found.notes:
        say(found.notes[-1], err=True)
    return found.agrees


def _compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Your runs and the committed ones side by side; below a method, in its last column, what keeps runs apart."""
    import pandas as pd

    shown = ("local", "committed", "tolerance")
    percent = {name: [None if pd.isna(value) else _two(100 * value) for value in rows[name]] for name in shown}
    return pd.DataFrame(
        {
            "method": rows["method"],
            "protocol": rows["protocol"],
            "runs": [f"{row.runs}/{row.of}" for row in rows.itertuples()],
            "yours": percent["local"],
            "committed": percent["committed"],
            "tolerance": percent["tolerance"],
            "flipped": [None if pd.isna(value) else f"{value:.0f}" for value in rows["flipped"]],
            "agreement": [_agreement(row) for row in rows.to_dict("records")],
        }
    )


def _percent(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of one setting and protocol, accuracies in percent."""
    from dora_lab.report.block import number

    names = [name for name in rows if name not in ("setting", "protocol", "method", "whose", "runs")]
    scores = {name: [number(100 * value) for value in rows[name]] for name in names if rows[name].notna().any()}
    scores["average"] = scores.pop("average")  # last, whichever tasks the first line had
    return rows[["method", "whose", "runs"]].assign(**scores)


def _agreement(row: dict[str, Any]) -> str:
    from dora_lab.paper.compare import MISSING

    said = row["agreement"]
    if said == MISSING:
        there = f"; the others: {row['others']}" if row["runs"] else ""
        said += f" ({row['of'] - row['runs']} of {row['of']}{there})"
    more = len(row["why"]) - 3
    return "\n".join([said, *row["why"][:3], *([f"and {more} more"] if more > 0 else [])])


def _two(value: float) -> str | None:
    from dora_lab.report.block import number

    return number(value, digits=2)
