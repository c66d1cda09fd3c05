"""Checks that run in a process of their own: `python -m experiments.gpu.child DEVICE triton|resume|shard ...`.

The kernels, because a wrong address would take the device away from everything after them; resume, because determinism
has to be asked for before the device is first used; `shard`, because it needs a process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.gpu.visit import Visit, frames

CELLS = {
    "triton": tuple(
        f"triton: {what}"
        for what in (
            "lora: bfloat16",
            "lora: float16",
            "lora, dropout: bfloat16",
            "dora: bfloat16",
            "dora: float16",
            "dora: autocast",
            "dora: float32",
            "dora, branch dropout: bfloat16",
            "dora, published dropout: bfloat16",
            "dora, published dropout: float16",
            "dora, norm in the graph: bfloat16",
            "dora, norm in the graph: float16",
        )
    ),
    "resume": ("resume: dora", "resume: ft"),
    "shard": ("shard: one rank",),
}
ALONE = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS is not deterministic
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Waiting:
    """A process that was started, and the cells that it will give rows of."""

    process: subprocess.Popen[str]
    cells: tuple[str, ...]

    def finish(self, visit: Visit) -> None:
        """Write the rows of all its cells: its own, or that it gave none."""
        rows: dict[str, dict[str, Any]] = {}
        out, err = "", ""
        try:
            out, err = self.process.communicate(timeout=max(1.0, min(75.0, visit.left())))
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            err += "\nkilled: it took too long"
        for line in out.splitlines():
            if line.startswith("ROW "):
                cell, row = json.loads(line[4:])
                rows[cell] = row
        for cell in self.cells:
            lost = {"error": f"its process ended with {self.process.returncode}: {err.strip()[-400:]}"}
            visit.write("right", cell, **rows.get(cell, lost))


def as_on_a_gpu() -> None:
    """The dry run goes the way that layers go on a GPU."""
    from experiments.gpu import lab

    lab.narrow.ON = ("cuda", "cpu")


def kernels_are_right(visit: Visit) -> bool:
    """Whether the Triton kernels run and agree, tried in a process of their own: they may take a process down."""
    with contextlib.ExitStack() as stack:
        for waiting in started(visit, stack, (("triton",),)):
            waiting.finish(visit)
    rows = [row for row in visit.known if row["stage"] == "right" and row["cell"].startswith("triton")]
    return bool(rows) and all(row.get("ok") for row in rows)


def started(
    visit: Visit,
    stack: contextlib.ExitStack,
    processes: tuple[tuple[str, ...], ...] = (("triton",), ("resume", "shard")),
) -> list[Waiting]:
    """The processes of the cells that are not known yet; ended with `stack` at the latest."""
    known = {row["cell"] for row in visit.known if row["stage"] == "right"}
    found = []
    for what in processes:
        cells = tuple(cell for kind in what for cell in CELLS[kind] if cell not in known)
        if not cells:
            continue
        command = [sys.executable, "-m", "experiments.gpu.child", visit.device, *what]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | ALONE | ({"TRITON_INTERPRET": "1"} if visit.cpu else {}),
        )  # fmt: skip
        stack.callback(process.kill)
        found.append(Waiting(process, cells))
    return found


def main(argv: list[str]) -> None:
    """Run the cells of each kind; a line "ROW [cell, row]" each."""
    device, kinds = argv[0], argv[1:]
    visit = Visit(Path(tempfile.mkdtemp()), 600.0, device == "cpu", "child")
    if visit.cpu:
        as_on_a_gpu()
    measures = {"triton": _triton, "resume": _resume, "shard": _shard}
    for kind in kinds:
        for cell in CELLS[kind]:
            try:
                row = measures[kind](visit, cell)
            except Exception as error:  # any: it is what the row says
                row = {"error": f"{type(error).__name__}: {error}"[:600], "traceback": frames(error)}
            print("ROW " + json.dumps([cell, row]), flush=True)


def _triton(visit: Visit, cell: str) -> dict[str, Any]:
    """The kernels against float64, as the eager form is compared."""
    from importlib.util import find_spec

    from experiments.gpu import right

    if find_spec("triton") is None:
        return {"skipped": "no triton here"}
    _, label, precision = cell.split(": ")
    if visit.cpu and precision in ("bfloat16", "autocast"):
        return {"skipped": "triton's interpreter multiplies no bfloat16"}
    fields = right.CASES.get(label, {"name": label})
    try:
        return right.against_float64(visit, fields, precision, fused=True)
    except Exception as error:
        if type(error).__name__ != "InterpreterError":  # of the dry run alone; it does not go with every numpy
            raise
        return {"skipped": f"triton's interpreter cannot run here: {error}"[:300]}


def _resume(visit: Visit, cell: str) -> dict[str, Any]:
    """Weights after a run in one go and after one that was stopped and resumed, in deterministic mode."""
    import torch

    from experiments.gpu import resume

    name = cell.partition(": ")[2]
    torch.use_deterministic_algorithms(True)
    try:
        return {"deterministic": "enforced"} | resume.compare(visit, name)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        return {"deterministic": f"where there is a way: {str(error)[:200]}"} | resume.compare(visit, name)
    finally:
        torch.use_deterministic_algorithms(False)


def _shard(visit: Visit, cell: str) -> dict[str, Any]:
    """The first steps of DoRA on a model that was cut for a group of one, and of the same uncut."""
    import torch
    import torch.distributed as group

    from experiments.gpu import lab
    from experiments.gpu.models import SEVEN, adamw, llama, put_on

    backend = "gloo" if visit.cpu else "nccl"
    group.init_process_group(backend, store=group.HashStore(), rank=0, world_size=1)
    ids = torch.randint(0, visit.size.vocabulary, (2, 16), device=visit.device)
    losses: list[list[float]] = [[], []]
    for cut in (False, True):
        torch.manual_seed(1)
        model = llama(visit, torch.float32, layers=2)
        with put_on(model, "ours/dora", SEVEN, visit.size.rank, 2.0 * visit.size.rank):
            if cut:
                lab.shard(model, visit.device)
            optimizer = adamw(model)
            for _ in range(3):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[cut].append(loss.item())
            if cut:
                group.barrier()
    del model, optimizer, loss
    group.destroy_process_group()
    worst = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    return {"backend": backend, "losses": losses, "worst": worst, "tolerance": 1e-5, "ok": worst <= 1e-5}


def _watch_parent() -> None:
    """End with the visit: a process whose parent was killed would hold the device."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _watch_parent()
    main(sys.argv[1:])
