"""Several runs at once: worker processes that stay (importing torch takes longer than a small run's loading).

The parent never imports torch. It hands a worker one spec after the other as lines of JSON and reads events back. A
worker is stopped with SIGTERM or by closing its input: the run in it is saved and marked `interrupted`. A run that
another process holds is put off and asked for again, so that two calls side by side share the work.

Under `torchrun` there are no workers: all its processes do one run after the other together.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from tqdm import tqdm

import dora_lab
from dora_lab import distributed
from dora_lab.launch.inputs import is_complete
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import AS_THE_TIER_SAYS, Paths, Runtime
from dora_lab.runs.errors import OUTSIDE, LockedError
from dora_lab.runs.record import read_record, run_path
from dora_lab.spec import Spec, from_dict, spec_id, to_dict

BAR = "{desc:42}{bar}{n_fmt}/{total_fmt}"
GRACE = 60.0  # seconds that a worker gets to save its run after it was asked to stop
# not `-m`, which has the working directory on its path: a random.py there would be taken for Python's
START = (
    "import sys; sys.path[:] = filter(None, sys.path); from dora_lab.launch.pool import work; work(int(sys.argv[1]))"
)
AGAIN = 2.0  # seconds until a run that another process holds is asked for again


@dataclass(frozen=True)
class Outcome:
    """How one spec of `run_many` ended."""

    spec: Spec
    status: str  # complete, skipped (was complete before, or done by another process meanwhile), failed, interrupted
    seconds: float = 0.0
    error: str | None = None


def run_many(
    specs: Sequence[Spec],
    paths: Paths,
    runtime: Runtime = AS_THE_TIER_SAYS,
    jobs: int | None = None,
    quiet: bool | None = None,
) -> list[Outcome]:
    """Run all `specs`, `jobs` at a time (None: as the tier says, see `runtime.TIERS`), and say how each ended.

    Complete runs are skipped; a failed one does not stop the others. Ctrl-C or SIGTERM interrupts those that run (the
    next call resumes them) and raises nothing: their outcome is "interrupted", as is that of those not begun. A run
    that another process is at is waited for at the end and "skipped" once that one has done it. `quiet` None shows
    progress bars on a terminal, else one line for each run that ends. `stop` and `progress` of `runtime` are its own.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs = {jobs} must be at least 1")
    if distributed.size() > 1 or runtime.shard:
        return _together(specs, paths, runtime)
    outcomes = {spec_id(spec): Outcome(spec, "skipped") for spec in specs if is_complete(spec, paths)}
    todo = [spec for spec in specs if spec_id(spec) not in outcomes]
    if todo:
        count = min(jobs or min(runtime.of(spec.tier).jobs for spec in todo), len(todo))
        with _screen(len(specs), len(outcomes), count, quiet) as screen:
            outcomes |= _Pool(todo, paths, runtime, count, screen).run()
    return [outcomes[spec_id(spec)] for spec in specs]


def describe(spec: Spec) -> str:
    """Short name of a run for people."""
    rank = f" r{spec.method.rank}" if spec.method.rank is not None else ""
    model = "" if spec.model.name == "mini" else f" {spec.model.name}"
    return f"{spec.method.name}{rank}{model} seed {spec.seed}"


def _together(specs: Sequence[Spec], paths: Paths, runtime: Runtime) -> list[Outcome]:
    """The specs one after the other in this process and its fellows; after one that does not end well, no more."""
    stop = threading.Event()
    outcomes: list[Outcome] = []
    with _on_signals(stop.set):
        for spec in specs:
            since = time.monotonic()
            if outcomes and outcomes[-1].status not in ("complete", "skipped"):
                outcomes.append(Outcome(spec, "interrupted", error="not begun"))
                continue
            try:
                status, error = run_spec(spec, paths, replace(runtime, stop=stop)), None
            except BaseException as reason:
                status = "interrupted" if isinstance(reason, OUTSIDE) else "failed"
                error = f"{type(reason).__name__}: {reason}"
            outcomes.append(Outcome(spec, status, time.monotonic() - since, error))
    return outcomes


