"""What all commands share: the application, names and folders that are checked, a run by the beginning of its id."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from tqdm import tqdm

from dora_lab import __version__
from dora_lab.commands.ending import CODES
from dora_lab.house import LOCAL, RESULTS
from dora_lab.io.text import shown
from dora_lab.launch.experiments import experiment_name, experiment_names
from dora_lab.runs import packs
from dora_lab.runs.survey import is_run
from dora_lab.spec import SpecError, did_you_mean


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(["Examples:", *(f"  dora-lab {line}" for line in lines)])


app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False,
    epilog=f"{examples('reproduce commonsense --quick', 'verify commonsense')}\n\n{CODES}",
    help="Fine-tune with weight-decomposed adapters, watch magnitude and direction move, rebuild the paper's tables.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "lm-eval"))
        say(f"dora-lab {__version__} ({packages})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """What stands before a command's name."""


def say(text: object, err: bool = False) -> None:
    """Print a text for a person; names that come from files steer no terminal."""
    with tqdm.external_write_mode(file=sys.stderr if err else sys.stdout):  # a bar makes room
        typer.echo(shown(text), err=err)


def progress_bar(what: str, total: int | None = None, unit: str = "it") -> tqdm[NoReturn]:
    """What is being done, how far it is and how long it will take: on a terminal alone, gone at the end."""
    return tqdm(desc=what, total=total, unit=unit, leave=False, disable=not sys.stderr.isatty())


def results_folder(path: Path) -> Path:
    """The folder, where it holds runs/ or measurements (bench/), or is the one that a user's runs will be in.

    Raises SpecError naming the results folders near it.
    """
    if path == LOCAL or any((path / name).is_dir() for name in ("runs", "bench")):
        return path
    whole = path.absolute()
    if "runs" in whole.parts:
        near = f"did you mean {Path(*whole.parts[: whole.parts.index('runs')])}?"
    else:
        beside = [one.parent.name for one in whole.parent.glob("*/runs") if one.is_dir()]
        near = did_you_mean(path.name, beside) if beside else f"the committed one is {RESULTS}"
    raise SpecError(f"{path} is no results folder: neither runs/ nor bench/ is there; {near}")


def _named(text: str | None) -> str | None:
    return text and experiment_name(text)


ResultsOption = Annotated[Path, typer.Option("--results", help="Results folder; runs are in its runs/.")]
ReadOption = Annotated[
    Path, typer.Option("--results", help="Results folder; runs are in its runs/.", callback=results_folder)
]
ExperimentArgument = Annotated[
    str,
    typer.Argument(help="An experiment, see `dora-lab list`.", callback=_named, autocompletion=experiment_names),
]
RunArgument = Annotated[str, typer.Argument(help="A run: its folder, or the beginning of its id.")]


def find_run(text: str, results: Path) -> Path:
    """A run directory: a path, or the beginning of an id under `results` or the committed results.

    Raises SpecError if there is none, or more than one.
    """
    if text and packs.read(Path(text), "record.json") is not None:
        return Path(text)
    folders = [folder for root in (RESULTS, results) for folder in (root / "runs").glob("*") if folder.is_dir()]
    there = {path.name: path for folder in folders for path in (*folder.iterdir(), *packs.packed_runs(folder))}
    # a copy beside a run is none
    found = {name: path for name, path in there.items() if text and name.startswith(text) and is_run(path)}
    if len(found) == 1:
        return next(iter(found.values()))
    raise SpecError(f"run '{text}': give a run's folder or the beginning of its id; {_near(text, found, there)}")


def _near(text: str, found: dict[str, Path], there: dict[str, Path]) -> str:
    """What a person may have meant: ids to choose from, or how many runs there are of what."""
    if found:
        names = [f"{name} ({path.parent.name})" for name, path in sorted(found.items())]
        more = f", {len(names) - 8} more" if len(names) > 8 else ""
        return f"{', '.join(names[:8])}{more}: give more digits"
    runs = [path for path in there.values() if is_run(path)]
    near = difflib.get_close_matches(text, [path.name[: len(text)] for path in runs], n=1)
    counts = Counter(path.parent.name for path in runs)
    told = ", ".join(f"{counts[name]} of {name} (e.g. {_example(name, runs)})" for name in sorted(counts))
    return f"none is that; {f'did you mean {near[0]}? ' if near else ''}there are {told or 'no runs'}"


def _example(experiment: str, runs: list[Path]) -> str:
    return min(path.name for path in runs if path.parent.name == experiment)[:6]
