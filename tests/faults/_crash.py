"""Runs in processes of their own that are killed, and what must be the same afterwards (for `crashes` and the tests).

A run here is a real one on a tiny model, forked from this process (importing torch again would take longer than the
run). `killed_at` ends it with SIGKILL at its k-th file operation: before an open for writing, a rename, a removal, a
truncation, a new folder or an fsync, or, in a file that torch or safetensors writes, in the middle of its bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tqdm.auto
import tqdm.std

from dora_lab.io.files import sha256
from dora_lab.launch import pool
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.runs import checkpoints
from dora_lab.runs.record import run_path
from dora_lab.spec import Method, Spec
from dora_lab.training import trainer
from tests.tiny import make_spec, save_data, save_model

EVERY = 2  # optimiser steps between checkpoints
STEPS = 6
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}  # audit events beside "open"


def small_spec(method: str = "dora", **changes: Any) -> Spec:
    """A run of six steps with a checkpoint every second one, dropout, accumulation, a probe and an evaluation."""
    given = {"optim__epochs": 1.2, "data__tasks": "boolq", "data__test_items": 4, "evaluation__max_new_tokens": 4}
    given |= {"evaluation__protocols": "generate", "probe__fractions": "0.3,0.6,1.0"}
    spec = make_spec(**given | changes)
    if method == "ft":
        return replace(spec, method=Method(name="ft"))
    return replace(spec, method=replace(spec.method, name=method))


@functools.cache
def inputs() -> Path:
    """A folder with a tiny model and data, made once."""
    import dora_lab.launch.stages  # noqa: F401  (imported here once, not in every child)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = Path(tempfile.mkdtemp(prefix="dora-lab-faults-"))
    save_model(folder / "model")
    save_data(folder / "data", test=64)
    return folder


def paths(root: Path) -> Paths:
    """Where the runs of a test lie, and what they are made of."""
    return Paths(root, inputs() / "data", inputs() / "model")


def run(root: Path, spec: Spec, **options: Any) -> None:
    """Run `spec` in this process; its checkpoints stay, to be compared."""
    import torch

    torch.set_num_threads(1)
    checkpoints.clear = lambda folder: None  # only ever in a child
    run_spec(spec, paths(root), Runtime(checkpoint_steps=EVERY, **options))


def child(work: Callable[[], Any], errors: Path | None = None, **environment: str) -> int:
    """Start `work` in a forked process; returns its id. Its traceback goes to the file `errors`."""
    sys.stdout.flush()
    sys.stderr.flush()
    inputs()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # OpenMP's threads do not survive a fork; accelerate asks for more than one unless this says otherwise
        os.environ.update({"OMP_NUM_THREADS": "1"} | environment)
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # its lock is one for all forks: a killed one may hold it for ever
            bar.set_lock(threading.RLock())
        work()
        code = 0
    except BaseException:
        if errors:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            errors.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(ready: Callable[[], bool], pids: Sequence[int], errors: Path) -> None:
    """Wait for what children are to do; AssertionError, with what they left in `errors`, if one ends before."""
    end = time.monotonic() + 120
    while not ready():
        gone = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]]
        told = "\n".join(file.read_text() for file in errors.parent.glob(f"{errors.stem}*.txt"))
        assert not gone, f"child {gone} ended before: {told}"
        assert time.monotonic() < end, f"nothing in two minutes: {told}"
        time.sleep(0.005)


def finish(root: Path, spec: Spec, processes: int = 1, shard: bool = False) -> None:
    """Let the run end in a fresh child (or several, as torchrun starts them); AssertionError if it does not."""
    errors = root / "errors.txt"
    root.mkdir(parents=True, exist_ok=True)
    codes = [ended(pid) for pid in start(root, spec, processes, errors, shard)]
    told = [file.read_text() for file in root.glob("errors*.txt")]
    assert codes == [0] * processes, "\n".join(told) or codes


def start(root: Path, spec: Spec, processes: int = 1, errors: Path | None = None, shard: bool = False) -> list[int]:
    """Begin the run in one child or in several that make up one distributed run; returns their ids."""
    if processes == 1:
        return [child(lambda: run(root, spec), errors)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        child(
            lambda: run(root, spec, shard=shard),
            errors and errors.with_name(f"errors{rank}.txt"),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
        )
        for rank in range(processes)
    ]


def result(root: Path, spec: Spec) -> dict[str, str]:
    """SHA-256 of all that must not depend on how often a run was cut short; wall times are in timing.jsonl alone."""
    path = run_path(root, spec)
    assert json.loads((path / "record.json").read_text())["status"] == "complete"
    files = [path / f"{stream}.jsonl" for stream in ("metrics", "probe", "eval")]
    files += [file for file in sorted((path / "adapter").iterdir()) if file.suffix == ".safetensors"]
    last = path / "checkpoints" / f"checkpoint-{STEPS}"
    files += [file for file in sorted(last.iterdir()) if file.name != checkpoints.MANIFEST]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt"} <= {file.name for file in files}
    return {str(file.relative_to(path)): sha256(file) for file in files}


@functools.cache
def reference(spec: Spec, processes: int = 1, shard: bool = False) -> dict[str, str]:
    """What the run comes to when nothing happens to it."""
    root = Path(tempfile.mkdtemp(prefix="dora-lab-whole-"))
    finish(root, spec, processes, shard)
    return result(root, spec)


def same_as_whole(root: Path, spec: Spec, processes: int = 1, shard: bool = False) -> None:
    """Finish the run and compare it, byte for byte, with one that nothing happened to."""
    finish(root, spec, processes, shard)
    found, wanted = result(root, spec), reference(spec, processes, shard)
    assert found == wanted, sorted(name for name in wanted if found.get(name) != wanted[name])


class Killer:
    """Counts this process's file operations under `root` while `inside`, and ends it at the k-th one (None: never)."""

    def __init__(self, root: Path, k: int | None, rng: random.Random) -> None:
        self.root, self.k, self.rng = str(root), k, rng
        self.count, self.inside = 0, False

    def install(self) -> None:
        """For good: only ever in a child."""
        sys.addaudithook(self._audit)
        fsync = os.fsync
        os.fsync = lambda handle: (self.tick(), fsync(handle))[1]  # type: ignore[assignment]
        import torch

        torch.save = self._torn(torch.save, 1)
        trainer.save_file = self._torn(trainer.save_file, 1)

    def tick(self) -> bool:
        """One operation; whether it is the fatal one is the caller's to know where it can do half of it."""
        if not self.inside:
            return False
        self.count += 1
        if self.count == self.k:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.inside or (event != "open" and event not in OPERATIONS):
            return
        path = arguments[0]
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        # relative names: a tree is removed by names within an open folder
        if isinstance(path, str | Path) and (str(path).startswith(self.root) or not os.path.isabs(path)):
            self.tick()

    def _torn(self, save: Callable[..., Any], place: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.inside and self.count + 1 == self.k:
                save(*arguments, **options)
                file = Path(arguments[place])
                os.truncate(file, int(file.stat().st_size * self.rng.random()))
            self.tick()
            return save(*arguments, **options)

        return wrapped


def count_or_kill(root: Path, spec: Spec, window: str, k: int | None, seed: int) -> int:
    """Run `spec` in a child that dies at file operation `k` of a window; returns the operations that it counted.

    window: "save" (of the second checkpoint), "finish" (of the record and what follows) or "run" (all of it).
    """
    root.mkdir(parents=True, exist_ok=True)
    counted = root / "counted.txt"

    def work() -> None:
        killer = Killer(run_path(root, spec), k, random.Random(seed))
        killer.install()
        with _window(killer, window):
            run(root, spec)
        killer.inside = False
        counted.write_text(str(killer.count))

    code = ended(child(work, root / "errors.txt"))
    if k is None:
        assert code == 0, (root / "errors.txt").read_text()
        return int(counted.read_text())
    assert code == -signal.SIGKILL, (code, k)
    return k


@contextlib.contextmanager
def _window(killer: Killer, window: str) -> Iterator[None]:
    """Set `killer.inside` while the window lasts."""
    from dora_lab.runs.directory import RunDir

    owner: Any = trainer.RunTrainer if window == "save" else RunDir
    name = {"save": "_save_checkpoint", "finish": "finish", "run": "__enter__"}[window]
    original = getattr(owner, name)

    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        killer.inside = window != "save" or self.state.global_step == 2 * EVERY
        try:
            return original(self, *arguments, **options)
        finally:
            killer.inside = killer.inside and window != "save"

    setattr(owner, name, wrapped)
    yield


def kill_again_and_again(
    root: Path, spec: Spec, rng: random.Random, longest: float, processes: int = 1, shard: bool = False
) -> int:
    """SIGKILL the run at random moments until it is through once; returns how often it was killed."""
    kills = 0
    while kills < 25:
        pids = start(root, spec, processes, shard=shard)
        deadline = time.monotonic() + rng.uniform(0.02, longest)
        codes: dict[int, int] = {}
        while len(codes) < processes and time.monotonic() < deadline:
            for pid in pids:
                found, status = os.waitpid(pid, os.WNOHANG) if pid not in codes else (0, 0)
                codes |= {pid: os.waitstatus_to_exitcode(status)} if found else {}
            time.sleep(0.005)
        for pid in pids:
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)
                codes[pid] = ended(pid)
        if all(code == 0 for code in codes.values()):
            return kills
        assert set(codes.values()) <= {0, 1, -signal.SIGKILL}
        kills += 1
        longest *= 1.3
    return kills


