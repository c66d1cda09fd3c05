"""The command line: `dora-lab` or `python -m dora_lab`. Light until a run begins: no torch is imported here."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from dora_lab import load
from dora_lab.run import Paths
from dora_lab.spec import Spec, SpecError, derive, did_you_mean, spec_id, to_dict, validate
from dora_lab.store import read_stream, run_path
from dora_lab.workers import Outcome, describe, run_many

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
HOUSE = Path(__file__).resolve().parents[1]
EXPERIMENTS = HOUSE / "experiments"
RESULTS = HOUSE / "results"
README = HOUSE / "README.md"
LOCAL = RESULTS / "local"  # a user's own runs, beside the committed ones without touching them

ResultsOption = Annotated[Path, typer.Option("--results", help="Results folder; runs are in its runs/.")]


@app.command("list")
def list_command() -> None:
    """List the experiments: what each reproduces and how many runs it has in each tier."""
    for name in experiment_names():
        module = load_experiment(name)
        counts = ", ".join(f"{tier}: {len(module.specs(tier))} runs" for tier in module.TIERS)
        typer.echo(f"{name:22} {(module.__doc__ or '').strip().splitlines()[0]}  [{counts}]")


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="An experiment, see `dora-lab list`.")],
    tier: Annotated[str, typer.Option(help="mini (embedded, minutes on a CPU) or paper (hub models, a GPU).")] = "mini",
    only: Annotated[list[str] | None, typer.Option(help="FIELD=VALUE[,VALUE]: only specs that match.")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="FIELD=VALUE: change that field.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the specs, run nothing.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: one per core (paper: one).")] = None,
    results: ResultsOption = LOCAL,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of real data: <task>/train.json, test.json.")] = None,
    model_dir: Annotated[Path | None, typer.Option(help="Folder of a saved model to start from.")] = None,
) -> None:
    """Run an experiment: complete runs are skipped, interrupted ones go on, failed ones start anew."""
    module = load_experiment(experiment)
    specs = chosen(module, tier, only or (), with_ or (), data_dir, model_dir)
    if dry_run:
        _print_specs(specs, getattr(module, "ITEMS", {}))
        return
    outcomes = run_many(specs, Paths(results, data_dir, model_dir), jobs)
    typer.echo(summary(outcomes, results))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)
    if any(outcome.status == "interrupted" for outcome in outcomes):
        raise typer.Exit(130)  # what a shell reports for Ctrl-C


@app.command()
def verify(
    experiment: Annotated[str | None, typer.Argument(help="One experiment; all without it.")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Print the verdict on each claim of the paper that the runs can speak about."""
    from dora_lab import report
    from dora_lab import verify as verifying

    rows = verifying.claims(experiment)
    evals, probes = (report.frame(results, experiment, stream) for stream in ("eval", "probe"))
    found = verifying.verdicts(evals, probes, rows)
    typer.echo(found.to_string(index=False) if len(found) else f"no complete runs in {results}")


@app.command()
def compare(
    results: ResultsOption = LOCAL,
    committed: Annotated[Path, typer.Option(help="Results folder to compare with.")] = RESULTS,
    experiment: Annotated[str | None, typer.Option(help="One experiment; all without it.")] = None,
) -> None:
    """Say whether your runs agree with the committed ones; exit code 1 if they do not."""
    from dora_lab import verify as verifying

    text, agrees = verifying.compare(results, committed, experiment)
    typer.echo(text)
    raise typer.Exit(0 if agrees else 1)


@app.command()
def report(results: ResultsOption = RESULTS) -> None:
    """Rebuild every table and figure of a results folder from its runs (and, of the committed one, the README's)."""
    for path in rebuild(results):
        typer.echo(path)


