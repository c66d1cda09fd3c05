"""Anything with ΔD and ΔM as a figure: plot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from dora_lab.commands.app import LOCAL, RESULTS, ResultsOption, app, examples, find_run, say
from dora_lab.launch.experiments import declared_specs, experiment_names
from dora_lab.runs.survey import verified
from dora_lab.spec import SpecError, did_you_mean

YOURS = " (yours)"


@app.command(epilog=examples("plot commonsense --results results --kinds q_proj", "plot rows.csv --form training"))
def plot(
    what: Annotated[
        list[str],
        typer.Argument(help="Runs (folders, ids, whole experiments), or files of rows: .csv, .jsonl, .parquet."),
    ],
    out: Annotated[Path, typer.Option(help="The figure, .png or .pdf; NAME.data.csv beside it.")] = Path("plot.png"),
    form: Annotated[str, typer.Option(help="scatter (ΔD, ΔM), training or layers (lines of both).")] = "scatter",
    kinds: Annotated[str, typer.Option(help="Comma-separated leaf names, e.g. q_proj,v_proj; default: all.")] = "",
    label: Annotated[list[str] | None, typer.Option(help="Only these rows of tables, e.g. DoRA; default: all.")] = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="The committed runs of the same experiments, too; yours are marked.")
    ] = False,
    results: ResultsOption = LOCAL,
) -> None:
    """Draw ΔD and ΔM of runs, of what `dora-lab probe` wrote, or of rows of the callback; the numbers lie beside it."""
    from dora_lab import report
    from dora_lab.paper.axes import PANELS
    from dora_lab.report import points

    files = [text for text in what if Path(text).suffix in points.ENDINGS or Path(text).is_file()]
    if files and len(files) < len(what):
        raise ValueError(f"{files[0]}: give runs or files of rows, not both")
    if files and beside:
        raise ValueError(f"--beside: {files[0]} is a file of rows, of no experiment; give runs")
    parts: list[tuple[str, Any]] = [("", _of_files(files))] if files else report.groups(_of_runs(what, results, beside))
    for suffix, rows in parts:
        rows = _chosen(rows, "kind", [kind for kind in kinds.split(",") if kind], "--kinds")
        rows = rows.assign(row=rows["label"].str.removesuffix(YOURS)) if label else rows
        rows = _chosen(rows, "row", label or [], "--label").drop(columns="row", errors="ignore")
        file = out.with_stem(out.stem + suffix) if len(parts) > 1 else out
        try:
            report.plot(rows, file, form=form, paper=PANELS, source=None if files else report.provenance(rows))
        except OSError as error:
            raise ValueError(f"--out {file}: {error.strerror}; give another place") from None
        say(f"{file}\n{file.with_suffix('.data.csv')}")


def _of_files(files: Sequence[str]) -> Any:
    """The rows of all files, each fit to be drawn; of several, those without a label have their file's name."""
    import pandas as pd

    from dora_lab.report import points

    parts = []
    for file in map(Path, files):
        rows = points.read(file)
        try:
            labels = points.points(rows)["label"]
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        parts.append(rows.assign(label=file.stem if len(files) > 1 and set(labels) == {""} else labels))
    return pd.concat(parts, ignore_index=True)


def _of_runs(names: Sequence[str], results: Path, beside: bool) -> Any:
    """Probe rows of complete runs, labelled as in the tables; with `beside` those are "(yours)", and the committed runs
    of their experiments that share a panel with one of them stand beside.
    """
    import pandas as pd

    from dora_lab import report

    declared = declared_specs()

    @cache
    def frame(root: Path, experiment: str) -> Any:
        return report.frame(root, experiment, "probe", declared)

    parts = []
    for name in names:
        if name in experiment_names():
            roots = (results,) if beside else (results, RESULTS)
            root = next((root for root in roots if (root / "runs" / name).is_dir()), results)
            rows = frame(root, name)
            if not len(rows):
                raise SpecError(
                    f"{name}: no complete run in {root / 'runs' / name} has probe rows; run it, or --results"
                )
        else:
            path = find_run(name, results).absolute()
            if beside and path.parents[2] == RESULTS.absolute():
                raise SpecError(f"--beside: {path} is a committed run; give one of yours, with --results")
            record = verified(path)
            rows = frame(path.parents[2], path.parent.name)
            rows = rows[rows["spec_id"] == path.name]
            if not len(rows):
                raise SpecError(
                    f"{path}: a run that is {record['status']}, without probe rows in {path.parents[2] / 'runs'}; give "
                    "a complete run, or the file probe.jsonl itself"
                )
        parts.append(rows)
    yours = pd.concat(parts).drop_duplicates(["spec_id", "step", "fraction", "module"])
    if not beside:
        return yours
    if results.absolute() == RESULTS.absolute():
        raise SpecError(f"--beside: {results} holds the committed runs themselves; give yours with --results")
    panels = yours[report.GROUP].drop_duplicates()
    committed = pd.concat([frame(RESULTS, name) for name in yours["experiment"].unique()])
    committed = committed.merge(panels, on=report.GROUP) if len(committed) else committed
    if not len(committed):
        raise SpecError(f"--beside: no committed run of {', '.join(yours['experiment'].unique())} has probe rows")
    return pd.concat([committed, yours.assign(label=yours["label"] + YOURS)])


def _chosen(rows: Any, column: str, wanted: Sequence[str], option: str) -> Any:
    if not wanted:
        return rows
    there = list(dict.fromkeys(rows[column].dropna())) if column in rows else []
    for name in wanted:
        if name not in there:
            raise ValueError(
                f"{option} {name}: no row has it; {did_you_mean(name, there) if there else 'leave it out'}"
            )
    return rows[rows[column].isin(wanted)]
