"""What ΔM and ΔD of saved models cost: time and memory of `dora-lab probe` beside its floor and the naive way.

Reproduces no table of the paper. It trains nothing to keep, so it has no specs: `make bench-probe` (some minutes on one
core, 2.5 GB of disk for a while) or

    python -m experiments.probe_speed [--results DIR] [--only TEXT] [--fresh]

measures what results/bench/probe_speed.jsonl has not yet. The base is one decoder block of LLaMA-7B's shapes (202 M
weights, 32 of which make the model's linear layers), random, bfloat16, in a temporary folder; files are in the page
cache. Contenders of a cell take their turns in one process, so that a ratio is of two passes made side by side; one
thread. Floors, with the same reading and the same blocks:

- floor/pair: reads base and tuned, widens both to float32, and makes one sum of products of the two (one fused pass);
- floor/base: reads the base, widens it and makes one sum of squares (one pass over the base);
- floor/product: that, and the product by A (rank 16), which the change of LoRA's magnitudes cannot be had without.

naive/full and naive/lora: the textbook, on whole float32 matrices, the adapter merged first. Peak memory is that of a
process of its own, above what it held before it began. The callback's share is of a fine-tuning of the embedded base
with four probed checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before numpy and torch start their threads
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dora_lab.formats.shards import Shards
from dora_lab.io.atomic import write_text
from dora_lab.probing import saved_models
from dora_lab.runs import provenance

ROUNDS = 7
HIDDEN, INNER, RANK, BLOCKS = 4096, 11008, 16, 32
CELLS: dict[str, tuple[str, ...]] = {
    "pair": ("floor/pair", "ours/full", "ours/full-in", "naive/full"),
    "adapter": ("floor/base", "floor/product", "ours/lora", "ours/dora", "ours/lora-in", "ours/dora-in", "naive/lora"),
    "many": ("ours/full", "ours/full-x4", "ours/lora", "ours/lora-x4", "ours/dora", "ours/dora-x4"),
    "memory": ("ours/full", "ours/lora", "ours/dora", "ours/full-x4", "ours/lora-x4", "ours/dora-in", "naive/full",
               "naive/lora"),
    "callback": ("ft", "lora", "dora"),
}  # fmt: skip
Shapes = dict[str, tuple[int, int]]


def shapes(hidden: int = HIDDEN, inner: int = INNER) -> Shapes:
    """(out, in) of the linear layers of a decoder block, by module name."""
    square = {f"model.layers.0.self_attn.{kind}_proj": (hidden, hidden) for kind in "qkvo"}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return square | {f"model.layers.0.mlp.{kind}": shape for kind, shape in mlp.items()}


def prepare(folder: Path, block: Shapes, rank: int = RANK) -> None:
    """Write base, full-0 .. 3, lora-0 .. 3 and dora-0 .. 3 into a folder: random weights, changed by about 1 %."""
    source = torch.Generator().manual_seed(0)
    base = {
        f"{name}.weight": (torch.randn(*shape, generator=source) * 0.02).bfloat16() for name, shape in block.items()
    }
    _save(base, folder / "base" / "model.safetensors")
    inner, hidden = block["model.layers.0.mlp.up_proj"]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 1}
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    for turn in range(4):
        tuned = {
            name: (W.float() * (1 + 0.02 * torch.randn(W.shape, generator=source))).bfloat16()
            for name, W in base.items()
        }
        _save(tuned, folder / f"full-{turn}" / "model.safetensors")
        for method in ("lora", "dora"):
            factors: dict[str, torch.Tensor] = {}
            for name, (out, width) in block.items():
                key = f"base_model.model.{name}"
                factors[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=source) / width**0.5
                factors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=source) * 0.002
                if method == "dora":
                    norm = base[f"{name}.weight"].float().norm(dim=1)
                    factors[f"{key}.lora_magnitude_vector"] = norm * (1 + 0.01 * torch.randn(out, generator=source))
            _save(factors, folder / f"{method}-{turn}" / "adapter_model.safetensors")
            text = json.dumps(config | {"use_dora": method == "dora"})
            (folder / f"{method}-{turn}" / "adapter_config.json").write_text(text)


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})


def contender(name: str, folder: Path) -> Callable[[], Any]:
    """What is measured, ready to be called."""
    whose, _, what = name.partition("/")
    if whose == "floor":
        return lambda: _floor(folder, what)
    method, _, how = what.partition("-")
    if whose == "naive":
        return lambda: _naive(folder, method)
    tuned = [folder / f"{method}-{turn}" for turn in range(4 if how == "x4" else 1)]
    return lambda: list(saved_models.probe(folder / "base", tuned, axis="in" if how == "in" else "out"))


def _floor(folder: Path, what: str) -> None:
    base, after = Shards(folder / "base"), Shards(folder / "full-0")
    for name in base:
        rows, width = base.shape(name)
        size = max(1, saved_models.BLOCK // width)
        W0, W, A = torch.empty(size, width), torch.empty(size, width), torch.randn(width, RANK)
        out = torch.empty(size, RANK)
        for start in range(0, rows, size):
            count = min(size, rows - start)
            base.fill(name, start, W0[:count])
            if what == "pair":
                after.fill(name, start, W[:count])
            _runs(W0[:count].numpy(), (W if what == "pair" else W0)[:count].numpy())
            if what == "product":
                torch.mm(W0[:count], A, out=out[:count])


def _runs(x: Any, y: Any, size: int = 4096) -> None:
    for start in range(0, x.shape[1], size):
        np.vecdot(x[:, start : start + size], y[:, start : start + size])


def _naive(folder: Path, method: str) -> list[tuple[float, float]]:
    """Equations 3 and 4 as they are written, matrix by matrix."""
    base, found = load_file(folder / "base" / "model.safetensors"), []
    if method == "full":
        after = load_file(folder / "full-0" / "model.safetensors")
    else:
        factors = load_file(folder / f"{method}-0" / "adapter_model.safetensors")
    for name, W0 in base.items():
        W0 = W0.float()
        if method == "full":
            W = after[name].float()
        else:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            W = W0 + 2.0 * (factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"])
        moved = (W.norm(dim=1) - W0.norm(dim=1)).abs().mean().item()
        found.append((moved, (1 - torch.nn.functional.cosine_similarity(W, W0, dim=1)).mean().item()))
    return found


def seconds(cell: str, folder: Path, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """What every contender of a cell took, in the same order of rounds."""
    ready = {name: contender(name, folder) for name in CELLS[cell]}
    for call in ready.values():
        call()  # files come into the cache, and torch allocates
    taken: dict[str, list[float]] = {name: [] for name in ready}
    order, mixed = list(ready), random.Random(0)
    for _ in range(rounds):
        mixed.shuffle(order)
        for name in order:
            start = time.perf_counter()
            ready[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


def peak(name: str, folder: Path) -> int:
    """Bytes of resident memory that a contender takes at most above what this process has; call it in a new one."""
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # BLAS has its buffers
    ready = contender(name, folder)
    provenance.reset_peak_memory()
    before = provenance.peak_memory_bytes()
    ready()
    return provenance.peak_memory_bytes() - before


def callback(name: str, steps: int = 200) -> tuple[float, float]:
    """(seconds that four probed checkpoints took, seconds of the whole training) of the embedded base."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from dora_lab import mini
    from dora_lab.methods.inject import inject
    from dora_lab.probing.callback import LLAMA_KINDS, DecompositionCallback
    from dora_lab.spec import Method

    model: Any = AutoModelForCausalLM.from_pretrained(mini.folder())
    settings: dict[str, Any] = {} if name == "ft" else {"rank": 8, "alpha": 16.0, "target_modules": LLAMA_KINDS}
    inject(model, Method(name=name, **settings), seed=0)
    ids = torch.randint(3, model.config.vocab_size, (64, 96), generator=torch.Generator().manual_seed(0))
    rows: list[Any] = []
    probe = DecompositionCallback(rows.append, kinds=LLAMA_KINDS)
    inner, spent = probe.on_step_end, [0.0]

    def timed(*args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        inner(*args, **kwargs)
        spent[0] += time.perf_counter() - start

    probe.on_step_end = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=16, use_cpu=True, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # type: ignore[arg-type]
                          callbacks=[probe])  # fmt: skip
        start = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - start
    if len(rows) % 4 or not rows:
        raise RuntimeError(f"the callback wrote {len(rows)} rows: not four checkpoints")
    return spent[0], whole


