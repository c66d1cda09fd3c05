"""What code, machine and packages a run had: for its record."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from dora_lab.house import EXPERIMENTS, INSTALLED, PACKAGE, REGISTERED

SOURCE = PACKAGE.parent
CODE = {"dora_lab": PACKAGE, "experiments": EXPERIMENTS}  # what can change a result; analysis and documents cannot
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "lm_eval",
    "datasets",
    "numpy",
)


def code() -> dict[str, str | None]:
    """`commit` of the repository and `diff`, a hash of uncommitted changes to the code; None where there is none.

    Where git says nothing (a folder of another user's), there is `files`, a hash of the code; so there is of an
    installed package, which may lie in another's repository, and of a copy of the tree: DORA_LAB_COMMIT says which
    commit it is a copy of.
    """
    if told := os.environ.get("DORA_LAB_COMMIT"):
        return {"commit": told, "diff": None, "files": _files()}
    commit = None if INSTALLED else _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": None, "diff": None, "files": _files()}
    changed = _git("diff", "HEAD", "--binary", "--", *CODE) or b""
    listed = (_git("ls-files", "--others", "--exclude-standard", "-z", "--", *CODE) or b"").split(b"\0")
    whole = hashlib.sha256(changed)
    new = [SOURCE / os.fsdecode(name) for name in listed if name]
    for file in new:
        whole.update(f"{file.relative_to(SOURCE).as_posix()}\0".encode())
        whole.update(file.read_bytes())
    return {"commit": commit.decode().strip(), "diff": whole.hexdigest()[:12] if changed or new else None}


def registered(experiment: str) -> str | None:
    """SHA-256 of what is registered for an experiment (see `paper.registered`); None if nothing is."""
    file = REGISTERED / f"{experiment}.md"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _files() -> str:
    """12 hex digits of the names and contents of all files of the code; the same in a clone and installed from it."""
    whole = hashlib.sha256()
    found = {
        f"{name}/{file.relative_to(folder).as_posix()}": file
        for name, folder in CODE.items()
        for file in folder.rglob("*")
        if file.is_file() and not {"__pycache__", "shipped"} & {*file.relative_to(folder).parts}
    }
    for name, file in sorted(found.items()):
        whole.update(f"{name}\0{file.stat().st_size}\0".encode())
        whole.update(file.read_bytes())
    return whole.hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Processor, number of cores and system; nothing that names the machine or its user."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reset_peak_memory() -> None:
    """Start measuring the peak anew, where the system can (Linux); several runs may share one process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Largest resident memory of this process, since `reset_peak_memory` where that works, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=SOURCE, capture_output=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
