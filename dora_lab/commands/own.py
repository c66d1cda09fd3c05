"""`run own`: somebody's model on somebody's data, from a plan that is said beforehand to a table and a figure."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import typer

from dora_lab import distributed
from dora_lab.commands.app import say
from dora_lab.commands.ending import STOPPED
from dora_lab.launch.experiments import house_first, published_specs
from dora_lab.launch.pool import Outcome, run_many
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.launch.select import pairs
from dora_lab.runs.record import run_path, spec_of
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import survey
from dora_lab.spec import Spec, SpecError, derive, spec_id

if TYPE_CHECKING:
    from dora_lab.report.rates import Choice  # with it comes all of pandas and scipy: half the start of any command

MICRO = "optim.micro_batch_size"


@dataclass(frozen=True)
class Plan:
    """What will be done."""

    module: ModuleType  # experiments/own.py
    first: Spec
    methods: tuple[str, ...]
    size: Any

    @property
    def sweep(self) -> list[Spec]:
        return self.module.sweep(self.first, self.methods, self.module.factors(self.size))

    def confirmation(self, rates: dict[str, float] | None = None) -> list[Spec]:
        """At the middle of the grids where there are no rates yet."""
        return self.module.confirmation(
            self.first, rates or {n: self.module.MIDDLE[n] for n in self.methods}, self.size
        )


def conduct(
    module: ModuleType,
    paths: Paths,
    changes: Sequence[str],
    runtime: Runtime,
    *,
    quick: bool,
    ft: bool,
    jobs: int | None,
    dry_run: bool,
) -> None:
    """Say the plan; unless `dry_run`, sweep, confirm, and print the table.

    Raises what `given.look` does, SpecError for a field that is not the caller's to change or a sweep without a rate.
    """
    from dora_lab.launch import given, trial

    if paths.model_dir is None or paths.data_dir is None:
        raise SpecError("run own: give --model-dir M, a saved model, and --data-dir D, a folder <task>/train.json, ...")
    if distributed.size() > 1:
        raise SpecError("run own is one process; start it without torchrun")
    values = pairs(changes, "--with")
    if taken := sorted({*values} & {*module.CHOSEN}):
        raise SpecError(f"--with {taken[0]}: run own chooses it by itself; leave it out")
    size = module.QUICK if quick else module.FULL
    only = [name for name in values.get("data.tasks", "").split(",") if name]
    found = given.look(paths.model_dir, paths.data_dir, values.get("data.template", "cloze"), only)
    # the micro-batch is chosen below; until then one that divides every batch
    first = derive(module.first(found, size), {MICRO: "1"} | values)
    if first.optim.batch_size > first.data.train_items:  # type: ignore[union-attr]
        raise SpecError(
            f"optim.batch_size = {first.optim.batch_size}: more than the {first.data.train_items} items that are "  # type: ignore[union-attr]
            "trained on; lower it"
        )
    first = module.scaled(first, (*values,))
    plan = Plan(module, first, module.methods(ft), size)
    given.refuse_unfit([plan.sweep[0], *plan.confirmation()], paths)
    for line in _of_given(found, plan):
        say(line)
    known = first.optim.micro_batch_size if MICRO in values else _begun(paths.results, first)  # type: ignore[union-attr]
    runtime = _here(runtime)
    seen = trial.measure(_each(plan), paths, runtime, [known] if known else _divisors(first.optim.batch_size))  # type: ignore[union-attr]
    plan = replace(plan, first=derive(first, {MICRO: known or seen.micro_batch}))
    settled = runtime.settled(first)
    rates = trial.products(str(settled.device), settled.threads)
    for line in (*_of_trial(seen, plan, known, MICRO in values, rates, first.model.dtype), *_of_paper(plan)):
        say(line)
    if dry_run:
        return
    outcomes = _run(plan.confirmation(_rates(plan, paths, runtime, jobs)), paths, runtime, jobs)
    _finish(paths.results, outcomes)


def _here(runtime: Runtime) -> Runtime:
    """On a GPU where there is one, whatever the tier says."""
    import torch

    return replace(runtime, device=runtime.device or ("cuda" if torch.cuda.is_available() else None))


def _each(plan: Plan) -> list[Spec]:
    """A spec for each method, adapters first: the micro-batch is chosen with one."""
    trained = {spec.method.name: spec for spec in plan.confirmation() if spec.optim is not None}
    return sorted(trained.values(), key=lambda spec: spec.method.rank is None)


def _divisors(batch_size: int) -> list[int]:
    return [size for size in range(1, batch_size + 1) if batch_size % size == 0]


def _begun(results: Path, first: Spec) -> int | None:
    """The micro-batch of runs of this plan that there are, or None: they are gone on with, whatever is faster now."""
    for _, record in survey(results, first.experiment).runs:
        spec = spec_of(record)
        if spec.optim is None or first.optim is None:
            continue
        micro = spec.optim.micro_batch_size
        alike = replace(first.optim, micro_batch_size=micro, learning_rate=spec.optim.learning_rate)
        if (spec.model, spec.data) == (first.model, first.data) and alike in (
            spec.optim,
            replace(spec.optim, eval_steps=first.optim.eval_steps, keep=first.optim.keep),
        ):
            return micro
    return None


def _of_given(found: Any, plan: Plan) -> list[str]:
    spec, names = plan.first, ", ".join(plan.methods)
    optim, data = spec.optim, spec.data
    assert optim is not None and data.train_items is not None
    steps, positions = optim.steps(data.train_items), found.positions or "any number of"
    scored = f"{data.test_items} test items of each" if data.test_items else "all test items"
    lines = [
        f"model: {found.model.name}, {found.kind}, {found.parameters:,} parameters, {found.blocks} blocks, "
        f"{positions} positions",
        f"compared: base, {names}; adapters of rank {spec.method.rank} on every linear layer of the blocks: "
        f"{', '.join(spec.method.target_modules)}",
        f"trained on {data.train_items} of {found.items} items, {data.validation_items} held out: {steps} steps of "
        f"{optim.batch_size} ({optim.epochs:g} passes), warm-up {optim.warmup(steps)}, texts of {data.cutoff} tokens "
        f"at most (the longest has {found.tokens})",
        f"asked by protocol {', '.join(spec.evaluation.protocols)}: {scored} of {', '.join(data.tasks)}",
    ]
    return lines + [f"not adapted: {text}" for text in found.left_out]


def _of_trial(
    seen: Any, plan: Plan, known: int | None, said: bool, products: dict[str, float], dtype: str
) -> list[str]:
    why = "as asked" if said else "as in the runs that there are" if known else "the fastest here"
    told = ", ".join(f"{micro}: {1000 * seconds:.3g} ms" for micro, seconds in seen.steps.items())
    single, half = (products[name] / 1e9 for name in ("float32", "bfloat16"))
    sweep, after = plan.sweep, plan.confirmation()
    asked = len(plan.first.data.tasks) * (plan.first.data.test_items or 0)
    total = sum(seen.of(spec, spec.data.validation_items) for spec in sweep)
    total += sum(seen.of(spec, asked) for spec in after)
    more = plan.module.LONGER * len(plan.methods)
    advice = f"--with model.dtype=bfloat16 would use them, and round (it is {dtype})"
    return [
        f"micro-batch {plan.first.optim.micro_batch_size}, {why} (a step of {seen.tokens} tokens: {told}); it changes "  # type: ignore[union-attr]
        "nothing but rounding",
        f"products: {single:.0f} GFLOP/s in float32, {half:.0f} in bfloat16: "
        + (advice if half > 1.5 * single else "nothing to be had from the narrower type here"),
        f"runs: {len(sweep)} to choose the rates (and at most {more} more, where the best is an end of the grid), then "
        f"{len(after)}: about {_long(total)} of computing, {_long(total / len([*sweep, *after]))} each; beside it some "
        "seconds a run, for checkpoints and the start",
    ]


def _long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _of_paper(plan: Plan) -> list[str]:
    from dora_lab.report import card

    paper = card.nearest(plan.first, published_specs())
    told = [line for line in card.differences(plan.first, paper, published=True) if "learning_rate" not in line]
    return [
        f"what of it is not the paper's protocol (A: these runs; B: {card.name(paper)}), beside the rates:",
        *(f"  {line}" for line in told),
    ]


def _rates(plan: Plan, paths: Paths, runtime: Runtime, jobs: int | None) -> dict[str, float]:
    """The rate of each method; all grids are made longer by the same number of rates where one is too short."""
    module, grid = plan.module, plan.module.factors(plan.size)
    for left in range(module.LONGER, -1, -1):
        specs = module.sweep(plan.first, plan.methods, grid)
        outcomes = _run(specs, paths, runtime, jobs)
        found = {name: _choice(name, specs, paths.results) for name in plan.methods}
        if lost := next((name for name, choice in found.items() if choice is None), None):
            why = next((one.error for one in outcomes if one.spec.method.name == lost and one.error), "no loss")
            raise SpecError(f"no rate of {lost} has a validation loss; the first run's: {why}")
        chosen = {name: choice for name, choice in found.items() if choice is not None}
        ends = [name for name, choice in chosen.items() if choice.at_end]
        if not ends or not left:
            break
        top = chosen[ends[0]].lowest > module.MIDDLE[ends[0]] * grid[len(grid) // 2]
        grid = module.longer(grid, top)
        say(f"the best rate of {ends[0]} is the {'highest' if top else 'lowest'} tried: every grid gets one more")
    for name, choice in chosen.items():
        say(f"{name}: rate {choice.rate:g}{' (still an end of its grid)' if choice.at_end else ''}")
    return {name: choice.rate for name, choice in chosen.items()}


def _choice(name: str, specs: Sequence[Spec], results: Path) -> Choice | None:
    """Of a method, by the logarithm of the choice NLL on validation items, or by errors where answers are generated."""
    from dora_lab.report.rates import choose

    losses: dict[float, list[float]] = {}
    for spec in specs:
        if spec.method.name == name and spec.optim is not None:
            rows = read_stream(run_path(results, spec), "eval")
            values = [float(row["choice_nll"]) for row in rows if row.get("choice_nll") is not None]
            if len(values) == len(rows):
                # of answers that are all certain the mean rounds to 0, which has no logarithm
                loss = [math.log(max(sum(values) / len(values), sys.float_info.min))] if rows else []
            else:
                loss = [1 - sum(row["value"] for row in rows) / len(rows)]
            losses[spec.optim.learning_rate] = loss
    return choose(losses, 1)


def _run(specs: list[Spec], paths: Paths, runtime: Runtime, jobs: int | None) -> list[Outcome]:
    outcomes = run_many(specs, paths, runtime, jobs)
    if any(outcome.status == "interrupted" for outcome in outcomes):
        say("interrupted; the same command goes on")
        raise typer.Exit(STOPPED)
    return outcomes


def _finish(results: Path, outcomes: Sequence[Outcome]) -> None:
    """The table of these runs, and where it and the figure lie."""
    from dora_lab.commands.run import summary

    say(summary(outcomes, results))
    house_first()
    table, figure = (importlib.import_module(f"analysis.{kind}.own") for kind in ("tables", "figures"))
    say("\n" + table.text(results, {spec_id(outcome.spec) for outcome in outcomes}))
    for path in (*table.build(results), *figure.build(results)):
        say(path)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)
