"""The command line: `dora-lab` or `python -m dora_lab`. Light until a run begins: no torch is imported here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dora_lab import load, ranks
from dora_lab.run import Paths
from dora_lab.selection import chosen, experiment_names, load_experiment, pair, published_specs
from dora_lab.spec import SpecError, derive, from_dict, spec_id
from dora_lab.store import read_record, read_stream, run_path
from dora_lab.workers import Outcome, describe, run_many

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
HOUSE = Path(__file__).resolve().parents[1]
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the specs and their cost, run nothing.")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Of the cost: hours on it; default for tier paper: A100-80GB.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of the cost: tokens per text; default: the cutoff.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: one per core (paper: one).")] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: weights cut over the processes while training (FSDP2).")
    ] = False,
    results: ResultsOption = LOCAL,
    data_dir: Annotated[
        Path | None, typer.Option(help="Real data: a clone of LLM-Adapters, or <task>/test.json.")
    ] = None,
    model_dir: Annotated[Path | None, typer.Option(help="Folder of a saved model to start from.")] = None,
) -> None:
    """Run an experiment: complete runs are skipped, interrupted ones go on, failed ones start anew."""
    module = load_experiment(experiment)
    specs = chosen(module, tier, only or (), with_ or (), data_dir, model_dir)
    if dry_run:
        from dora_lab import dry_run as planning

        for line in planning.lines(specs, getattr(module, "ITEMS", {}), model_dir, gpu, tokens):
            typer.echo(line)
        return
    outcomes = run_many(specs, Paths(results, data_dir, model_dir), jobs, shard=shard)
    if ranks.first():
        typer.echo(summary(outcomes, results))
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)
    if any(outcome.status == "interrupted" for outcome in outcomes):
        raise typer.Exit(130)  # what a shell reports for Ctrl-C


@app.command()
def submit(
    experiment: Annotated[str, typer.Argument(help="An experiment, see `dora-lab list`.")],
    tier: Annotated[str, typer.Option(help="mini or paper.")] = "paper",
    only: Annotated[list[str] | None, typer.Option(help="FIELD=VALUE[,VALUE]: only specs that match.")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="FIELD=VALUE: change that field.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition; default: the cluster's.")] = None,
    hours: Annotated[float, typer.Option(help="Wall time of a job; after it the job is queued again.")] = 24.0,
    gpus: Annotated[int, typer.Option(help="GPUs of a job.")] = 1,
    cpus: Annotated[int, typer.Option(help="Processor cores of a job.")] = 4,
    memory: Annotated[float, typer.Option(help="Memory of a job, GB.")] = 64.0,
    at_once: Annotated[int | None, typer.Option(help="Jobs at a time; default: as the cluster gives.")] = None,
    slurm: Annotated[list[str] | None, typer.Option(help="KEY=VALUE: a further option of sbatch.")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="The same jobs here, one after the other; to try out.")
    ] = False,
    results: ResultsOption = LOCAL,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of real data: <task>/train.json, test.json.")] = None,
    model_dir: Annotated[Path | None, typer.Option(help="Folder of a saved model to start from.")] = None,
) -> None:
    """Run an experiment on a SLURM cluster: a job for each spec that has no complete run yet."""
    from dora_lab import cluster

    specs = chosen(load_experiment(experiment), tier, only or (), with_ or (), data_dir, model_dir)
    resources = cluster.Resources(
        partition=partition, hours=hours, gpus=gpus, cpus=cpus, memory_gb=memory, at_once=at_once,
        more=dict(pair(option, "--slurm") for option in slurm or ()),
    )  # fmt: skip
    jobs = cluster.submit(specs, Paths(results, data_dir, model_dir), resources, local=local)
    for spec, job in jobs:
        typer.echo(f"{spec_id(spec)}  {describe(spec):34} job {job.job_id}{f'  {job.state}' if local else ''}")
    typer.echo(f"{len(jobs)} jobs, {len(specs) - len(jobs)} runs complete before; logs in {results / 'cluster'}")
    failed = [error for _, job in jobs if local and (error := job.exception()) is not None]
    if failed:
        raise SpecError(f"{len(failed)} jobs failed; the first: {str(failed[0]).strip().splitlines()[-1]}")


@app.command()
def verify(
    experiment: Annotated[str | None, typer.Argument(help="One experiment; all without it.")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Print the verdict on each claim of the paper that the runs can speak about, and on the numbers it prints."""
    from dora_lab import report
    from dora_lab import verify as verifying

    rows = verifying.claims(experiment)
    evals, probes = (report.frame(results, experiment, stream) for stream in ("eval", "probe"))
    found = verifying.verdicts(evals, probes, rows)
    typer.echo(found.to_string(index=False) if len(found) else f"no complete runs in {results}")
    cells = verifying.cells(results, verifying.claims(), published_specs())
    typer.echo("\n" + verifying.summary(cells, experiment))


@app.command("card")
def card_command(
    run: Annotated[str, typer.Argument(help="A run: its folder, or the beginning of its id.")],
    results: ResultsOption = LOCAL,
    out: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
) -> None:
    """Print the protocol card of a run: one page, from its record."""
    from dora_lab import card

    text = card.card(find_run(run, results))
    typer.echo(text if out is None else out)
    if out is not None:
        out.write_text(text, encoding="utf-8")