class _Pool:
    def __init__(self, todo: Sequence[Spec], paths: Paths, runtime: Runtime, count: int, screen: _Screen) -> None:
        self.waiting = list(reversed(todo))
        self.paths, self.runtime, self.screen = paths, runtime, screen
        threads = {runtime.of(spec.tier).threads for spec in todo}
        self.threads = threads.pop() if len(threads) == 1 else None
        self.events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self.outcomes: dict[str, Outcome] = {}
        self.count = count
        self.workers: list[_Worker] = []
        self.stopping_since: float | None = None
        self.put_off: list[tuple[float, Spec]] = []  # held by another process: when to ask again
        self.told: set[str] = set()

    def run(self) -> dict[str, Outcome]:
        with _on_signals(self._stop):
            try:
                for place in range(self.count):
                    self._start(place)
                while any(worker.busy for worker in self.workers) or (self.put_off and not self.stopping_since):
                    try:
                        self._handle(*self.events.get(timeout=0.2))  # a short wait, so that signals are noticed
                    except queue.Empty:
                        self._notice_ended()
                    self._ask_again()
                    self._kill_late()
            finally:
                for worker in self.workers:
                    worker.close()
        for spec in [*self.waiting, *(spec for _, spec in self.put_off)]:
            self.outcomes[spec_id(spec)] = Outcome(spec, "interrupted", error="not begun")
        return self.outcomes

    def _start(self, place: int) -> None:
        worker = _Worker(self.events, self.threads, place)
        self.workers.append(worker)
        self._next(worker)

    def _next(self, worker: _Worker) -> None:
        if self.waiting and self.stopping_since is None:
            worker.give(self.waiting.pop(), self.paths, self.runtime)
        else:
            worker.busy = None

    def _ask_again(self) -> None:
        """Runs that another process held, where a worker has nothing else to do."""
        for worker in self.workers:
            due = [entry for entry in self.put_off if entry[0] <= time.monotonic()]
            if worker.busy or not due or self.stopping_since is not None:
                continue
            self.put_off.remove(due[0])
            if is_complete(due[0][1], self.paths):
                self._finish(worker, due[0][1], "skipped", None)
            else:
                worker.give(due[0][1], self.paths, self.runtime)

    def _notice_ended(self) -> None:
        """A process that is gone while one that it started holds its pipe open."""
        for worker in [worker for worker in self.workers if worker.busy and worker.process.poll() is not None]:
            self._handle(worker, None)

    def _put_off(self, spec: Spec, holder: str) -> None:
        if spec_id(spec) not in self.told:
            self.told.add(spec_id(spec))
            self.screen.say(f"{describe(spec)}: put off, {holder}")
        self.put_off.append((time.monotonic() + AGAIN, spec))

    def _handle(self, worker: _Worker, event: dict[str, Any] | None) -> None:
        spec = worker.busy
        if spec is None:
            return
        if event is None:  # the process is gone
            self._finish(worker, spec, "interrupted", f"the worker process ended: {worker.last_words()}")
            worker.busy = None
            worker.close()
            self.workers.remove(worker)
            if (self.waiting or self.put_off) and self.stopping_since is None:
                self._start(worker.place)
        elif event["event"] == "progress":
            self.screen.progress(worker.place, spec, event)
        elif event["status"] == "locked":
            self._put_off(spec, event["error"])
            self._next(worker)
        else:
            self._finish(worker, spec, event["status"], event.get("error"))
            self._next(worker)

    def _finish(self, worker: _Worker, spec: Spec, status: str, error: str | None) -> None:
        outcome = Outcome(spec, status, time.monotonic() - worker.since, error)
        self.outcomes[spec_id(spec)] = outcome
        self.screen.finish(worker.place, outcome, self.paths)

    def _stop(self) -> None:
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            self.screen.say("stopping: running runs are saved and marked interrupted; the next call resumes them")
            for worker in self.workers:
                worker.terminate()

    def _kill_late(self) -> None:
        if self.stopping_since is not None and time.monotonic() - self.stopping_since > GRACE:
            for worker in self.workers:
                worker.process.kill()


