"""One run or folder looked at: card, diff, doctor, rescore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dora_lab.commands.app import LOCAL, ResultsOption, app, find_run, say
from dora_lab.io.atomic import write_text
from dora_lab.launch.select import published_specs
from dora_lab.runs.record import read_record
from dora_lab.spec import from_dict


@app.command("card")
def card_command(
    run: Annotated[str, typer.Argument(help="A run: its folder, or the beginning of its id.")],
    results: ResultsOption = LOCAL,
    out: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
) -> None:
    """Print the protocol card of a run: one page, from its record."""
    from dora_lab.report import card

    text = card.card(find_run(run, results))
    say(text if out is None else out)
    if out is not None:
        write_text(out, text)


@app.command("diff")
def diff_command(
    run: Annotated[str, typer.Argument(help="A run: its folder, or the beginning of its id.")],
    other: Annotated[str, typer.Argument(help="Another run, or `published` for the paper's protocol.")],
    results: ResultsOption = LOCAL,
) -> None:
    """Say in words how two runs, or a run and the published protocol, differ."""
    from dora_lab.report import card

    first = find_run(run, results)
    if other != "published":
        say(card.diff(first, find_run(other, results)))
    else:
        say(card.diff(first, card.nearest(from_dict(read_record(first)["spec"]), published_specs())))


@app.command()
def doctor(path: Annotated[Path, typer.Argument(help="A results folder, a run's, or a saved adapter's.")]) -> None:
    """Say what is wrong with records, streams, hashes, locks, checkpoints and claims, and how to mend it."""
    from dora_lab.paper.claims import examine as examine_claims
    from dora_lab.runs import doctor as examining

    findings = list(examining.examine(path))
    if (path / "runs").is_dir():
        findings += examine_claims()
    say(examining.report(findings))
    raise typer.Exit(1 if findings else 0)


@app.command()
def rescore(
    run: Annotated[Path, typer.Argument(help="Run directory, results/local/runs/<experiment>/<id>.")],
    pattern: Annotated[list[str] | None, typer.Option(help="REGEX or TASK=REGEX; its first match answers.")] = None,
) -> None:
    """Score a run's saved texts again with other patterns; writes <run>/rescored/, never over the record."""
    from dora_lab.evaluation import rescore as rescoring

    rows, file = rescoring.rescore(run, pattern or ())
    say(f"{rescoring.table(rows)}\n{file}")