def together(root: Path, spec: Spec, errors: Path) -> None:
    """One run in this process as a worker does it: SIGTERM asks it to stop."""
    import torch

    torch.set_num_threads(1)
    (outcome,) = pool._together([spec], paths(root), Runtime())
    errors.write_text(f"{outcome.status}: {outcome.error}")


def begin(root: Path, spec: Spec, action: Callable[[], Any], at: int = STEPS - 1, processes: int = 1) -> int:
    """Run until step `at` is logged, then do `action` in the run's own process; returns how that one ended.

    With `kill_me` the run has two checkpoints and rows after the newer one.
    """
    root.mkdir(parents=True, exist_ok=True)

    def progress(phase: str, done: int, of: int, loss: float | None) -> None:
        if phase == "train" and done == at:
            action()

    return ended(child(lambda: run(root, spec, progress=progress), root / "errors.txt"))


def kill_me() -> None:
    """SIGKILL to the process that calls it."""
    os.kill(os.getpid(), signal.SIGKILL)


def poison(kind: str, step: int, value: float) -> None:
    """Put `value` into the loss, a gradient or a weight at an optimiser step (from 1): only ever in a child."""
    compute_loss, look = trainer.RunTrainer.compute_loss, trainer.Watch.on_optimizer_step

    def weight(trainer: Any) -> Any:
        return next(weight for weight in trainer.network.parameters() if weight.requires_grad)

    def poisoned_loss(self: Any, *arguments: Any, **options: Any) -> Any:
        loss = compute_loss(self, *arguments, **options)
        if self.state.global_step + 1 == step and kind == "gradient":
            weight(self).register_hook(lambda gradient: gradient * value)
        return loss * value if self.state.global_step + 1 == step and kind == "loss" else loss

    def poisoned_weight(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step + 1 == step and kind == "weight":
            weight(self.trainer).data.flatten()[0] = value
        look(self, args, state, control, **options)

    trainer.RunTrainer.compute_loss = poisoned_loss  # type: ignore[method-assign]
    trainer.Watch.on_optimizer_step = poisoned_weight  # type: ignore[method-assign]
