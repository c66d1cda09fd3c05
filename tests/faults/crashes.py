"""Faults of the machine: processes that die, disks that are full, checkpoints that change, numbers that are none.

After each, the run is finished and is the same, byte for byte, as one that nothing happened to (`same_as_whole`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dora_lab import report
from dora_lab.launch import stages
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.runs import checkpoints
from dora_lab.runs.errors import LockedError, ResumeError, StoreError
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Spec, derive
from tests.faults import Skipped, fault
from tests.faults import _crash as crash


def any_spec(rng: random.Random) -> Spec:
    """FT, LoRA or DoRA, with another seed now and then; dropout and accumulation in all that have them."""
    return crash.small_spec(rng.choice(["ft", "lora", "dora"]))


def damaged(root: Path, spec: Spec, name: str, rng: random.Random) -> str:
    """Flip a bit of a file of the newest checkpoint; it must be found, put aside by name and made up for."""
    path = run_path(root, spec)
    file = path / "checkpoints" / "checkpoint-4" / name
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    crash.same_as_whole(root, spec)
    (moved,) = (path / "checkpoints" / "quarantine").iterdir()
    assert moved.name.startswith("checkpoint-4."), moved
    notes = read_record(path)["notes"]
    assert read_record(path)["training"]["resumed_from"] == 2
    return next(note for note in notes if "is broken" in note)


@fault(2, "a bit flips in a checkpoint")
def bit_flip(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    crash.begin(folder, spec, crash.kill_me)
    files = sorted((run_path(folder, spec) / "checkpoints" / "checkpoint-4").iterdir())
    return damaged(folder, spec, rng.choice(files).name, rng)


def killed_in(folder: Path, rng: random.Random, window: str) -> str:
    spec = any_spec(rng)
    of = crash.count_or_kill(folder / "count", spec, window, None, 0)
    k = rng.randint(1, of)
    crash.count_or_kill(folder / "killed", spec, window, k, rng.randrange(1 << 30))
    crash.same_as_whole(folder / "killed", spec)
    return f"killed at file operation {k} of {of}; run again: the same run, byte for byte"


@fault(4, "killed at any file operation of saving a checkpoint")
def killed_while_saving(folder: Path, rng: random.Random) -> str:
    return killed_in(folder, rng, "save")


@fault(4, "killed at any file operation of finishing the record")
def killed_while_finishing(folder: Path, rng: random.Random) -> str:
    return killed_in(folder, rng, "finish")


@fault(4, "killed at any file operation of the run")
def killed_anywhere(folder: Path, rng: random.Random) -> str:
    return killed_in(folder, rng, "run")


@fault(4, "killed at random moments, again and again")
def killed_again(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    kills = crash.kill_again_and_again(folder, spec, rng, longest=1.0)
    crash.same_as_whole(folder, spec)
    return f"killed {kills} times; the same run, byte for byte"


@fault(4, "two processes of one run killed at random moments")
def killed_together(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    kills = crash.kill_again_and_again(folder, spec, rng, longest=0.7, processes=2)
    crash.same_as_whole(folder, spec, processes=2)
    return f"both killed {kills} times; the same run, byte for byte"


@fault(4, "two processes that share the weights (FSDP2) killed at random moments")
def killed_sharing(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    kills = crash.kill_again_and_again(folder, spec, rng, longest=0.9, processes=2, shard=True)
    crash.same_as_whole(folder, spec, processes=2, shard=True)
    return f"both killed {kills} times; the same run, byte for byte"


@fault(4, "one of two processes of one run killed")
def one_of_two_killed(folder: Path, rng: random.Random) -> str:
    spec = derive(any_spec(rng), {"optim.epochs": 8.0})
    pids = crash.start(folder, spec, 2, folder / "errors.txt")
    crash.wait_for(lambda: len(read_stream(run_path(folder, spec), "metrics")) >= 3, pids, folder / "errors.txt")
    time.sleep(rng.random() / 5)
    killed = rng.randrange(2)
    os.kill(pids[killed], signal.SIGKILL)
    codes = [crash.ended(pid) for pid in pids]
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1, codes
    told = (folder / f"errors{1 - killed}.txt").read_text().strip().splitlines()[-1]
    record = read_record(run_path(folder, spec))
    assert record["status"] == ("interrupted" if killed else "running"), record["error"]
    assert "another process of the run has ended" in told, told
    (folder / f"errors{1 - killed}.txt").unlink()
    crash.finish(folder, spec, 2)
    record = read_record(run_path(folder, spec))
    assert record["training"]["resumed_from"]
    crash.finish(folder / "whole", spec, 2)
    for stream in ("metrics", "probe", "eval"):
        found, wanted = (run_path(root, spec) / f"{stream}.jsonl" for root in (folder, folder / "whole"))
        assert found.read_bytes() == wanted.read_bytes(), stream
    return told.partition(": ")[2]


@fault(4, "a file of a checkpoint is missing")
def missing_file(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    crash.begin(folder, spec, crash.kill_me)
    path = run_path(folder, spec)
    name = rng.choice(sorted(file.name for file in (path / "checkpoints" / "checkpoint-4").iterdir()))
    (path / "checkpoints" / "checkpoint-4" / name).unlink()
    crash.same_as_whole(folder, spec)
    assert read_record(path)["training"]["resumed_from"] == 2
    return next(note for note in read_record(path)["notes"] if "is broken" in note)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own; Skipped where this process may not mount one."""
    place = folder / "disk"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped(f"no file system of its own can be mounted here ({error})") from None
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


