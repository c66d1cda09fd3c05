"""What a machine gives a run: where things lie, the device, the threads; never part of a spec (no torch until a run).

What a tier means for a machine stands in `TIERS` and nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dora_lab.runs import provenance
from dora_lab.spec import Spec

Device = Literal["cpu", "cuda"]
Progress = Callable[[str, int, int, "float | None"], None]  # phase, done, of, loss


@dataclass(frozen=True)
class Tier:
    """What a tier means for a machine, where nobody says otherwise."""

    device: Device  # "cuda": where there is one, else the processor
    threads: int | None  # None: as many as torch takes
    alone: bool  # one run at a time

    @property
    def jobs(self) -> int:
        """Runs at a time: as many as there are cores for, but one on a GPU."""
        cores = provenance.cores()
        return 1 if self.alone or self.device == "cuda" else max(1, cores // (self.threads or cores))


TIERS = {
    # one thread adds sums up in the same order on every machine, so that numbers can be compared; runs go side by side
    "mini": Tier("cpu", threads=1, alone=False),
    "small": Tier("cpu", threads=None, alone=True),
    "paper": Tier("cuda", threads=None, alone=True),
}


@dataclass(frozen=True)
class Paths:
    """Where things lie on this machine. Raises ValueError for a name that is not Unicode, which no record can hold."""

    results: Path  # results folder; runs go to its `runs/<experiment>/<spec_id>`
    data_dir: Path | None = None  # folder of the data source "llm_adapters"
    model_dir: Path | None = None  # saved model to use instead of the package's or the hub's
    adapter_dir: Path | None = None  # folder of the adapter that `model.adapter` names

    def __post_init__(self) -> None:
        for path in (one.resolve() for one in vars(self).values() if one is not None):
            try:
                str(path).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{str(path)!r}: no Unicode name, so no record could hold it; rename it") from None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a run is made here. Raises ValueError for a device that there is no word for, or less than one thread."""

    device: Device | None = None  # None: the tier's
    threads: int | None = None  # of the processor; None: the tier's
    checkpoint_steps: int | None = None  # optimiser steps between checkpoints; None: by the length of the run
    allow_pickle: bool = False  # read the adapter that `model.adapter` names from a pickled file if it has no other
    shard: bool = False  # while training, each process holds a share of every weight (FSDP2) instead of all (DDP)
    recompute: bool = False  # while training, layers run again for the gradient instead of keeping what they computed
    stop: threading.Event | None = None  # set: the run is saved after the step that it is at, and interrupted
    progress: Progress = lambda *_: None

    def __post_init__(self) -> None:
        if self.device is not None and self.device not in get_args(Device):
            raise ValueError(f"device '{self.device}' must be one of {', '.join(get_args(Device))}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads = {self.threads} must be at least 1")

    def of(self, tier: str) -> Tier:
        """What the tier means, with what is given here in its place."""
        says = TIERS[tier]
        return replace(says, device=self.device or says.device, threads=self.threads or says.threads)

    def settled(self, spec: Spec) -> Runtime:
        """The runtime of one run, with nothing left to say: device, threads, and shares only where `spec` trains.

        Imports torch. Raises ValueError for CUDA that is asked for and not there: it would be another run.
        """
        import torch

        there, here = torch.cuda.is_available(), self.of(spec.tier)
        if self.device == "cuda" and not there:
            raise ValueError("device cuda: torch finds no CUDA device here; leave it out, or say cpu")
        return replace(
            self,
            device=here.device if there else "cpu",
            threads=here.threads or torch.get_num_threads(),
            shard=self.shard and spec.optim is not None,  # the first process evaluates alone
        )

    def plain(self) -> dict[str, Any]:
        """What another process can be told of it: all but `stop` and `progress`."""
        return {name: value for name, value in vars(self).items() if name not in ("stop", "progress")}


AS_THE_TIER_SAYS = Runtime()
