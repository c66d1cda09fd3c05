"""A visit: its device, its time, its rows. A cell that fails, or no longer fits, is a row and not an end."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.gpu import lab

FILE = "gpu.jsonl"
SLOWER = 0.03  # share of a cell's estimate (made for an H100) that its tiny form takes without a GPU
STICKY = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


@dataclass(frozen=True)
class Size:
    """Shapes that everything is measured on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rank: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linear layers of a decoder layer."""
        h, i = self.hidden, self.intermediate
        square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (h, h))
        return square | {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}


LLAMA_7B = Size(4096, 11008, 32, 32, 32000, 32)
TINY = Size(64, 96, 2, 2, 128, 4)


class PoisonedError(RuntimeError):
    """The CUDA context is lost: only a new process can go on."""


@dataclass
class Visit:
    """See the module's docstring. `known` are the rows of this visit, those of a process before this one included."""

    out: Path
    seconds: float
    cpu: bool
    id: str
    stamp: dict[str, Any] = field(default_factory=dict)
    known: list[dict[str, Any]] = field(default_factory=list)
    base: Any = None  # the model that contenders are put on, kept from cell to cell
    base_of: Any = None

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / FILE
        if self.file.exists():
            rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
            self.known = [row for row in rows if row["visit"] == self.id]

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return "cpu" if self.cpu else "cuda"

    @property
    def size(self) -> Size:
        """The shapes of this visit."""
        return TINY if self.cpu else LLAMA_7B

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def write(self, stage: str, cell: str, **values: Any) -> dict[str, Any]:
        """Append a row, at once, and print it in short."""
        row = {"stage": stage, "cell": cell, **values, "visit": self.id, **self.stamp}
        self.known.append(row)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, sort_keys=True) + "\n")
        shown = [f"{key} {values[key]:.4g}" for key in ("seconds", "share", "gbps", "tflops") if _a_number(values, key)]
        shown += [f"{key}: {str(values[key])[:70]}" for key in ("skipped", "error", "out_of_memory") if key in values]
        shown += ["ok" if values["ok"] else "NOT RIGHT"] if "ok" in values else []
        print(f"[{self.left():6.1f} s left] {stage} · {cell} · {', '.join(shown)}"[:110], flush=True)
        return row

    def cell(self, stage: str, cell: str, estimate: float, measure: Callable[[], dict[str, Any] | None]) -> bool:
        """Write the row of what `measure` returns (None: it wrote its own); says whether it was measured.

        estimate: seconds on an H100. What raises is a row, and the model that it worked on is built again.
        """
        if any((row["stage"], row["cell"]) == (stage, cell) for row in self.known):
            return True
        estimate *= SLOWER if self.cpu else 1.0
        if self.left() < estimate:
            self.write(stage, cell, skipped=f"needs about {estimate:.0f} s, {max(0.0, self.left()):.0f} s are left")
            return False
        start, lost = time.monotonic(), None
        try:
            found = measure()
        except Exception as error:  # any: the next cell is to come
            lost, found = failure(error), None
        self.free(base=lost is not None)  # outside: a traceback holds the tensors of its frames
        took = {"took_s": round(time.monotonic() - start, 2), "estimate_s": estimate}
        if lost is not None:
            self.write(stage, cell, **lost, **took)
            if any(word in str(lost) for word in STICKY) or not self._alive():
                raise PoisonedError(cell)
            return False
        if found is not None:
            self.write(stage, cell, **found, **took)
        return found is None or "skipped" not in found

    def _alive(self) -> bool:
        """Whether the device still answers."""
        if not self.cpu:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
        return True

    def free(self, base: bool = False) -> None:
        """Give memory back; with `base` the kept model's too."""
        if base:
            self.base = self.base_of = None
        gc.collect()
        if not self.cpu:
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def find(self, stage: str, cell: str) -> dict[str, Any]:
        """The row of a cell that was measured; {} if there is none."""
        rows = [row for row in self.known if (row["stage"], row["cell"]) == (stage, cell)]
        return rows[-1] if rows and not {"skipped", "error", "out_of_memory"} & rows[-1].keys() else {}

    def ceiling(self, what: str) -> float | None:
        """The measured ceiling in bytes ("copy") or operations ("product") a second."""
        return self.find("ceilings", what).get("rate")

    def share(self, what: str, amount: float, seconds: float) -> float | None:
        """Of that ceiling, what `amount` in `seconds` is."""
        ceiling = self.ceiling(what)
        return amount / seconds / ceiling if ceiling else None

    def timed(self, step: Callable[[], Any], warm: int = 2, rounds: int = 5) -> list[float]:
        """Seconds of each round, by device events where there is a GPU."""
        if self.cpu:
            warm, rounds = min(warm, 1), min(rounds, 2)
        for _ in range(warm):
            step()
        if not self.cpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return self.timed_once([step] * rounds)

    def timed_once(self, steps: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of each of some steps, one after the other, by device events where there is a GPU."""
        if self.cpu:
            taken = []
            for step in steps:
                start = time.perf_counter()
                step()
                taken.append(time.perf_counter() - start)
            return taken
        events: list[tuple[Any, Any]] = []
        for step in steps:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            step()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in events]

    def took(self, step: Callable[[], Any], warm: int = 2, rounds: int = 5) -> dict[str, Any]:
        """The same as part of a row: the median, all of them, and the peak memory of the rounds."""
        taken = self.timed(step, warm, rounds)
        peak = None if self.cpu else torch.cuda.max_memory_allocated()
        reserved = None if self.cpu else torch.cuda.max_memory_reserved()
        return {"seconds": statistics.median(taken), "taken": taken, "peak_bytes": peak, "reserved_bytes": reserved}


def _a_number(values: dict[str, Any], key: str) -> bool:
    return isinstance(values.get(key), float)


def failure(error: Exception) -> dict[str, Any]:
    """What a row says of a cell that failed."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        peak = torch.cuda.max_memory_allocated()
        return {"out_of_memory": str(error).partition(". GPU")[0][:300], "peak_bytes": peak}
    return {"error": f"{type(error).__name__}: {error}"[:600], "traceback": frames(error)}


def frames(error: Exception) -> list[str]:
    """Where it was raised, in short: the last eight places."""
    found = traceback.extract_tb(error.__traceback__)[-8:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in found]


def stamp(cpu: bool) -> dict[str, Any]:
    """What every row says of machine and code; unknown is None. Settings are read, never changed on the card."""
    driver = None
    if not cpu:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip() or None
    code = lab.provenance.code()
    return {
        "card": None if cpu else torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "commit": code["commit"],
        "diff": code["diff"],
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "bf16_reduced_sums": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "threads": torch.get_num_threads(),
    }
