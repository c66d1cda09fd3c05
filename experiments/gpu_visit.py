"""What only a GPU can measure, in one go of some minutes: `python3 -m experiments.gpu_visit --seconds 420 --out DIR`.

Stages come in order of worth, each cell with an estimate; one that no longer fits is skipped and says so. Rows go to
DIR/gpu.jsonl as they come, so that a visit cut short is a valid shorter one; the table is printed last. What fails, or
does not fit into memory, is a row. Nothing needs to be installed beyond torch, transformers and PEFT, and nothing is
fetched. The card's settings are left alone. Where the tree has no history, DORA_LAB_COMMIT says what it is of.
Without a GPU, `--cpu` runs every stage on tiny shapes: a dry run.

It reproduces table 7 of the paper (memory with the norm in the graph or not) and has no specs of its own: what stage
llm trains and keeps is that of `small` and `sign`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.gpu.visit import Visit

NEEDED = ("torch", "transformers", "safetensors", "numpy", "tokenizers")
USED = {"peft": "PEFT's contenders", "accelerate": "the resume check", "triton": "the kernels"}
ROOM = 70 * 2**30  # bytes of the card: LLaMA-7B in bfloat16 with its activations
STAGES = (
    "ceilings", "right", "fast", "linears", "table7", "whole", "probe", "merge", "compiled", "more", "llava", "llm",
)  # fmt: skip
ASKED = ("passes", "profile")  # where a step's time goes: by name alone


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420.0, help="time in all (default: 420)")
    parser.add_argument("--out", type=Path, default=Path("results/local/bench"), help="folder of gpu.jsonl")
    parser.add_argument("--only", default="", help=f"stages, by commas, in this order: {', '.join((*STAGES, *ASKED))}")
    parser.add_argument("--cpu", action="store_true", help="the dry run: tiny shapes, without a GPU")
    parser.add_argument("--bring", type=Path, help="for stage llm: folder with the wheel's pieces and llm_adapters")
    parser.add_argument("--runs", action="append", default=[], help="for stage llm: FIELD=VALUE, only runs that match")
    parser.add_argument("--go-on", help=argparse.SUPPRESS)  # the visit that a lost process was in
    options = parser.parse_args(argv)
    chosen = [name for name in options.only.split(",") if name] or list(STAGES)
    if unknown := [name for name in chosen if name not in (*STAGES, *ASKED)]:
        _leave(f"no stage is called {', '.join(unknown)}; there are: {', '.join((*STAGES, *ASKED))}")
    begun = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, and nothing waits for a network
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers is about to change
    _refuse(options.cpu)
    from experiments.gpu import table
    from experiments.gpu.visit import PoisonedError, Visit, stamp

    name = options.go_on or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    visit = Visit(options.out, options.seconds - (time.monotonic() - begun), options.cpu, name, stamp(options.cpu))
    try:
        _stages(visit, chosen, options)
    except PoisonedError:
        sys.stdout.flush()
        again = ["--only", ",".join(chosen), "--out", str(options.out), "--seconds", f"{visit.left():.0f}"]
        again += [f"--bring={options.bring}"] if options.bring else []
        again += [f"--runs={text}" for text in options.runs]
        os.execv(sys.executable, [sys.executable, "-m", "experiments.gpu_visit", *again, "--go-on", name])
    print()
    print("\n".join(table.lines(visit.known)))


def _leave(words: str) -> None:
    print(f"error: {words}", file=sys.stderr)
    sys.exit(2)


def _refuse(cpu: bool) -> None:
    """End with one line where a visit cannot be made; say what is missing that only costs some cells."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        _leave(f"not installed here: {', '.join(missing)}")
    if missing := [f"{name} ({what})" for name, what in USED.items() if find_spec(name) is None]:
        print(f"not installed here, some cells will say so: {', '.join(missing)}")
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if cpu:
        return
    if torch.version.cuda is None:
        _leave(f"torch {torch.__version__} here was built without CUDA; --cpu is the dry run")
    if not torch.cuda.is_available():
        _leave("no GPU here that torch can use; --cpu is the dry run")
    room = torch.cuda.get_device_properties(0).total_memory
    if room < ROOM:
        _leave(f"the GPU has {room / 2**30:.0f} GiB of memory and {ROOM / 2**30:.0f} are needed; --cpu is the dry run")


def _stages(visit: Visit, chosen: list[str], options: argparse.Namespace) -> None:
    from experiments.gpu import ceilings, child, fast, lab, layer, llm, memory, passes, probe, right

    runs = {
        "ceilings": ceilings.run, "right": right.run, "fast": fast.run, "linears": layer.run, "table7": memory.run,
        "whole": fast.run_whole, "more": fast.run_more, "compiled": layer.run_compiled, "llava": memory.run_llava,
        "probe": probe.run, "merge": probe.run_merge, "passes": passes.run,
        "profile": layer.run_profile, "llm": lambda visit: llm.run(visit, options.bring, options.runs),
    }  # fmt: skip
    gc.freeze()  # what the imports made is no garbage: memory is looked through after every cell
    if visit.cpu:
        child.as_on_a_gpu()
    for stage in chosen:
        if stage not in ("ceilings", "right"):  # what is not right there is not timed
            lab.narrow.FUSED = not visit.cpu and child.kernels_are_right(visit)
        runs[stage](visit)


if __name__ == "__main__":
    main()
