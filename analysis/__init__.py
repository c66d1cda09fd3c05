"""Tables and figures, one file each: `python -m analysis.tables.commonsense [--results DIR]`.

Every script has a `build(results)` that reads `results/runs`, writes into `results/tables` or `results/figures` and
returns the paths it wrote; `modules()` finds them all. None imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from dora_lab import report
from dora_lab.launch.experiments import declared_specs
from dora_lab.spec import Spec

# what a table of each tier could be taken for
ISNT = {
    "mini": "a measurement of a useful language model. A million parameters, a closed world made up for them.",
    "small": "the paper's setting. A small model, less training, fewer items.",
    "paper": "the paper's own runs. Ours, at its settings.",
}
PRINTED = "measured here. Single runs, as the paper prints them; its baselines on LLaMA-7B and 13B it quotes itself."


def isnt(tiers: Iterable[object]) -> str:
    """What a table of runs of some tiers is not."""
    return " ".join(text for tier, text in ISNT.items() if tier in set(tiers)) or "a result. No runs were found."


def modules() -> list[str]:
    """Dotted names of all table and figure scripts, sorted: a new file is found without being listed."""
    here = Path(__file__).parent
    return sorted(
        f"analysis.{kind}.{path.stem}"
        for kind in ("tables", "figures")
        for path in (here / kind).glob("*.py")
        if not path.stem.startswith("_")
    )


@cache
def declared() -> tuple[Spec, ...]:
    """The specs of all tiers of all experiments: what their runs are called by, whatever lies beside them."""
    return tuple(dict.fromkeys(declared_specs()))


def frame(results: Path, experiment: str | None = None, stream: str = "eval") -> pd.DataFrame:
    """`report.frame`, its labels by the specs that the experiments declare; read once as long as runs/ stays."""
    return _frame(results, experiment, stream, _state(results / "runs")).copy()


@lru_cache(maxsize=8)  # scripts of one report ask for the same few, and most of its time is reading them
def _frame(results: Path, experiment: str | None, stream: str, state: object) -> pd.DataFrame:
    return report.frame(results, experiment, stream, declared())


def _state(runs: Path) -> tuple[tuple[str, int, int], ...]:
    """Every file below a folder, with its size and time of change."""
    found = ((path, path.stat()) for path in sorted(runs.rglob("*")))
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


def probe_figures(
    results: Path,
    experiment: str,
    name: str,
    draw: Callable[[pd.DataFrame], Any],
    select: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
) -> list[Path]:
    """Draw the probe rows of each group of an experiment's runs; writes results/figures/<name>{suffix}, returns paths.

    draw: gives a figure and its numbers. select: which of a group's rows are drawn (default: all). No rows, or no
    figure (None), no file.
    """
    probes = frame(results, experiment, "probe")
    paths: list[Path] = []
    for suffix, rows in report.groups(probes):
        rows = rows if select is None else select(rows)
        drawn = draw(rows) if len(rows) else None
        if drawn is not None:
            figure, data = drawn
            source = report.provenance(rows, probes.attrs["statuses"])
            paths += report.save_figure(figure, results / "figures", f"{name}{suffix}", source, data)
    return paths


def script(
    build: Callable[[Path], Sequence[Path]],
    description: str | None = None,
    argv: Sequence[str] | None = None,
    readme: Callable[[Path], str] | None = None,
) -> None:
    """Command line of a script: `--results DIR` (default `results`); prints the paths written.

    With `readme` there is also `--readme FILE`: what it returns goes between the table markers of that file.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with runs/ (default: results)")
    if readme is not None:
        parser.add_argument("--readme", type=Path, default=None, help="also renew the table block of this file")
    options = parser.parse_args(argv)
    for path in build(options.results):
        print(path)
    if (
        readme is not None
        and options.readme is not None
        and report.readme_block(options.readme, readme(options.results))
    ):
        print(options.readme)
