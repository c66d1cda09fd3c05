"""Spec to run directory: skips what is complete, resumes what was interrupted, starts anew what failed.

Under `torchrun` all processes call `run_spec` with the same specs; the first one locks and writes the directory.

Torch is imported only when there is something to run. Several runs at once: see `workers.run_many`.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lab import distributed
from dora_lab.io.atomic import write_text
from dora_lab.io.errors import LoadError
from dora_lab.launch import inputs
from dora_lab.models.base import adapter_folder, model_and_tokenizer, model_folder, token_policy
from dora_lab.runs import checkpoints, provenance
from dora_lab.runs.directory import Follower, RunDir
from dora_lab.runs.errors import ResumeError, StoreError
from dora_lab.runs.record import read_record, run_path
from dora_lab.spec import Spec
from dora_lab.tasks import sources

if TYPE_CHECKING:
    from safetensors import safe_open
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int, float | None], None]  # phase, done, of, loss


@dataclass(frozen=True)
class Paths:
    """Where things lie on this machine: never part of a spec."""

    results: Path  # results folder; runs go to its `runs/<experiment>/<spec_id>`
    data_dir: Path | None = None  # folder of the data source "llm_adapters"
    model_dir: Path | None = None  # saved model to use instead of the package's or the hub's
    adapter_dir: Path | None = None  # folder of the adapter that `model.adapter` names


def is_complete(spec: Spec, paths: Paths) -> bool:
    """Whether the run of `spec` is there, complete and of the inputs as they are now. Imports no torch."""
    try:
        record = read_record(run_path(paths.results, spec))
    except StoreError:
        return False
    return record["status"] == "complete" and not _changed_inputs(spec, paths, record)


def run_spec(
    spec: Spec,
    paths: Paths,
    *,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    checkpoint_steps: int | None = None,
    allow_pickle: bool = False,
    shard: bool = False,
) -> str:
    """Run `spec` to its end in this process; returns "complete", or "skipped" if it was complete already.

    An exception is recorded (status failed; interrupted for KeyboardInterrupt and its kind, a disk that is full, and
    inputs that have changed) and raised again. A failed run starts anew, an interrupted or killed one goes on from its
    last checkpoint, and a complete one of other inputs (the embedded world or base has changed since) is replaced.
    shard: while training, each process holds a share of every weight (FSDP2) instead of all (DDP).
    allow_pickle: read the adapter that `model.adapter` names from a pickled file (tensors only) if it has no other.
    Raises LockedError, naming the holder, if another process is at it, ValueError for shares of one process.
    """
    if shard and distributed.size() == 1:
        raise ValueError("a single process has nothing to share the weights with; start several with torchrun")
    distributed.start(gpu=spec.tier == "paper")
    if distributed.share(distributed.first() and is_complete(spec, paths)):
        return "skipped"
    with _open(spec, paths) as run:
        if run.complete:
            if is_complete(spec, paths):  # another process finished it meanwhile
                return "skipped"
            run.restart("it was complete, of inputs that have changed since")
        try:
            with _threads(spec):
                _fill(spec, paths, run, stop, progress or (lambda *_: None), checkpoint_steps, allow_pickle, shard)
        except Exception:
            if distributed.first():
                with contextlib.suppress(OSError):
                    write_text(run.path / "traceback.txt", traceback.format_exc())
            raise
        if distributed.first():
            (run.path / "traceback.txt").unlink(missing_ok=True)
            run.finish("complete")
            checkpoints.clear(run.checkpoints)
    return "complete"


def _open(spec: Spec, paths: Paths) -> RunDir:
    """The run directory, locked by the first process; the others follow it, or fail with it."""
    if distributed.size() == 1:
        return RunDir.open(paths.results, spec)
    run, problem = None, None
    if distributed.first():
        try:
            run = RunDir.open(paths.results, spec)
        except StoreError as error:
            problem = error
    if problem := distributed.share(problem):
        raise problem
    return run or Follower.open(paths.results, spec)


def _fill(
    spec: Spec,
    paths: Paths,
    run: RunDir,
    stop: threading.Event | None,
    progress: Progress,
    checkpoint_steps: int | None,
    allow_pickle: bool,
    shard: bool,
) -> None:
    import torch

    from dora_lab.evaluation.builtin import load_builtin
    from dora_lab.evaluation.evaluate import evaluate
    from dora_lab.methods.inject import merge

    shard = shard and spec.optim is not None  # only training takes shares: the first process evaluates alone
    provenance.reset_peak_memory()
    clock = _Clock(run)
    progress("load", 0, 0, None)
    with clock("load"):
        with _begun_is_kept(run):
            found = inputs.fingerprints(spec, paths.data_dir, paths.model_dir, paths.adapter_dir)
            _compare(run, found)
            items = sources.items(spec, paths.data_dir)
            if "builtin" in spec.evaluation.protocols:  # now, not after days of training
                for task in spec.data.tasks:
                    load_builtin(task)
            model, tokenizer = model_and_tokenizer(spec, paths.model_dir)
        # the small tier runs on the processor everywhere, so that its numbers can be compared
        device = "cuda" if spec.tier == "paper" and torch.cuda.is_available() else "cpu"
        if not shard:
            model.to(device)  # type: ignore[arg-type]
        base = model_folder(spec.model, paths.model_dir)
        run.record(
            inputs={
                **found,
                "items": items.counts(),
                "sources": list(items.sources),
                "pad_token": tokenizer.pad_token,
                "tokens": token_policy(tokenizer),
            },
            params=_adapt(model, spec, paths, allow_pickle),
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            processes=distributed.size(),
            sharded=shard,
        )
        if shard:
            distributed.shard(model, device)
    if spec.optim is not None:
        from dora_lab.training.fit import train
        from dora_lab.training.trained_weights import fill_trained, trained_weights

        with _probes(spec, run, base) as callbacks, clock("train"):
            summary = train(
                spec,
                model,
                tokenizer,
                items,
                run,
                stop,
                lambda step, steps, loss: progress("train", step, steps, loss),
                callbacks,
                checkpoint_steps,
            )
            if shard:  # what was trained, on a base of its own in one piece
                trained = trained_weights(model)
                del model
                if distributed.first():
                    model, _ = model_and_tokenizer(spec, paths.model_dir)
                    model.to(device)  # type: ignore[arg-type]
                    _adapt(model, spec, paths, allow_pickle)
                    fill_trained(model, trained, "the run")
            if distributed.first():
                _save_adapter(model, spec, run)
        run.record(training=summary)
    if not distributed.first():
        return
    with clock("evaluate"):
        weights = spec.evaluation.weights
        if weights == "merged" or (weights == "exact" and spec.model.dtype == "float32"):  # narrower types round
            merge(model, keep=False)
        evaluate(
            spec,
            model,
            tokenizer,
            items.split(spec.evaluation.split),
            run,
            stop,
            lambda done, of: progress("evaluate", done, of, None),
        )
    run.record(peak_memory_bytes=provenance.peak_memory_bytes())


def _adapt(model: PreTrainedModel, spec: Spec, paths: Paths, allow_pickle: bool) -> dict[str, int]:
    """Put the adapter on: a new one to be trained, or the saved one that `model.adapter` names."""
    from dora_lab.methods.inject import inject

    params = inject(model, spec.method, spec.seed)
    if spec.model.adapter is None:
        return params
    from dora_lab.formats.live import load_adapter

    load_adapter(model, adapter_folder(spec.model, paths.adapter_dir), allow_pickle=allow_pickle)
    counted = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trainable": sum(n for n, trained in counted if trained), "total": sum(n for n, _ in counted)}


@contextlib.contextmanager
def _threads(spec: Spec) -> Iterator[None]:
    """One thread for the mini tier: sums are added up in the same order on every machine, and runs go side by side."""
    import torch

    before = torch.get_num_threads()
    if spec.tier == "mini":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Seconds per phase, added to the record over interruptions."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.before: dict[str, float] = read_record(run.path).get("seconds") or {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.run.record(seconds={phase: round(self.before.get(phase, 0.0) + time.monotonic() - start, 2)})


@contextlib.contextmanager
def _probes(spec: Spec, run: RunDir, base: Path) -> Iterator[list[Any]]:
    """The decomposition callback of the spec, reading initial weights from the base model's file where it can."""
    if spec.probe is None:
        yield []
        return
    from safetensors import safe_open

    from dora_lab.probing.callback import DecompositionCallback

    with contextlib.ExitStack() as stack:
        files = {
            name: file
            for path in sorted(base.glob("*.safetensors"))
            for file in [stack.enter_context(safe_open(path, "pt"))]
            for name in file.keys()  # noqa: SIM118  (a safetensors file is not a mapping)
        }
        yield [
            DecompositionCallback(
                lambda row: run.append("probe", row),
                spec.probe.fractions,
                initial=lambda name: _initial(files, name, spec),
            )
        ]


