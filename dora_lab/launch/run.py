"""Spec to run directory: skips what is complete, resumes what was interrupted, starts anew what failed.

Under `torchrun` all processes call `run_spec` with the same specs; the first one locks and writes the directory.

Torch is imported only when there is something to run. Several runs at once: see `pool.run_many`.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator

from dora_lab import distributed
from dora_lab.io.atomic import write_text
from dora_lab.launch.inputs import is_complete
from dora_lab.launch.runtime import AS_THE_TIER_SAYS, Paths, Runtime
from dora_lab.runs import checkpoints, provenance
from dora_lab.runs.directory import Follower, RunDir
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import read_record
from dora_lab.spec import Spec


def run_spec(spec: Spec, paths: Paths, runtime: Runtime = AS_THE_TIER_SAYS) -> str:
    """Run `spec` to its end in this process; returns "complete", or "skipped" if it was complete already.

    An exception is recorded (status failed; interrupted for KeyboardInterrupt and its kind, a disk that is full, and
    inputs that have changed) and raised again. A failed run starts anew, an interrupted or killed one goes on from its
    last checkpoint, and a complete one of other inputs (the embedded world or base has changed since) is replaced.
    Raises LockedError, naming the holder, if another process is at it, ValueError for shares of one process and for a
    device that is not there.
    """
    if runtime.shard and distributed.size() == 1:
        raise ValueError("a single process has nothing to share the weights with; start several with torchrun")
    distributed.start(gpu=runtime.of(spec.tier).device == "cuda")
    if distributed.share(distributed.first() and is_complete(spec, paths)):
        return "skipped"
    runtime = runtime.settled(spec)
    with _open(spec, paths) as run:
        if run.complete:
            if is_complete(spec, paths):  # another process finished it meanwhile
                return "skipped"
            run.restart("it was complete, of inputs that have changed since")
        try:
            _through(spec, paths, runtime, run)
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


def _through(spec: Spec, paths: Paths, runtime: Runtime, run: RunDir) -> None:
    """All stages, one after the other."""
    from dora_lab.launch import stages  # torch, transformers, lm-eval

    clock = _Clock(run)
    runtime.progress("load", 0, 0, None)
    with threads_of_torch(runtime.threads):
        with clock("load"):
            loaded = stages.load(spec, paths, runtime, run)
            stages.adapt(spec, paths, runtime, run, loaded)
        if spec.optim is not None:
            with clock("train"):
                stages.train(spec, paths, runtime, run, loaded)
        if distributed.first():
            with clock("evaluate"):
                stages.score(spec, runtime, run, loaded)
            run.record(peak_memory_bytes=provenance.peak_memory_bytes())


@contextlib.contextmanager
def threads_of_torch(number: int | None) -> Iterator[None]:
    """So many threads of torch, and afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
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
