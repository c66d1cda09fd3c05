"""Jobs of a cluster: the local executor for real, SLURM as far as its scripts can be looked at without one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from tiny import make_spec, save_data, save_model
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.launch import slurm
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream

submitit = pytest.importorskip("submitit")
HOUSE = Path(__file__).resolve().parents[1]
QUICK = {"evaluation__protocols": "loglikelihood", "probe": None}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("cluster")
    return Paths(folder / "results", save_data(folder / "data"), save_model(folder / "model"))


@pytest.fixture(autouse=True)
def _jobs_use_this_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOUSE), os.environ.get("PYTHONPATH", "")]))


def test_a_job_that_is_preempted_is_saved_queued_again_and_goes_on(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(**QUICK, optim__epochs=16.0)
    folder = run_path(paths.results, spec)
    executor = submitit.AutoExecutor(paths.results / "preempted", cluster="local")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(slurm.Job(spec, paths, Runtime(threads=2)))
    deadline = time.monotonic() + 120
    while len(read_stream(folder, "metrics")) < 5:
        assert time.monotonic() < deadline, job.stderr()
        time.sleep(0.05)
    holder = json.loads((folder / "lock").read_text())["pid"]
    os.kill(holder, submitit.local.local.LocalJobEnvironment._usr_sig())
    assert job.result() == "complete"
    record, rows = read_record(folder), read_stream(folder, "metrics")
    assert record["status"] == "complete" and record["training"]["resumed_from"] >= 5
    assert record["threads"] == 2 and record["notes"] == []
    assert [row["step"] for row in rows] == list(range(1, record["training"]["steps"] + 1))
    assert "preempted" in (job.stdout() or "") + (job.stderr() or "")

    # what is complete is not submitted; what fails says why
    bad = make_spec(**QUICK, seed=1, optim__learning_rate=1e38)
    ((submitted, failed),) = slurm.submit(
        [spec, bad], paths, slurm.Resources(gpus=0, hours=0.2), Runtime(threads=2), local=True
    )
    assert submitted == bad
    assert "NonFiniteError" in str(failed.exception()) and "step" in str(failed.exception())
    assert read_record(run_path(paths.results, bad))["status"] == "failed"
    assert read_record(run_path(paths.results, bad))["threads"] == 2
    assert list((paths.results / "cluster").glob("*_result.pkl")), "the logs are not where they are said to be"
    monkeypatch.setattr(slurm, "submit", lambda *_, **__: [(bad, failed), (spec, job)])
    done = CliRunner().invoke(app, ["submit", "pilot", "--tier", "mini", "--only", "seed=200", "--local"])
    first, second, *_ = done.output.splitlines()
    assert done.exit_code == 1 and "  failed: NonFiniteError: loss is nan at step" in first, done.output
    assert second.endswith(f"job {job.job_id}  complete")


def test_without_slurm_it_is_said(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.ClusterError, match=r"srun.*--local"):
        slurm.submit([make_spec(seed=9)], paths, slurm.Resources())


def test_what_sbatch_refuses_is_one_line(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SLURM 22.05 says to a partition that is not there."""
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: no such name"
    for name, text in (("srun", "exit 0"), ("sbatch", f"printf '{said}\\n' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(slurm.ClusterError) as refused:
        slurm.submit([make_spec(seed=7)], paths, slurm.Resources(partition="x"))
    told = "sbatch refused the jobs (invalid partition specified: x; Batch job submission failed: no such name); change"
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


def test_the_script_for_slurm(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch is given; no cluster here, so that a job really starts is not tested."""
    for name, text in (("srun", "exit 0"), ("sbatch", 'cp "$1" "$(dirname "$0")/script"; echo Submitted batch job 12')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    resources = slurm.Resources(
        partition="gpu", hours=10, gpus=2, cpus=8, memory_gb=96, at_once=1, more={"account": "lab"}
    )
    jobs = slurm.submit([make_spec(seed=seed) for seed in (5, 6)], paths, resources)
    assert [job.job_id for _, job in jobs] == ["12_0", "12_1"]
    lines = (tmp_path / "script").read_text().splitlines()
    for wanted in ("--partition=gpu", "--time=600", "--gpus-per-node=2", "--cpus-per-task=8", "--mem=96GB",
                   "--array=0-1%1", "--account=lab", "--signal=USR2@300", "--job-name=dora_lab-tiny"):  # fmt: skip
        assert f"#SBATCH {wanted}" in lines, wanted
