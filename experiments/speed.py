"""What an optimiser step costs with our adapters, with PEFT's, and with full fine-tuning.

Reproduces no table of the paper: it measures the price of DoRA over LoRA, which the paper leaves out. It trains nothing
to keep, so it has no specs: `make bench` (about 12 minutes on one core) or, for chosen cells,

    python -m experiments.speed [--results DIR] [--only TEXT] [--fresh]

measures what results/bench/speed.jsonl has not yet; LLaMA-7B on a GPU is `experiments.gpu_visit`. Models are Llama
stacks with random weights; all seven linear layers are adapted. Every contender of a cell lives in one process
and takes its steps in turn, forwards and backwards, so that a ratio is of two steps made side by side; the table
(`analysis/tables/speed.py`) shows medians of these ratios. A step is forward, backward and AdamW (forward alone in
evaluation). The memory of a step is its peak above the model, optimiser and data at rest, each contender in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dora_lab.io.atomic import write_text
from dora_lab.methods.inject import inject
from dora_lab.runs import provenance
from dora_lab.runs.errors import StoreError
from dora_lab.spec import Method

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL = ("ours/lora", "ours/dora", "peft/lora", "peft/dora")
DROPPED = ("ours/lora", "ours/dora", "ours/dora-branch", "peft/lora", "peft/dora")
# "ours/dora-<form>": fields of the method
FORMS: dict[str, dict[str, Any]] = {
    "": {}, "branch": {"dropout_form": "branch"},
}  # fmt: skip
ROUNDS, BUDGET = 30, 60.0  # steps of every contender of a cell, or as many as fit into these seconds (at least 5)


@dataclass(frozen=True)
class Cell:
    """One line of the benchmark. Tokens are those of one forward; sequences have at most 512."""

    hidden: int
    tokens: int
    rank: int = 16
    dropout: float = 0.0
    accumulation: int = 1  # forwards and backwards per optimiser step
    mode: str = "train"  # or "evaluate": no gradients, model.eval()
    measure: str = "seconds"  # or "bytes", peak memory of a step
    contenders: tuple[str, ...] = ALL
    intermediate: int | None = None  # default: 2.75 x hidden
    layers: int = 2
    heads: int = 8
    key_value_heads: int = 8
    dtype: str = "float32"

    def name(self) -> str:
        """What `--only` looks at, and the key of a record."""
        size = f"h{self.hidden}" + (f"x{self.intermediate}" if self.intermediate else "")
        size += f"x{self.layers}" if self.layers > 2 else ""
        parts = [self.measure, self.mode, size, f"t{self.tokens}", f"r{self.rank}", f"p{self.dropout:g}"]
        return "-".join([*parts, f"a{self.accumulation}", self.dtype])


def cells() -> list[Cell]:
    """The cells of `make bench`."""
    found = [Cell(h, t, contenders=(*ALL, "ft")) for h in (512, 1024) for t in (128, 512, 2048)]
    found += [Cell(h, t, rank=64) for h in (512, 1024) for t in (128, 512)]
    found += [Cell(h, 128, accumulation=8) for h in (512, 1024)]
    found += [Cell(h, 512, dropout=0.05, contenders=DROPPED) for h in (512, 1024)]
    found += [Cell(h, 1, mode="evaluate") for h in (512, 1024)]
    found += [Cell(1024, 512, measure="bytes", contenders=(*ALL, "ft"))]
    found += [Cell(1024, 512, dropout=0.05, measure="bytes", contenders=DROPPED)]
    return found + [Cell(1024, 512, measure=measure, dtype="bfloat16") for measure in ("seconds", "bytes")]


class Contender:
    """A model, its optimiser and its data: `step` is what is measured."""

    def __init__(self, name: str, cell: Cell) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=cell.hidden, intermediate_size=cell.intermediate or cell.hidden * 11 // 4, vocab_size=1000,
            num_hidden_layers=cell.layers, num_attention_heads=cell.heads, num_key_value_heads=cell.key_value_heads,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config).to(getattr(torch, cell.dtype))
        whose, _, method = name.partition("/")
        if whose == "ours":
            kind, _, form = method.partition("-")
            fields = FORMS[form]
            shape = {"rank": cell.rank, "alpha": 2.0 * cell.rank, "dropout": cell.dropout}
            inject(model, Method(name=kind, target_modules=TARGETS, **shape, **fields), seed=0)
        elif whose == "peft":
            import peft

            model = peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=cell.rank, lora_alpha=2 * cell.rank, lora_dropout=cell.dropout, target_modules=list(TARGETS),
                    use_dora=method == "dora",
                ),
            )  # fmt: skip
        elif name != "ft":
            raise ValueError(f"unknown contender '{name}'")
        self.cell, self.model = cell, model.train(cell.mode == "train")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        length = min(cell.tokens, 512)
        self.ids = torch.randint(0, 1000, (cell.tokens // length, length))

    def step(self) -> None:
        """An optimiser step, or a forward in evaluation."""
        if self.cell.mode == "evaluate":
            with torch.no_grad():
                self.model(input_ids=self.ids, use_cache=False)
            return
        for _ in range(self.cell.accumulation):
            self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Seconds of the processor that a step takes."""
        start = time.process_time()
        for _ in range(repeats := 20 if self.cell.mode == "evaluate" else 1):
            self.step()
        return (time.process_time() - start) / repeats

    def bytes(self) -> int:
        """Peak memory of a step above what is there before it."""
        for _ in range(2):
            self.step()
        provenance.reset_peak_memory()
        before = provenance.peak_memory_bytes()
        self.step()
        return provenance.peak_memory_bytes() - before