@app.command("diff")
def diff_command(
    run: Annotated[str, typer.Argument(help="A run: its folder, or the beginning of its id.")],
    other: Annotated[str, typer.Argument(help="Another run, or `published` for the paper's protocol.")],
    results: ResultsOption = LOCAL,
) -> None:
    """Say in words how two runs, or a run and the published protocol, differ."""
    from dora_lab import card

    first = find_run(run, results)
    if other != "published":
        typer.echo(card.diff(first, find_run(other, results)))
    else:
        typer.echo(card.diff(first, card.nearest(from_dict(read_record(first)["spec"]), published_specs())))


@app.command("verify-published")
def verify_published(
    adapter: Annotated[str, typer.Argument(help="Folder, or hub id (org/name or org/name:folder/in/it).")],
    base: Annotated[str, typer.Option(help="The base model: folder, or hub id.")],
    data_dir: Annotated[Path, typer.Option(help="Folder of test files: <task>/test.json, LLM-Adapters layout.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the adapter on the hub.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the base on the hub.")] = None,
    paper_model: Annotated[str | None, typer.Option(help="The paper's name of the base, e.g. LLaMA-7B.")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="FIELD=VALUE: change that field.")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="Read adapter_model.bin if there is no safetensors file.")] = False,
    results: ResultsOption = LOCAL,
) -> None:
    """Evaluate a released adapter (PEFT's or the authors' format) by the paper's protocol, beside its numbers."""
    from dora_lab import published, shapes

    experiment = load_experiment("commonsense")
    base_dir, adapter_dir = (Path(text) if Path(text).is_dir() else None for text in (base, adapter))
    pinned = base_revision or experiment.PAPER.get(base, (None,))[0]
    protocol = experiment.specs("paper")[0]
    model = replace(
        protocol.model,
        name=base_dir.resolve().name if base_dir else base,
        revision=load.hash_model(base_dir)[:12] if base_dir else pinned,
        adapter=adapter_dir.resolve().name if adapter_dir else adapter,
        adapter_revision=load.hash_adapter(adapter_dir)[:12] if adapter_dir else revision,
    )
    spec = published.spec_of(protocol, model, tuple(load.tasks_in(data_dir)), load.hash_data(data_dir))
    spec = derive(spec, dict(pair(change, "--with") for change in with_ or ()))
    found, run = published.evaluate(spec, Paths(results, data_dir, base_dir, adapter_dir), allow_pickle)
    rows = published.compare(run, found, paper_model or shapes.printed_name(base))
    typer.echo(
        f"{found.method}, rank {found.rank}, on {base}\n{published.table(rows)}\n{published.summary(rows)}\n{run}"
    )
    raise typer.Exit(1 if "differs" in list(rows["verdict"]) else 0)


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
def doctor(path: Annotated[Path, typer.Argument(help="A results folder, a run's, or a saved adapter's.")]) -> None:
    """Say what is wrong with records, streams, hashes, locks, checkpoints and claims, and how to mend it."""
    from dora_lab import doctor as examining

    findings = list(examining.examine(path))
    typer.echo(examining.report(findings))
    raise typer.Exit(1 if findings else 0)


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
    from dora_lab import checkpoints
    from dora_lab.pretrained import open_model, open_tokenizer

    model = open_model(base, "auto")
    has_tokenizer = any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = open_tokenizer(base) if has_tokenizer else None
    checkpoints.load_adapter(model, adapter, allow_pickle=allow_pickle)
    typer.echo(checkpoints.export(model, out, tokenizer))


@app.command()
def rescore(
    run: Annotated[Path, typer.Argument(help="Run directory, results/local/runs/<experiment>/<id>.")],
    pattern: Annotated[list[str] | None, typer.Option(help="REGEX or TASK=REGEX; its first match answers.")] = None,
) -> None:
    """Score a run's saved texts again with other patterns; writes <run>/rescored/, never over the record."""
    from dora_lab import rescore as rescoring

    rows, file = rescoring.rescore(run, pattern or ())
    typer.echo(f"{rescoring.table(rows)}\n{file}")


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


def find_run(text: str, results: Path) -> Path:
    """A run directory: a path, or the beginning of an id under `results` or the committed results.

    Raises SpecError if there is none, or more than one.
    """
    if (Path(text) / "record.json").exists():
        return Path(text)
    found = {path.name: path for root in (RESULTS, results) for path in (root / "runs").glob(f"*/{text}*") if text}
    if len(found) == 1:
        return next(iter(found.values()))
    there = f"{', '.join(sorted(found))}: give more digits" if found else f"none in {results} or {RESULTS}"
    raise SpecError(f"run '{text}': give a run's folder or the beginning of its id; {there}")


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


def main() -> None:
    """Entry point of `dora-lab`: an error that explains itself is printed without a traceback."""
    try:
        app()
    except ValueError as error:  # all our errors about input are; their text says what to do
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
