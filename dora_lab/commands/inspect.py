"""One run or folder looked at: card, diff, doctor, rescore."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dora_lab.commands.app import (
    LOCAL,
    RESULTS,
    ReadOption,
    RunArgument,
    app,
    examples,
    find_run,
    progress_bar,
    say,
)
from dora_lab.commands.show import Format, FormatOption, show
from dora_lab.io.atomic import write_text
from dora_lab.launch.experiments import experiment_name, published_specs
from dora_lab.runs import packs
from dora_lab.runs.lock import acquire
from dora_lab.runs.record import read_record, spec_of
from dora_lab.runs.survey import survey, verified
from dora_lab.spec import SpecError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd


@app.command("card", epilog=examples("card 632a66", "card 632a66 --peft --out result.json"))
def card_command(
    run: RunArgument,
    results: ReadOption = LOCAL,
    out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None,
    peft: Annotated[bool, typer.Option("--peft", help="As a result file of PEFT's method_comparison (JSON).")] = False,
) -> None:
    """Print the protocol card of a run: one page, from its record."""
    import json

    from dora_lab.report import card, peft_comparison

    path = find_run(run, results)
    text = json.dumps(peft_comparison.comparison(path), ensure_ascii=False, indent=2) if peft else card.card(path)
    say(text if out is None else out)
    if out is not None:
        write_text(out, text)


@app.command(epilog=examples("schema record", "schema spec > spec.schema.json"))
def schema(
    name: Annotated[str, typer.Argument(help="spec, record, or a stream: metrics, probe, timing, eval.")],
) -> None:
    """Print the JSON Schema of a spec, of a record, or of a line of a stream."""
    import json

    from dora_lab.runs import schemas

    typer.echo(json.dumps(schemas.schema(name), ensure_ascii=False, indent=1))


@app.command("diff", epilog=examples("diff 632a66 published", "diff 632a66 64d84a"))
def diff_command(
    run: RunArgument,
    other: Annotated[str, typer.Argument(help="Another run, or `published` for the paper's protocol.")],
    results: ReadOption = LOCAL,
) -> None:
    """Say in words how two runs, or a run and the published protocol, differ."""
    from dora_lab.report import card

    first = find_run(run, results)
    if other != "published":
        say(card.diff(first, find_run(other, results)))
    else:
        say(card.diff(first, card.nearest(spec_of(verified(first)), published_specs())))


@app.command(epilog=examples("doctor results", "doctor results/local --format json"))
def doctor(
    path: Annotated[Path | None, typer.Argument(help="A results folder, a run's, or a saved adapter's.")] = None,
    results: ReadOption = RESULTS,
    form: FormatOption = Format.text,
) -> None:
    """Say what is wrong with records, streams, hashes, locks, checkpoints and claims, and how to mend it."""
    import pandas as pd

    from dora_lab.paper.claims import examine as examine_claims
    from dora_lab.runs import doctor as examining

    path = path or results
    if not path.exists():
        raise SpecError(f"{path} is not there; {did_you_mean(path.name, [one.name for one in path.parent.glob('*/')])}")
    findings: list[examining.Finding] = []
    with progress_bar("looking", unit=" findings") as bar:
        for finding in chain(examining.examine(path), examine_claims() if (path / "runs").is_dir() else ()):
            findings.append(finding)
            bar.update()
    data = pd.DataFrame(findings, columns=examining.Finding._fields).astype(str)
    if form is Format.text:
        say(examining.report(findings))
    else:
        show({"findings": data}, [("Findings", data)], form)
    raise typer.Exit(1 if findings else 0)


@app.command(epilog=examples("pack commonsense", "pack commonsense --results results/local --remove"))
def pack(
    experiment: Annotated[str, typer.Argument(help="An experiment with runs, see `dora-lab list`.")],
    results: ReadOption = LOCAL,
    remove: Annotated[bool, typer.Option(help="Remove the files that were packed.")] = False,
) -> None:
    """Put finished runs into parts of fifty, byte for byte, with an index of their hashes; the rest stays as it is."""
    there = [path.name for path in (results / "runs").glob("*") if path.is_dir()]
    if not there:
        raise SpecError(f"{results} has no runs: `dora-lab run EXPERIMENT --results {results}` makes some")
    folder = results / "runs" / (experiment := experiment_name(experiment, there))
    held, _ = acquire(folder / "lock")
    try:
        _pack(results, experiment, folder, remove)
    finally:
        held.release()


def _pack(results: Path, experiment: str, folder: Path, remove: bool) -> None:
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


@app.command(epilog=examples("rescore 632a66 --pattern 'boolq=(?i)true|false'", "rescore 632a66 --format csv"))
def rescore(
    run: RunArgument,
    pattern: Annotated[list[str] | None, typer.Option(help="REGEX or TASK=REGEX; its first match answers.")] = None,
    results: ReadOption = LOCAL,
    form: FormatOption = Format.text,
) -> None:
    """Score a run's saved texts again with other patterns; writes <run>/rescored/, never over the record."""
    import pandas as pd

    from dora_lab.evaluation import rescore as rescoring

    path = find_run(run, results)
    rows, file = rescoring.rescore(path, pattern or ())
    frame = pd.DataFrame(rows).drop(columns="correct")
    show({"rescored": frame}, [(f"Run {path.name}", _rescored(frame))], form)
    say(file, err=form is not Format.text)


def _rescored(rows: pd.DataFrame) -> pd.DataFrame:
    """Old and new side by side, accuracies in percent, and the mean over tasks."""
    import pandas as pd

    counted = rows[["n", "n_unparsed", "old_n_unparsed"]].sum()
    average = {"task": "average", "pattern": "", **counted, **rows[["value", "old_value"]].mean()}
    both = [*rows.to_dict("records"), average]
    return pd.DataFrame(
        {
            "task": [row["task"] for row in both],
            "n": [f"{row['n']:.0f}" for row in both],
            "accuracy %": [f"{100 * row['old_value']:.1f} → {100 * row['value']:.1f}" for row in both],
            "unparsed": [f"{row['old_n_unparsed']:.0f} → {row['n_unparsed']:.0f}" for row in both],
            "pattern": ["own" if pd.isna(row["pattern"]) else row["pattern"] for row in both],
        }
    )
