"""Experiments and their runs: list, run, submit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dora_lab import distributed
from dora_lab.commands.app import LOCAL, ExperimentArgument, ResultsOption, app, examples, say
from dora_lab.commands.ending import STOPPED
from dora_lab.commands.own import conduct
from dora_lab.commands.show import Format, FormatOption, show
from dora_lab.launch.experiments import experiment_names, load_experiment
from dora_lab.launch.pool import Outcome, describe, run_many
from dora_lab.launch.runtime import TIERS, Device, Paths, Runtime
from dora_lab.launch.select import chosen, pairs
from dora_lab.runs.caveats import caveats
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import run_path
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import verified
from dora_lab.spec import Spec, SpecError, spec_id
from dora_lab.tasks.sources import items_to_train

DeviceOption = Annotated[Device | None, typer.Option(help="Where it computes; default: as the tier says.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of a run on the CPU; default: as the tier says.")
]
JobsOption = Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: mini one per core, else one.")]


@app.command("list", epilog=examples("list", "list --format json"))
def list_command(form: FormatOption = Format.text) -> None:
    """List the experiments: what each reproduces and how many runs it has in each tier."""
    import pandas as pd

    rows = []
    for name in experiment_names():
        module = load_experiment(name)
        about = (module.__doc__ or "").strip().splitlines()[0]
        rows.append({"experiment": name, "about": about} | {tier: len(module.specs(tier)) for tier in module.TIERS})
    there = [tier for tier in TIERS if any(tier in row for row in rows)]
    found = pd.DataFrame(rows, columns=["experiment", "about", *there]).astype(dict.fromkeys(there, "Int64"))
    show({"list": found}, [("Experiments, with the number of their runs in each tier", found)], form)


@app.command(epilog=examples("run commonsense --dry-run", "run commonsense --only method.name=dora --only seed=0"))
def run(
    experiment: ExperimentArgument,
    tier: Annotated[
        str | None,
        typer.Option(help="mini (embedded), small (a real model, a CPU) or paper (a GPU); default: its first."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="FIELD=VALUE[,VALUE]: only specs that match.")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="FIELD=VALUE: change that field.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the specs and their cost, run nothing.")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Of the cost: hours on it; default for runs on a GPU: A100-80GB.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the cost: tokens per text; default: the cutoff.")
    ] = None,
    jobs: JobsOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: weights cut over the processes while training (FSDP2).")
    ] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Layers run again for the gradient: less memory, a third more time.")
    ] = False,
    results: ResultsOption = LOCAL,
    data_dir: Annotated[
        Path | None, typer.Option(help="Real data: LLM-Adapters, <task>/test.json, or the experiment's own folder.")
    ] = None,
    model_dir: Annotated[Path | None, typer.Option(help="Folder of a saved model to start from.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of `own`: fewer steps, rates, items; one seed.")] = False,
    ft: Annotated[bool, typer.Option("--ft", help="Of `own`: full fine-tuning, too.")] = False,
) -> None:
    """Run an experiment: complete runs are skipped, interrupted ones go on, failed ones start anew."""
    module, paths = load_experiment(experiment), Paths(results, data_dir, model_dir)
    if hasattr(module, "first") and (model_dir or data_dir or not dry_run):  # it is planned from what is given
        given = {
            "--only": only,
            "--shard": shard,
            "--recompute": recompute,
            "--gpu": gpu,
            "--tokens": tokens,
            "--tier": tier,
        }
        if ignored := [name for name, value in given.items() if value]:
            raise SpecError(f"run {experiment} reads no {ignored[0]}: it plans its runs from what is given")
        runtime = Runtime(device=device, threads=threads)
        return conduct(module, paths, with_ or (), runtime, quick=quick, ft=ft, jobs=jobs, dry_run=dry_run)
    if quick or ft:
        raise SpecError(f"run {experiment}: --quick and --ft are of `run own`; select specs with --only")
    specs = chosen(module, tier, only or (), with_ or (), data_dir, model_dir, say)
    runtime = Runtime(device=device, threads=threads, shard=shard, recompute=recompute)
    if dry_run:
        from dora_lab.launch import plan as planning

        known = _sizes(getattr(module, "ITEMS", {}), specs, data_dir)
        for line in planning.lines(specs, known, model_dir, gpu, tokens, runtime):
            say(line)
        return
    tell(run_many(specs, paths, runtime, jobs), results)


def _sizes(published: Mapping[str, int], specs: Sequence[Spec], data_dir: Path | None) -> dict[str, int]:
    """How many items there are to train on: as published, of a folder what is in it."""
    known = {**published}
    for data in {spec.data.name: spec.data for spec in specs if data_dir and spec.data.name in known}.values():
        known[data.name] = items_to_train(data, cast(Path, data_dir)) or known[data.name]
    return known


@app.command(epilog=examples("submit commonsense --partition gpu --hours 24", "submit pilot --tier mini --local"))
def submit(
    experiment: ExperimentArgument,
    tier: Annotated[str, typer.Option(help="mini, small or paper.")] = "paper",
    only: Annotated[list[str] | None, typer.Option(help="FIELD=VALUE[,VALUE]: only specs that match.")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="FIELD=VALUE: change that field.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition; default: the cluster's.")] = None,
    hours: Annotated[float, typer.Option(help="Wall time of a job; after it the job is queued again.")] = 24.0,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of a job.")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="Processor cores of a job.")] = 4,
    memory: Annotated[float, typer.Option(help="Memory of a job, GB.")] = 64.0,
    at_once: Annotated[int | None, typer.Option(min=1, help="Jobs at a time; default: as the cluster gives.")] = None,
    slurm: Annotated[list[str] | None, typer.Option(help="KEY=VALUE: a further option of sbatch.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    local: Annotated[
        bool, typer.Option("--local", help="The same jobs here, one after the other; to try out.")
    ] = False,
    results: ResultsOption = LOCAL,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of real data: <task>/train.json, test.json.")] = None,
    model_dir: Annotated[Path | None, typer.Option(help="Folder of a saved model to start from.")] = None,
) -> None:
    """Run an experiment on a SLURM cluster: a job for each spec that has no complete run yet."""
    from dora_lab.launch import slurm as cluster

    specs = chosen(load_experiment(experiment), tier, only or (), with_ or (), data_dir, model_dir, say)
    resources = cluster.Resources(
        partition=partition, hours=hours, gpus=gpus, cpus=cpus, memory_gb=memory, at_once=at_once,
        more=pairs(slurm or (), "--slurm"),
    )  # fmt: skip
    runtime = Runtime(device=device, threads=threads)
    jobs = cluster.submit(specs, Paths(results, data_dir, model_dir), resources, runtime, local=local)
    failed = {job.job_id: why for _, job in jobs if local and (why := cluster.failure(job))}
    for spec, job in jobs:
        ended = (f"  failed: {failed[job.job_id]}" if job.job_id in failed else "  complete") if local else ""
        say(f"{spec_id(spec)}  {describe(spec):34} job {job.job_id}{ended}")
    say(f"{len(jobs)} jobs, {len(specs) - len(jobs)} runs complete before; logs in {results / 'cluster'}")
    if failed:
        raise typer.Exit(1)


def tell(outcomes: Sequence[Outcome], results: Path) -> None:
    """Print the `summary`; the command ends here where a run failed or is damaged (1) or was interrupted."""
    outcomes = checked(outcomes, results)
    if distributed.first():
        say(summary(outcomes, results))
    ends = {outcome.status for outcome in outcomes}
    if ends & {"failed", "damaged"}:
        raise typer.Exit(1)
    if "interrupted" in ends:
        raise typer.Exit(STOPPED)


def checked(outcomes: Sequence[Outcome], results: Path) -> list[Outcome]:
    """The outcomes; of a run that was complete before and that `verified` refuses now, status "damaged" and why."""
    found = []
    for outcome in outcomes:
        try:
            if outcome.status in ("complete", "skipped"):
                verified(run_path(results, outcome.spec))
            found.append(outcome)
        except StoreError as error:
            found.append(replace(outcome, status="damaged", error=str(error)))
    return found


def summary(outcomes: Sequence[Outcome], results: Path) -> str:
    """A line per run: name, id, status, seconds and mean accuracy by protocol, below it what has to be known with
    them; and how many ended how. Raises StoreError for a complete run that `verified` refuses."""
    lines: list[str] = []
    for outcome in outcomes:
        path = run_path(results, outcome.spec)
        scores: dict[str, list[float]] = {}
        record: dict[str, Any] = {}
        if outcome.status in ("complete", "skipped"):
            record = verified(path)
            for row in (row for row in read_stream(path, "eval") if row["value"] is not None):
                scores.setdefault(row["protocol"], []).append(row["value"])
        means = "  ".join(f"{name} {100 * sum(found) / len(found):.1f} %" for name, found in scores.items())
        seconds = f"{outcome.seconds:5.0f} s" if outcome.status != "skipped" else " " * 7
        tail = outcome.error or means
        name = f"{describe(outcome.spec):34} {spec_id(outcome.spec)}"
        lines.append(f"{name}  {outcome.status:11} {seconds}  {tail or ''}")
        if scores:
            lines += [f"{'':34} {text}" for text in (*caveats(record), *record.get("notes", []))]
    ends = [outcome.status for outcome in outcomes]
    counts = ", ".join(f"{ends.count(status)} {status}" for status in dict.fromkeys(ends))
    return "\n".join([*lines, f"{len(ends)} runs: {counts}; records in {results / 'runs'}"])