class _Worker:
    """One worker process as the parent sees it."""

    def __init__(self, events: queue.Queue[Any], threads: int | None, place: int) -> None:
        self.place, self.busy, self.since = place, cast("Spec | None", None), time.monotonic()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process is)
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if threads is not None:  # read by the libraries when they are first imported
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        root, paths = str(Path(dora_lab.__file__).parents[1]), os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, paths)))  # it may be no installed package
        reader, writer = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(writer)],
            stdin=subprocess.PIPE,
            stdout=self.errors,  # whatever prints, and when: it does not mix with the events
            stderr=self.errors,
            text=True,
            env=environment,
            pass_fds=(writer,),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then asks
        )
        os.close(writer)
        threading.Thread(target=self._listen, args=(events, reader), daemon=True).start()

    def _listen(self, events: queue.Queue[Any], reader: int) -> None:
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):  # else it was killed while it wrote
                    events.put((self, json.loads(line)))
        events.put((self, None))

    def give(self, spec: Spec, paths: Paths, runtime: Runtime) -> None:
        self.busy, self.since = spec, time.monotonic()
        places = {name: None if path is None else str(path) for name, path in vars(paths).items()}
        stdin = cast("IO[str]", self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it died just now: its end is reported by _listen
            job = {"spec": to_dict(spec), "paths": places, "runtime": runtime.plain()}
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{reason}{': ' + lines[-1] if lines and code > 0 else ''}"

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            cast("IO[str]", self.process.stdin).close()
        try:
            self.process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


class _Screen:
    """Progress for people: bars on a terminal (the whole, and each run that is going on), else a line at each end."""

    def __init__(self, total: int, done: int, workers: int, bars: bool) -> None:
        self.total, self.done, self.bars = total, done, bars
        self.whole = tqdm(total=total, initial=done, desc="runs", position=0, disable=not bars, leave=True)
        self.each = [
            tqdm(total=1, position=place + 1, disable=not bars, leave=False, bar_format=BAR) for place in range(workers)
        ]

    def progress(self, place: int, spec: Spec, event: dict[str, Any]) -> None:
        bar = self.each[place]
        if self.bars:
            loss = f" loss {event['loss']:.3f}" if event["loss"] is not None else ""
            bar.total, bar.n = event["of"] or 1, event["done"]
            bar.set_description_str(f"  {describe(spec)}: {event['phase']}{loss}")

    def finish(self, place: int, outcome: Outcome, paths: Paths) -> None:
        self.done += 1
        self.whole.update()
        self.each[place].set_description_str("")
        if not self.bars or outcome.error:
            where = run_path(paths.results, outcome.spec)
            problem = f": {outcome.error} ({where})" if outcome.error else ""
            ended = f"{outcome.status}, {outcome.seconds:.0f} s{problem}"
            self.say(f"[{self.done}/{self.total}] {describe(outcome.spec)}: {ended}")

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        for bar in (*reversed(self.each), self.whole):
            bar.close()


@contextlib.contextmanager
def _screen(total: int, done: int, workers: int, quiet: bool | None) -> Iterator[_Screen]:
    screen = _Screen(total, done, workers, bars=not quiet if quiet is not None else sys.stderr.isatty())
    try:
        yield screen
    finally:
        screen.close()


@contextlib.contextmanager
def _on_signals(action: Any) -> Iterator[None]:
    """Call `action` on Ctrl-C and SIGTERM while inside; signals can only be caught in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: action()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(events: int) -> None:
    """The worker's side: read jobs from stdin, write events to the file descriptor `events`."""
    answers = open(events, "w", buffering=1, encoding="utf-8")  # noqa: SIM115  (open as long as the process is)
    stop = threading.Event()
    jobs: queue.Queue[str | None] = queue.Queue()
    signal.signal(signal.SIGTERM, lambda *_: (stop.set(), jobs.put(None)))
    signal.signal(signal.SIGINT, lambda *_: (stop.set(), jobs.put(None)))

    def listen() -> None:
        # unbuffered: a buffered reader that still waits would break the interpreter's shutdown
        with open(0, "rb", buffering=0, closefd=False) as stdin:
            while line := stdin.readline():
                jobs.put(line.decode())
        jobs.put(None)
        if busy.is_set():  # the parent is gone
            stop.set()

    busy = threading.Event()
    threading.Thread(target=listen, daemon=True).start()
    while not stop.is_set() and (line := jobs.get()) is not None:
        job = json.loads(line)
        spec = from_dict(job["spec"])
        places = {name: None if path is None else Path(path) for name, path in job["paths"].items()}
        paths = Paths(**cast(Any, places))
        busy.set()
        runtime = Runtime(**job["runtime"], stop=stop)
        answers.write(json.dumps({"event": "end", **_one(spec, paths, runtime, answers)}) + "\n")
        busy.clear()


def _one(spec: Spec, paths: Paths, runtime: Runtime, answers: IO[str]) -> dict[str, Any]:
    last = 0.0

    def progress(phase: str, done: int, of: int, loss: float | None) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            event = {"event": "progress", "phase": phase, "done": done, "of": of, "loss": loss}
            answers.write(json.dumps(event) + "\n")

    try:
        return {"status": run_spec(spec, paths, replace(runtime, progress=progress))}
    except LockedError as reason:
        return {"status": "locked", "error": str(reason)}
    except OUTSIDE as reason:
        return {"status": "interrupted", "error": str(reason)}
    except Exception as error:
        with contextlib.suppress(Exception):  # the record's words where the run got as far as having one
            record = read_record(run_path(paths.results, spec))
            status = "interrupted" if record["status"] == "interrupted" else "failed"  # its training is done and kept
            return {"status": status, "error": record["error"] or f"{type(error).__name__}: {error}"}
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"}