def measured(cell: str, folder: Path) -> dict[str, list[float]]:
    """The numbers of a cell by contender: seconds; bytes; or [seconds of the callback, of the training]."""
    if cell == "memory":
        return {name: [float(_in_a_process("peak", name, folder))] for name in CELLS[cell]}
    if cell == "callback":
        return {name: list(callback(name)) for name in CELLS[cell]}
    return seconds(cell, folder)


def _in_a_process(what: str, name: str, folder: Path) -> str:
    command = [sys.executable, "-m", "experiments.probe_speed", "--one", name, "--folder", str(folder)]
    # freed blocks go back to the system at once, so that what is resident is what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{what} of {name} failed:\n{done.stderr[-2000:]}")
    return done.stdout.split()[-1]


def main(argv: list[str] | None = None) -> None:
    """Measure the cells that are not there yet, and write each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/local"))
    parser.add_argument("--only", default="", help="cells whose name holds this text")
    parser.add_argument("--fresh", action="store_true", help="measure what is there already, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.one:
        print(peak(options.one, options.folder))
        return
    file = options.results / "bench" / "probe_speed.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    known = {} if options.fresh else {row["cell"]: row for row in rows}
    with tempfile.TemporaryDirectory() as temporary:
        block = shapes()
        for cell in CELLS:
            if options.only not in cell or cell in known:
                continue
            print(cell, flush=True)
            if cell != "callback" and not (Path(temporary) / "base").exists():
                prepare(Path(temporary), block)
            row = {
                "cell": cell,
                "taken": measured(cell, Path(temporary)),
                "shapes": block,
                "blocks": BLOCKS,
                "threads": 1,
            }
            known[cell] = row | {
                "rank": RANK, "machine": provenance.machine(), "packages": provenance.packages(),
                "code": provenance.code(),
            }  # fmt: skip
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps(row, sort_keys=True) + "\n" for row in known.values()))


if __name__ == "__main__":
    main()
