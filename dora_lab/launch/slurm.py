"""Runs as jobs of a SLURM cluster, one for each spec, through submitit (extra `slurm`); no scheduler of our own.

A job is told before its time is up or it is preempted: the run stops after the step it is at, is saved, and the job
goes back into the queue and on from there. A job that is killed without a word goes on from its last checkpoint when
the specs are submitted again; specs whose runs are complete are not submitted at all. A job is one process: to cut a
run over several GPUs, start `torchrun` in a job of your own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lab.launch.inputs import is_complete
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import AS_THE_TIER_SAYS, Paths, Runtime
from dora_lab.spec import Spec

if TYPE_CHECKING:
    import submitit

WARNING = 300  # seconds between the word that time is up and the end: a step and a checkpoint fit into them
TIMEOUTS = 100  # how often a job may use up its time and be queued again


class ClusterError(ValueError):
    """Jobs that cannot be submitted; says what is missing and what to do."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What every job gets."""

    hours: float = 24.0  # of wall time, after which it is queued again
    gpus: int = 1
    cpus: int = 4
    memory_gb: float = 64.0
    partition: str | None = None  # None: the cluster's default
    at_once: int | None = None  # jobs that run at a time; None: as many as the cluster gives
    more: Mapping[str, str] = field(default_factory=dict)  # further sbatch options, e.g. {"account": "x"}


class Job:
    """One run, as submitit calls it: in a thread, so that the signal of the cluster can stop it after a step."""

    def __init__(self, spec: Spec, paths: Paths, runtime: Runtime = AS_THE_TIER_SAYS) -> None:
        self.spec, self.paths, self.runtime = spec, paths, runtime

    def __call__(self) -> str:
        """Run to the end; returns "complete" or raises what ended the run."""
        self._stop, self._errors = threading.Event(), list[BaseException]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._thread.join()
        if self._errors:
            raise RuntimeError(f"{type(self._errors[0]).__name__}: {self._errors[0]}") from self._errors[0]
        return "complete"

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit calls when time is up: save the run, and say what to do next time."""
        import submitit

        self._stop.set()
        self._thread.join()
        return submitit.helpers.DelayedSubmission(Job(self.spec, self.paths, self.runtime))

    def _run(self) -> None:
        try:
            run_spec(self.spec, self.paths, replace(self.runtime, stop=self._stop))
        except BaseException as error:
            self._errors.append(error)


def submit(
    specs: Sequence[Spec],
    paths: Paths,
    resources: Resources,
    runtime: Runtime = AS_THE_TIER_SAYS,
    *,
    local: bool = False,
) -> list[tuple[Spec, submitit.Job[str]]]:
    """Submit a job for every spec that has no complete run; returns them with their specs.

    Logs go to `cluster/` in the results folder, which the jobs must see under the same path, as they must the code, the
    environment and the inputs. local: the same jobs as processes of this machine, one after the other, each waited for
    (`resources` then only limits the time); meant for trying out. Raises ClusterError where submitit or SLURM is not
    there, and where sbatch refuses.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError:
        raise ClusterError("submitit is not installed: pip install 'dora-lab[slurm]'") from None
    here = Paths(**{name: place and Path(place).resolve() for name, place in vars(paths).items()})
    todo = [Job(spec, here, runtime) for spec in specs if not is_complete(spec, here)]
    if not todo:
        return []
    folder = here.results / "cluster"
    try:
        executor = submitit.AutoExecutor(
            folder,
            cluster="local" if local else "slurm",
            slurm_max_num_timeout=TIMEOUTS,
            local_max_num_timeout=TIMEOUTS,
        )
    except RuntimeError as error:  # submitit's word for a machine without SLURM
        raise ClusterError(f"{error} From a machine without SLURM, --local runs the same jobs here.") from None
    executor.update_parameters(**_parameters(resources, todo[0].spec))
    if local:
        jobs = []
        for job in todo:
            jobs.append(executor.submit(job))
            jobs[-1].wait()
    else:
        try:
            with executor.batch():  # one array of jobs
                jobs = [executor.submit(job) for job in todo]
        except FailedJobError as error:
            said = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).strip().splitlines())
            raise ClusterError(
                f"sbatch refused the jobs ({said}); change --partition, --hours, ... or --slurm"
            ) from None
    return [(job.spec, submitted) for job, submitted in zip(todo, jobs, strict=True)]


def failure(job: submitit.Job[str]) -> str | None:
    """What a job that has ended failed of, on one line; None if it ended well."""
    if (error := job.exception()) is None:
        return None
    lines = [line for line in str(error).splitlines() if line.strip()]
    rules = [at for at, line in enumerate(lines) if set(line) == {"-"}]  # around the trace; none of a job that was lost
    return lines[rules[-1] - 1 if rules else 0].removeprefix("RuntimeError: ")


def _parameters(resources: Resources, spec: Spec) -> dict[str, Any]:
    found = {
        "name": f"dora_lab-{spec.experiment}",
        "timeout_min": max(1, round(60 * resources.hours)),
        "cpus_per_task": resources.cpus,
        "mem_gb": resources.memory_gb,
        "gpus_per_node": resources.gpus,
        "slurm_signal_delay_s": WARNING,
        "slurm_partition": resources.partition,
        "slurm_array_parallelism": resources.at_once,
        "slurm_additional_parameters": dict(resources.more) or None,
    }
    return {name: value for name, value in found.items() if value is not None}
