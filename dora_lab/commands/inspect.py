"""One run or folder looked at: card, diff, doctor, rescore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dora_lab.commands.app import LOCAL, ResultsOption, app, find_run, say
from dora_lab.io.atomic import write_text
from dora_lab.launch.select import published_specs
from dora_lab.runs import packs
from dora_lab.runs.record import read_record
from dora_lab.runs.survey import survey, verified
from dora_lab.spec import SpecError, did_you_mean, from_dict


@app.command("card")
def card_command(
    run: Annotated[str, typer.Argument(help="A run: its folder, or the beginning of its id.")],
    results: ResultsOption = LOCAL,
    out: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
) -> None:
    """Print the protocol card of a run: one page, from its record."""
    from dora_lab.report import card

    path = find_run(run, results)
    verified(path)
    text = card.card(path)
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
    for path in [first, *([find_run(other, results)] if other != "published" else [])]:
        verified(path)
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
def pack(
    experiment: Annotated[str, typer.Argument(help="An experiment with runs, see `dora-lab list`.")],
    results: ResultsOption = LOCAL,
    remove: Annotated[bool, typer.Option(help="Remove the files that were packed.")] = False,
) -> None:
    """Put finished runs into parts of fifty, byte for byte, with an index of their hashes; the rest stays as it is."""
    folder = results / "runs" / experiment
    if not folder.is_dir():
        there = sorted(path.name for path in (results / "runs").glob("*") if path.is_dir())
        raise SpecError(f"{folder} has no runs; {did_you_mean(experiment, there)}")
    done = {path for path, record in survey(results, experiment).runs if record["status"] == "complete"}
    fresh = sorted(path for path in done if (path / "record.json").is_file() and not packs.packed(path))
    runs = [
        (path.name, {name: (path / name).read_bytes() for name in packs.FILES if (path / name).is_file()},
         "finished" if read_record(path).get("streams") else "afterwards")
        for path in fresh
    ]  # fmt: skip
    for part in packs.write(folder, runs):
        say(part)
    say(f"{len(runs)} runs packed, {len(done) - len(runs)} were before")
    for path in done if remove else ():
        for name in packs.packed(path):
            (path / name).unlink(missing_ok=True)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@app.command()
def rescore(
    run: Annotated[str, typer.Argument(help="A run: its folder, or the beginning of its id.")],
    pattern: Annotated[list[str] | None, typer.Option(help="REGEX or TASK=REGEX; its first match answers.")] = None,
    results: ResultsOption = LOCAL,
) -> None:
    """Score a run's saved texts again with other patterns; writes <run>/rescored/, never over the record."""
    from dora_lab.evaluation import rescore as rescoring

    path = find_run(run, results)
    verified(path)
    rows, file = rescoring.rescore(path, pattern or ())
    say(f"{rescoring.table(rows)}\n{file}")
