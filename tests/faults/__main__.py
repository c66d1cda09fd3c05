"""The campaign: every fault many times, every fuzz target thousands of times: `python -m tests.faults --times N`.

Writes a row per fault and target to results/bench/faults.jsonl as it goes (an interrupted campaign keeps what it has),
prints a summary, builds results/tables/faults.md; exit code 1 if something was not survived.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from analysis.tables import faults as table
from dora_lab.runs import provenance
from tests.faults import Fault, Skipped, all_faults
from tests.faults._fuzz import TARGETS, campaign


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="injections of each fault (default 20)")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most so long for one fault, once is enough")
    parser.add_argument("--cases", type=int, default=2000, help="cases of each fuzz target (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="comma-separated numbers, or fuzz")
    parser.add_argument("--results", type=Path, default=Path("results/local"))
    options = parser.parse_args(argv)
    file = options.results / "bench" / "faults.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(".faults.jsonl.partial")
    about = {"code": provenance.code(), "machine": provenance.machine(), "packages": provenance.packages()}
    only = set(filter(None, options.only.split(",")))
    lost = 0
    with partial.open("w", encoding="utf-8") as out:
        for one in (one for one in all_faults() if not only or one.number in only):
            row = inject(one, options.times, options.seconds, options.seed)
            lost += _write(out, row | about)
        for name in TARGETS if not only or "fuzz" in only else ():
            lost += _write(out, campaign(name, options.cases, options.seed) | about)
    partial.replace(file)
    for path in table.build(options.results):
        print(path)
    print(f"{lost} not survived" if lost else "everything was survived")
    return 1 if lost else 0


def inject(one: Fault, times: int, seconds: float, seed: int) -> dict[str, Any]:
    """Inject one fault up to `times` times; the row that says how often it was survived and what the user sees."""
    begun, seen, survived, tried, error, skipped = time.monotonic(), Counter[str](), 0, 0, None, None
    for number in range(times):
        if tried and time.monotonic() - begun > seconds:
            break
        folder = Path(tempfile.mkdtemp(prefix="fault-"))
        try:
            text = one.inject(folder, random.Random(f"{seed} {one.number} {one.name} {number}"))
            text = text.replace(str(folder), "…").replace(f"on host {socket.gethostname()}", "on host …")
            seen[" ".join(text.split())] += 1
            survived += 1
        except Skipped as reason:
            skipped = str(reason)
            break
        except Exception as failure:
            error = error or f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
            traceback.print_exc()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        tried += 1
    return {
        "kind": "fault",
        "number": one.number,
        "name": one.name,
        "times": tried,
        "survived": survived,
        "sees": min(seen, key=lambda text: (-seen[text], len(text))) if seen else None,
        "messages": len(seen),
        "error": error,
        "skipped": skipped,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _write(out: Any, row: dict[str, Any]) -> int:
    out.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    out.flush()
    lost = row["times"] - row["survived"]
    ends = "SKIPPED: " + row["skipped"] if row.get("skipped") else f"{row['survived']}/{row['times']} survived"
    print(f"{row['number']:>8}  {row['name'][:86]:86}  {ends}, {row['seconds']} s", flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(main())