def measure(cell: Cell, rounds: int = ROUNDS, budget: float = BUDGET) -> dict[str, list[float]]:
    """What every contender of a cell took, in the same order of rounds: seconds of a step, or bytes (one number)."""
    if cell.measure != "seconds":
        return {name: [_bytes_in_a_process(name, cell)] for name in cell.contenders}
    there = {name: Contender(name, cell) for name in cell.contenders}
    taken: dict[str, list[float]] = {name: [] for name in there}
    for contender in there.values():
        contender.step()  # the first step allocates
    order, end = list(there), time.monotonic() + budget
    mixed = random.Random(0)
    for turn in range(rounds):
        if turn >= 5 and time.monotonic() > end:
            break
        mixed.shuffle(order)  # nobody always comes after the same one, whose data would be in the caches
        for name in order:
            taken[name].append(there[name].seconds())
    return taken


def _bytes_in_a_process(name: str, cell: Cell) -> int:
    return in_a_process([sys.executable, "-m", "experiments.speed", "--one", json.dumps([name, asdict(cell)])])


def in_a_process(command: list[str]) -> int:
    """The bytes that a command prints last. Raises RuntimeError where it fails."""
    # freed blocks go back to the system at once, so that what is resident is what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Records by the name of their cell; {} if there is no file."""
    if not file.exists():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {row["cell"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file}: a line is not a record of this benchmark ({error}); delete the file") from None


def main(argv: list[str] | None = None) -> None:
    """Measure the cells that are not there yet, and write each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/local"))
    parser.add_argument("--only", default="", help="cells whose name holds this text")
    parser.add_argument("--fresh", action="store_true", help="measure what is there already, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.one:
        name, values = json.loads(options.one)
        print(Contender(name, Cell(**values)).bytes())
        return
    file = options.results / "bench" / "speed.jsonl"
    known = {} if options.fresh else read(file)
    machine = provenance.machine()
    packages = provenance.packages() | {"peft": version("peft")}
    for cell in cells():
        if options.only not in cell.name() or cell.name() in known:
            continue
        print(cell.name(), flush=True)
        taken = measure(cell, ROUNDS, BUDGET)
        row = {"cell": cell.name(), **asdict(cell), "taken": taken, "machine": machine, "threads": 1}
        known[cell.name()] = row | {"packages": packages, "code": provenance.code()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(row, sort_keys=True) + "\n" for row in known.values()))


if __name__ == "__main__":
    main()