def last_error(root: Path) -> str:
    """The last line of the traceback that a child left."""
    return last_error_of((root / "errors.txt").read_text())


def last_error_of(told: str) -> str:
    return told.strip().splitlines()[-1].partition(": ")[2]


@fault(5, "the disk has no room for a checkpoint (found before writing)")
def disk_nearly_full(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    with small_disk(folder, "4m") as disk:
        code = crash.begin(disk, spec, lambda: fill(disk, rng.randint(0, 1 << 20)), at=3)
        assert code == 1 and "checkpoint-2 stays" in last_error(disk)
        (disk / "filler").unlink()
        assert not (run_path(disk, spec) / "checkpoints" / checkpoints.PARTIAL).exists()
        crash.same_as_whole(disk, spec)
        assert read_record(run_path(disk, spec))["training"]["resumed_from"] == 2
        return last_error(disk)


@fault(5, "the disk fills while a checkpoint is written")
def disk_full(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    with small_disk(folder, "4m") as disk:

        def blind() -> None:  # the look at the disk before writing is kept from seeing it
            usage = shutil.disk_usage(disk)
            shutil.disk_usage = lambda _: usage._replace(free=1 << 40)
            fill(disk, rng.randint(1, 12) * 4096)

        assert crash.begin(disk, spec, blind, at=3) == 1
        (disk / "filler").unlink()
        assert not (run_path(disk, spec) / "checkpoints" / checkpoints.PARTIAL).exists()
        crash.same_as_whole(disk, spec)
        assert read_record(run_path(disk, spec))["training"]["resumed_from"] == 2
        return last_error(disk)


@fault(5, "a stream cannot be written to its end")
def stream_full(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)

    def limit() -> None:  # files may not grow beyond the middle of the next row
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = (run_path(folder, spec) / "metrics.jsonl").stat().st_size + rng.randint(0, 50)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    assert crash.begin(folder, spec, limit, at=3) == 1
    assert [row["step"] for row in read_stream(run_path(folder, spec), "metrics")] == [1, 2, 3]
    crash.same_as_whole(folder, spec)
    return last_error(folder)


def fill(disk: Path, left: int) -> None:
    """Take all room of the disk but `left` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filler").open("wb") as file:
        file.write(b"0" * max(0, free - left))


@fault(6, "a learning rate that makes training diverge")
def divergence(folder: Path, rng: random.Random) -> str:
    rate = {"optim.learning_rate": rng.choice([1e25, 1e30, 3e38]), "optim.max_grad_norm": rng.choice([0.0, 1.0])}
    spec = derive(crash.small_spec("ft"), {**rate, "probe": None})
    return stopped_by_numbers(folder, spec, lambda: None)


@fault(6, "NaN or infinity in loss, gradient or a weight")
def no_numbers(folder: Path, rng: random.Random) -> str:
    kind, step = rng.choice(["loss", "gradient", "weight"]), rng.randint(1, crash.STEPS)
    value = rng.choice([float("nan"), float("inf"), -float("inf")])
    told = stopped_by_numbers(folder, any_spec(rng), lambda: crash.poison(kind, step, value))
    assert f"at step {step}," in told and kind in told, told
    return told


def stopped_by_numbers(folder: Path, spec: Spec, poison: Callable[[], None]) -> str:
    """The run fails at the step, with its items and its last finite checkpoint, and no table shows an accuracy."""

    def work() -> None:
        poison()
        crash.run(folder, spec)

    assert crash.ended(crash.child(work, folder / "errors.txt")) == 1, "it ended well"
    record = read_record(run_path(folder, spec))
    assert record["status"] == "failed" and record["error"].startswith("NonFiniteError: "), record["error"]
    assert "training items [" in record["error"]
    steps = [row["step"] for row in read_stream(run_path(folder, spec), "metrics")]
    assert f"at step {len(steps) + 1}," in record["error"] and steps == list(range(1, len(steps) + 1))
    kept = [checkpoints.step_of(found) for found in (run_path(folder, spec) / "checkpoints").glob("checkpoint-*")]
    assert max(kept, default=0) == 2 * (len(steps) // 2), (kept, steps)
    shown = report.frame(folder)
    assert len(shown) == 0 and list(shown.attrs["statuses"].values()) == [1]
    assert next(iter(shown.attrs["statuses"])).endswith(" failed")
    return str(record["error"])


@fault(18, "two processes at one run")
def two_writers(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    first = crash.child(lambda: crash.run(folder, spec), folder / "errors.txt")
    lock = run_path(folder, spec) / "lock"
    crash.wait_for(lambda: lock.exists() and lock.read_text().endswith("}"), [first], folder / "errors.txt")
    os.kill(first, signal.SIGSTOP)
    try:
        run_spec(spec, crash.paths(folder))
        raise AssertionError("a second writer was let in")
    except LockedError as error:
        told = str(error)
    assert f"process {first} on host" in told and "since" in told
    os.kill(first, signal.SIGCONT)
    if rng.random() < 0.5:
        assert crash.ended(first) == 0
        assert crash.result(folder, spec) == crash.reference(spec)
        return told
    os.kill(first, signal.SIGKILL)
    crash.ended(first)
    crash.same_as_whole(folder, spec)
    (note,) = (note for note in read_record(run_path(folder, spec))["notes"] if "taken over" in note)
    return f"{told}; and after its end: {note}"


@fault(19, "data or model change under a run that is to be resumed")
def inputs_changed(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    crash.begin(folder / "runs of it", spec, crash.kill_me)
    own = folder / "inputs"
    shutil.copytree(crash.inputs(), own)
    file = rng.choice([own / "data" / "boolq" / "train.json", own / "data" / "boolq" / "test.json"])
    name = "data"
    if rng.random() < 0.5:
        name, file = "model", own / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = content.rindex(b" one number") + 4 if name == "data" else len(content) - 5
    content[place] ^= 1
    file.write_bytes(content)
    told = refusal(spec, Paths(folder / "runs of it", own / "data", own / "model"))
    assert f"inputs.{name}.sha256 was " in told
    crash.same_as_whole(folder / "runs of it", spec)
    return told


@fault(19, "a checkpoint of another spec")
def spec_changed(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    path, value = rng.choice([("optim.learning_rate", 1e-3), ("seed", 5), ("optim.schedule", "cosine")])
    return of_another(folder, spec, derive(spec, {path: value}), f"spec.{path} was ")


@fault(20, "a checkpoint of another batch size")
def batch_changed(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    return of_another(folder, spec, derive(spec, {"optim.micro_batch_size": 2}), "spec.optim.micro_batch_size was 2")


def of_another(folder: Path, spec: Spec, other: Spec, words: str) -> str:
    for one in (spec, other):
        crash.begin(folder, one, crash.kill_me)
    target = run_path(folder, spec) / "checkpoints" / "checkpoint-4"
    shutil.move(target, folder / "own")
    shutil.copytree(run_path(folder, other) / "checkpoints" / "checkpoint-4", target)
    for stream in ("metrics", "probe", "timing"):  # or its streams would tell it apart at once
        shutil.copy(run_path(folder, spec) / f"{stream}.jsonl", folder / stream)
        shutil.copy(run_path(folder, other) / f"{stream}.jsonl", run_path(folder, spec) / f"{stream}.jsonl")
    told = refusal(spec, crash.paths(folder))
    assert words in told, told
    assert target.exists()
    shutil.rmtree(target)
    shutil.move(folder / "own", target)
    for stream in ("metrics", "probe", "timing"):
        shutil.copy(folder / stream, run_path(folder, spec) / f"{stream}.jsonl")
    crash.same_as_whole(folder, spec)
    return told


@fault(20, "another number of processes")
def processes_changed(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    crash.begin(folder, spec, crash.kill_me)
    codes = [crash.ended(pid) for pid in crash.start(folder, spec, 2, folder / "errors.txt")]
    told = (folder / "errors0.txt").read_text().strip().splitlines()[-1].partition(": ")[2]
    assert 0 not in codes and "processes was 1, is 2" in told, told
    for left in folder.glob("errors*.txt"):
        left.unlink()
    crash.same_as_whole(folder, spec)
    return told


def refusal(spec: Spec, paths: Paths) -> str:
    """What the user is told when a run cannot be gone on with; the run stays as it is."""
    try:
        run_spec(spec, paths)
    except ResumeError as error:
        assert read_record(run_path(paths.results, spec))["status"] == "interrupted"
        return str(error)
    raise AssertionError("it was resumed")


@fault("SIGTERM", "asked to end while training")
def sigterm(folder: Path, rng: random.Random) -> str:
    spec = derive(any_spec(rng), {"optim.epochs": 100.0})
    pid = crash.child(lambda: crash.together(folder, spec, folder / "told.txt"), folder / "errors.txt")
    steps = rng.randint(1, 20)
    crash.wait_for(lambda: len(read_stream(run_path(folder, spec), "metrics")) >= steps, [pid], folder / "errors.txt")
    os.kill(pid, signal.SIGTERM)
    assert crash.ended(pid) == 0
    told = (folder / "told.txt").read_text()
    record = read_record(run_path(folder, spec))
    assert record["status"] == "interrupted" and told.startswith("interrupted: Interrupted: stopped at step"), told
    last = len(read_stream(run_path(folder, spec), "metrics"))
    found, problem = checkpoints.read_manifest(run_path(folder, spec) / "checkpoints" / f"checkpoint-{last}")
    assert found is not None, problem
    return told


@fault("read-only", "the disk became read-only")
def read_only(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    with small_disk(folder, "16m") as disk:
        crash.begin(disk, spec, crash.kill_me, at=rng.randint(1, crash.STEPS - 1))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            run_spec(spec, crash.paths(disk))
            raise AssertionError("a read-only folder was written to")
        except StoreError as error:
            told = str(error)
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert "Read-only file system" in told, told
        crash.same_as_whole(disk, spec)
        return told


@fault("memory", "no memory is left when the evaluation begins")
def no_memory(folder: Path, rng: random.Random) -> str:
    batch = {"evaluation.protocols": "loglikelihood", "evaluation.batch_size": 64, "data.test_items": 64}
    spec, score, room = derive(any_spec(rng), batch), stages.score, rng.randint(3 << 20, 6 << 20)  # bytes

    def starved(*given: Any) -> None:
        taken = exhausted(room, 8 << 20)  # the logits of a batch take more
        try:
            score(*given)
        finally:  # as the evaluation's own would be given back
            taken.clear()

    def work() -> None:
        stages.score = starved  # only ever in a child
        crash.run(folder, spec)

    assert crash.ended(crash.child(work, folder / "errors.txt")) == 1
    told, record = (folder / "errors.txt").read_text(), read_record(run_path(folder, spec))
    assert "memory" in last_error(folder) and "in score\n" in told, told
    assert record["status"] == "interrupted" and "memory" in record["error"], record["error"]
    last = run_path(folder, spec) / "checkpoints" / f"checkpoint-{crash.STEPS}"
    assert checkpoints.read_manifest(last)[1] is None and not (run_path(folder, spec) / "eval.jsonl").exists()
    crash.same_as_whole(folder, spec)
    assert read_record(run_path(folder, spec))["training"]["resumed_from"] == crash.STEPS
    return last_error_of(told)


def exhausted(room: int, block: int) -> list[bytearray]:
    """All memory that this process can still get in pieces of `block` bytes: its address space may grow by `room` bytes
    alone, and what is free in it is taken."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        raise Skipped("no /proc here that says how large this process is") from None
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, resource.RLIM_INFINITY))
    taken: list[bytearray] = []
    with contextlib.suppress(MemoryError):
        while True:
            taken.append(bytearray(block))
    return taken


@fault("clock", "the clock jumps")
def clock(folder: Path, rng: random.Random) -> str:
    spec = any_spec(rng)
    true = time.time

    def work() -> None:
        time.time = lambda: true() + rng.uniform(-3e8, 3e8)
        crash.run(folder, spec)

    crash.begin(folder, spec, crash.kill_me)
    for file in run_path(folder, spec).rglob("*"):
        moment = true() + rng.uniform(-3e8, 3e8)
        os.utime(file, (moment, moment))
    assert crash.ended(crash.child(work, folder / "errors.txt")) == 0, (folder / "errors.txt").read_text()
    record = json.loads((run_path(folder, spec) / "record.json").read_text())
    assert record["training"]["resumed_from"] == 4 and all(value >= 0 for value in record["seconds"].values())
    assert crash.result(folder, spec) == crash.reference(spec)
    return "nothing: steps order checkpoints, a monotonic clock measures, locks are the kernel's"