def _initial(files: dict[str, safe_open], name: str, spec: Spec) -> Any:
    """W0 as the run loaded it: in `model.dtype`."""
    import torch

    if name not in files:
        raise LoadError(f"'{name}' is not in the base model's files, so its change cannot be measured")
    return files[name].get_tensor(name).to(getattr(torch, spec.model.dtype))


def _save_adapter(model: PreTrainedModel, spec: Spec, run: RunDir) -> None:
    from dora_lab.formats.live import save_trained

    save_trained(model, run.adapter, spec.model.name)


def _changed_inputs(spec: Spec, paths: Paths, record: dict[str, Any]) -> bool:
    then = record.get("inputs") or {}
    now = inputs.fingerprints(spec, paths.data_dir, paths.model_dir, paths.adapter_dir)
    return any(now[name] != then.get(name) for name in now)


@contextlib.contextmanager
def _begun_is_kept(run: RunDir) -> Iterator[None]:
    """Inputs that are not found now are no failure of a run that had them before: it waits for them."""
    begun = "inputs" in read_record(run.path)
    try:
        yield
    except LoadError as error:
        if begun:
            raise ResumeError(str(error)) from error
        raise


def _compare(run: RunDir, found: dict[str, Any]) -> None:
    """Refuse to go on with other inputs, and note other code: the record of a run has to be true of all of it."""
    if not distributed.first():
        return
    now = {"code": provenance.code(), "packages": provenance.packages()}
    then = read_record(run.path)
    known = {name: value for name, value in (then.get("inputs") or {}).items() if name in found}
    if differing := checkpoints.differences(known, {name: found[name] for name in known}, "inputs."):
        raise ResumeError(
            f"{run.path} was begun with something else: {'; '.join(differing)}. Put it back, or remove the folder to "
            "start anew"
        )
    if "code" in then and (changed := checkpoints.differences({name: then.get(name) for name in now}, now)):
        run.note(f"went on with other code or packages: {'; '.join(changed)}")
    run.record(**now, machine=provenance.machine())