@app.command()
def probe(
    base: Annotated[str, typer.Argument(help="The base model: a folder (safetensors, sharded or not) or a hub id.")],
    tuned: Annotated[list[str], typer.Argument(help="Models, adapters, folders of checkpoint-N, runs, or hub ids.")],
    axis: Annotated[
        str, typer.Option(help="One magnitude per output feature (out, DoRA's) or per input (in).")
    ] = "out",
    kinds: Annotated[str, typer.Option(help="Comma-separated leaf names, e.g. q_proj,v_proj; default: all.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the rows: .csv, .jsonl or .parquet.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the scatter of ΔD and ΔM: .png or .pdf.")] = None,
    dynamics: Annotated[bool, typer.Option(help="Also ranks, singular values, intruder directions (slow).")] = False,
    verify: Annotated[bool, typer.Option(help="Compare files with their SHA-256: manifests, the hub's cache.")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read .bin files where there is no safetensors file.")] = False,
) -> None:
    """ΔM and ΔD of tuned models or adapters against their base, from the files, in bounded memory."""
    from tqdm import tqdm

    from dora_lab import measure
    from dora_lab.report import decomposition

    decomposition.refuse_endings(out, plot)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with tqdm(unit=" matrices", leave=False, disable=None if dynamics else not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int, text: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(text[-50:])

        found = measure.probe(
            base, tuned, axis=axis, kinds=[kind for kind in kinds.split(",") if kind], dynamics=dynamics, verify=verify,
            allow_pickle=allow_pickle, failed=lambda error: failures.append(str(error)), progress=progress,
        )  # fmt: skip
        try:
            rows.extend(found)  # what was known before an error of the base is kept
        except measure.CheckpointError as error:
            failures.append(str(error))
    if rows:
        typer.echo(decomposition.summary(rows))
        for path in (
            *([decomposition.save(rows, out)] if out else []),
            *([decomposition.plot(rows, plot)] if plot else []),
        ):
            typer.echo(path)
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures:
        raise typer.Exit(2)


@app.command()
def export(
    base: Annotated[Path, typer.Argument(help="Folder of the base model, as transformers saves it.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter: a PEFT folder, the authors' format, or a LyCORIS file.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model.")],
    allow_pickle: Annotated[bool, typer.Option(help="Read adapter_model.bin if there is no safetensors file.")] = False,
) -> None:
    """Merge an adapter into its base and write a plain transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dora_lab import checkpoints

    if not (base / "config.json").is_file():
        raise checkpoints.CheckpointError(f"{base}: no config.json in it; give the folder of a saved model")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    has_tokenizer = any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = AutoTokenizer.from_pretrained(base) if has_tokenizer else None
    checkpoints.load_adapter(model, adapter, allow_pickle=allow_pickle)
    typer.echo(checkpoints.export(model, out, tokenizer))


@app.command()
def reproduce(
    experiment: Annotated[str, typer.Argument(help="An experiment, see `dora-lab list`.")],
    results: ResultsOption = LOCAL,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: one per core.")] = None,
) -> None:
    """Run the mini tier, rebuild tables and figures, print the table and compare with the committed runs."""
    outcomes = run_many(chosen(load_experiment(experiment), "mini"), Paths(results), jobs)
    typer.echo(summary(outcomes, results))
    if any(outcome.status in ("failed", "interrupted") for outcome in outcomes):
        raise typer.Exit(1 if any(outcome.status == "failed" for outcome in outcomes) else 130)
    rebuild(results)
    table = results / "tables" / f"{experiment}.md"
    if table.exists():
        typer.echo(f"\n{table.read_text(encoding='utf-8')}")
    from dora_lab import verify as verifying

    # a difference is told, not failed on: another processor may round its way to another answer
    text, _ = verifying.compare(results, RESULTS, experiment)
    typer.echo(f"{text}\n\ntables and figures: {results / 'tables'}, {results / 'figures'}")


def rebuild(results: Path) -> list[Path]:
    """Run every script of analysis/ on a results folder; returns the files written."""
    from dora_lab.report import readme_block

    if str(HOUSE) not in sys.path:  # the scripts are part of the repository, not of the installed package
        sys.path.insert(0, str(HOUSE))
    written: list[Path] = []
    for kind in ("tables", "figures"):
        for file in sorted((HOUSE / "analysis" / kind).glob("[!_]*.py")):
            script = importlib.import_module(f"analysis.{kind}.{file.stem}")
            written += script.build(results)
            committed = results.resolve() == RESULTS.resolve()
            if committed and hasattr(script, "readme") and readme_block(README, script.readme(results)):
                written.append(README)
    return written


def experiment_names() -> list[str]:
    """Names of the files in experiments/ that have runs; one that only measures (speed.py) has no `specs`."""
    files = EXPERIMENTS.glob("[!_]*.py")
    return sorted(file.stem for file in files if "\ndef specs(" in file.read_text(encoding="utf-8"))


def load_experiment(name: str) -> ModuleType:
    """The experiment's module; raises SpecError listing the names there are."""
    if name not in experiment_names():
        raise SpecError(f"unknown experiment '{name}'; {did_you_mean(name, experiment_names())}")
    found = importlib.util.spec_from_file_location(f"experiments.{name}", EXPERIMENTS / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def chosen(
    module: ModuleType,
    tier: str,
    only: Sequence[str] = (),
    changes: Sequence[str] = (),
    data_dir: Path | None = None,
    model_dir: Path | None = None,
) -> list[Spec]:
    """The specs of an experiment after --data-dir, --model-dir, --only and --with; each valid, no two the same.

    Raises SpecError for an unknown tier or field, a selection that matches nothing, or two specs that became one.
    """
    if tier not in module.TIERS:
        raise SpecError(f"unknown tier '{tier}'; {did_you_mean(tier, module.TIERS)}")
    specs: list[Spec] = module.specs(tier)
    if data_dir is not None:
        specs = [_with_data(spec, data_dir) for spec in specs]
    if model_dir is not None:
        model = {"model.name": Path(model_dir).resolve().name, "model.revision": load.hash_model(model_dir)[:12]}
        specs = [derive(spec, model) for spec in specs]
    for field, text in (_pair(selection, "--only") for selection in only):
        wanted = text.split(",")
        kept = [spec for spec in specs if _value(to_dict(spec), field) in wanted]
        if not kept:
            there = sorted({str(_value(to_dict(spec), field)) for spec in specs})
            raise SpecError(f"--only {field}={text} matches no spec; values there: {', '.join(there)}")
        specs = kept
    values = dict(_pair(change, "--with") for change in changes)
    specs = [derive(spec, {path: text for path, text in values.items() if _has(spec, path)}) for spec in specs]
    for spec in specs:
        validate(spec)
    if len({spec_id(spec) for spec in specs}) < len(specs):
        raise SpecError("some specs became the same run; select one of them with --only")
    return specs


def summary(outcomes: Sequence[Outcome], results: Path) -> str:
    """A line per run: name, id, status, seconds and mean accuracy by protocol, and how many ended how."""
    lines = []
    for outcome in outcomes:
        path = run_path(results, outcome.spec)
        scores: dict[str, list[float]] = {}
        if outcome.status in ("complete", "skipped"):
            for row in read_stream(path, "eval"):
                scores.setdefault(row["protocol"], []).append(row["value"])
        means = "  ".join(f"{name} {100 * sum(found) / len(found):.1f} %" for name, found in scores.items())
        seconds = f"{outcome.seconds:5.0f} s" if outcome.status != "skipped" else " " * 7
        tail = outcome.error if outcome.status in ("failed", "interrupted") else means
        name = f"{describe(outcome.spec):34} {spec_id(outcome.spec)}"
        lines.append(f"{name}  {outcome.status:11} {seconds}  {tail or ''}")
    ends = [outcome.status for outcome in outcomes]
    counts = ", ".join(f"{ends.count(status)} {status}" for status in dict.fromkeys(ends))
    return "\n".join([*lines, f"{len(ends)} runs: {counts}; records in {results / 'runs'}"])


def _with_data(spec: Spec, data_dir: Path) -> Spec:
    """The spec on a folder of real data: its tasks are those that have a test file, all their items are taken."""
    names = load.tasks_in(data_dir)
    if not names:
        load.hash_data(data_dir)  # says what a folder of data looks like
        raise SpecError(f"{data_dir}: no <task>/test.json to evaluate on")
    # a training mix from elsewhere stays; only its evaluation comes from the folder
    elsewhere = spec.data.name not in ("mini", "llm_adapters")
    data = replace(
        spec.data,
        name=spec.data.name if elsewhere else "llm_adapters",
        eval_name="llm_adapters" if elsewhere else None,
        tasks=tuple(names),
        sha256=load.hash_data(data_dir),
        train_items=spec.data.train_items if elsewhere else None,
        test_items=None,
    )
    return replace(spec, data=data)


def _has(spec: Spec, path: str) -> bool:
    """Whether the spec has the section of a dotted path: a base model has no optim, so nothing of it can be changed."""
    return getattr(spec, path.partition(".")[0], spec) is not None


def _pair(text: str, option: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"{option} {text}: expected FIELD=VALUE, for example optim.learning_rate=0.001")
    return field, value


def _value(tree: Mapping[str, Any], field: str) -> str:
    """The value at a dotted path as text; a section stands for its name, a bare field for the one place it has."""
    flat = _flat(tree)
    found = [path for path in flat if path in (field, f"{field}.name") or path.endswith(f".{field}")]
    exact = [path for path in found if path in (field, f"{field}.name")]
    if len(exact or found) > 1:
        raise SpecError(f"--only {field} is ambiguous: {', '.join(found)}")
    if not found:
        if tree.get(field.partition(".")[0], "") is None:
            return "none"
        raise SpecError(f"--only {field}: no such field; {did_you_mean(field, flat)}")
    value = flat[(exact or found)[0]]
    return "none" if value is None else str(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _print_specs(specs: Sequence[Spec], known: Mapping[str, int]) -> None:
    for spec in specs:
        rank = "-" if spec.method.rank is None else spec.method.rank
        typer.echo(
            f"{spec_id(spec)}  {spec.tier:5}  {spec.model.name:26} {spec.method.name:5} rank {rank:<3} "
            f"seed {spec.seed:<3} {_steps(spec, known)}"
        )
    typer.echo(f"{len(specs)} specs")


def _steps(spec: Spec, known: Mapping[str, int]) -> str:
    """Optimiser steps and how they are made; `known` has the sizes of data that a spec takes whole."""
    if spec.optim is None:
        return "no training"
    optim = spec.optim
    how = f"learning rate {optim.learning_rate:g}, batch {optim.batch_size}"
    items, about = spec.data.train_items, ""
    if items is None and spec.data.name in known:
        items, about = known[spec.data.name] - spec.data.validation_items, "about "
    if items is None:
        return f"{optim.epochs:g} epochs of all items, {how}"
    return f"{about}{max(1, math.ceil(items * optim.epochs / optim.batch_size))} steps, {how}"


def main() -> None:
    """Entry point of `dora-lab`: an error that explains itself is printed without a traceback."""
    try:
        app()
    except ValueError as error:  # all our errors about input are; their text says what to do
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
