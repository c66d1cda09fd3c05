"""What all commands share: the application, where results lie, a run by the beginning of its id."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dora_lab.io.text import shown
from dora_lab.runs import packs
from dora_lab.runs.survey import is_run
from dora_lab.spec import SpecError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Fine-tune with weight-decomposed adapters, watch magnitude and direction move, rebuild the paper's tables.",
)  # fmt: skip
HOUSE = Path(__file__).resolve().parents[2]
RESULTS = HOUSE / "results"
README = HOUSE / "README.md"
LOCAL = RESULTS / "local"  # a user's own runs, beside the committed ones without touching them

ResultsOption = Annotated[Path, typer.Option("--results", help="Results folder; runs are in its runs/.")]


def say(text: object, err: bool = False) -> None:
    """Print a text for a person; names that come from files steer no terminal."""
    typer.echo(shown(text), err=err)


def find_run(text: str, results: Path) -> Path:
    """A run directory: a path, or the beginning of an id under `results` or the committed results.

    Raises SpecError if there is none, or more than one.
    """
    if text and packs.read(Path(text), "record.json") is not None:
        return Path(text)
    folders = [folder for root in (RESULTS, results) for folder in (root / "runs").glob("*") if folder.is_dir()]
    there = [path for folder in folders for path in (*folder.iterdir(), *packs.packed_runs(folder))]
    # a copy beside a run is none
    found = {path.name: path for path in there if text and path.name.startswith(text) and is_run(path)}
    if len(found) == 1:
        return next(iter(found.values()))
    said = f"{', '.join(sorted(found))}: give more digits" if found else f"none in {results} or {RESULTS}"
    raise SpecError(f"run '{text}': give a run's folder or the beginning of its id; {said}")
