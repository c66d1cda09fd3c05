"""Jobs on a real SLURM: submitted, preempted, queued again, resumed, and the same as runs that nothing happened to.

`make test-slurm` asks for these; without it, or without `sbatch`, they are skipped and say so. Jobs take one core and
2 GB of the default partition, and some minutes (SLURM lets a job that is queued again wait for two).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_spec, save_data, save_model

from dora_lab.launch import slurm
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.runs import checkpoints
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Spec

pytestmark = [
    pytest.mark.skipif(not os.environ.get("TEST_SLURM"), reason="only asked for by `make test-slurm`"),
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="NO SLURM HERE: no `sbatch`, so no job was ever started"),
]
HOUSE = Path(__file__).resolve().parents[1]
JOB = slurm.Resources(gpus=0, cpus=1, memory_gb=2, hours=0.5)
QUICK = {"evaluation__protocols": "loglikelihood", "probe": None}
ONE = Runtime(threads=1)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("slurm")
    return Paths(folder / "results", save_data(folder / "data"), save_model(folder / "model"))


@pytest.fixture(autouse=True)
def _jobs_use_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOUSE), os.environ.get("PYTHONPATH", "")]))


def wait(ready: Callable[[], bool], why: Callable[[], object]) -> None:
    deadline = time.monotonic() + 900
    while not ready():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


def files(results: Path, spec: Spec) -> dict[str, bytes]:
    """What a run made, byte for byte; when its steps were is no part of it."""
    path = run_path(results, spec)
    kept = [path / name for name in read_record(path)["files"]]
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in (*path.glob("*.jsonl"), *kept)
        if file.name != "timing.jsonl"
    }  # fmt: skip


def test_a_job_that_is_preempted_is_queued_again_and_ends_the_same(paths: Paths, tmp_path: Path) -> None:
    spec, plain = make_spec(**QUICK, optim__epochs=60.0), make_spec(**QUICK, seed=1)
    (_, job), (_, other) = slurm.submit([spec, plain], paths, JOB, ONE)
    path = run_path(paths.results, spec)
    wait(lambda: (path / "metrics.jsonl").exists() and len(read_stream(path, "metrics")) >= 5, lambda: job.stderr())
    subprocess.run(["scancel", "--signal=USR2", job.job_id], check=True)  # what a preemption sends
    wait(lambda: read_record(path)["status"] == "interrupted", lambda: job.stderr())
    stopped = len(read_stream(path, "metrics"))
    assert checkpoints.read_manifest(path / "checkpoints" / f"checkpoint-{stopped}")[1] is None
    wait(job.done, lambda: job.stderr())
    assert job.result() == other.result() == "complete"
    record = read_record(path)
    assert record["training"]["resumed_from"] == stopped < record["training"]["steps"]
    here = replace(paths, results=tmp_path)
    for one in (spec, plain):
        run_spec(one, here, ONE)
        assert files(paths.results, one) == files(tmp_path, one)
    assert slurm.submit([spec, plain], paths, JOB, ONE) == [], "what is complete is not submitted again"


def test_a_job_that_fails_says_what_failed(paths: Paths) -> None:
    bad = make_spec(**QUICK, seed=2, optim__learning_rate=1e38)
    ((_, job),) = slurm.submit([bad], paths, JOB, ONE)
    wait(job.done, lambda: job.state)
    assert "NonFiniteError: loss is nan at step" in str(job.exception())
    record = read_record(run_path(paths.results, bad))
    assert record["status"] == "failed" and record["error"].startswith("NonFiniteError: loss is nan at step")


def test_what_sbatch_refuses_is_one_clear_line(paths: Paths) -> None:
    command = [sys.executable, "-m", "dora_lab", "submit", "pilot", "--tier", "mini", "--only", "seed=200"]
    more = ["--partition", "nonesuch", "--gpus", "0", "--results", str(paths.results)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=HOUSE, timeout=300)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "nonesuch" in done.stderr + lines[-1] and "Traceback" not in done.stderr
    assert "partition" in lines[-1].lower(), lines
