"""The lock of a run directory: one writer at a time, named by host and process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from dora_lab.runs.errors import LockedError


def acquire(file: Path) -> tuple[IO[str], str | None]:
    """Take the lock file: held by the kernel (it ends with the process), named by host and pid inside.

    Returns the open file and, if a dead process had left its name there, a note. Raises LockedError.
    """
    while True:
        handle = file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            handle.close()
            raise LockedError(f"{file.parent} is being written by {_describe(owner)}; wait for it or stop it") from None
        # the former holder may have removed the file between our open and our lock: then ours is a file without a name
        if file.exists() and os.path.samestat(os.fstat(handle.fileno()), file.stat()):
            break
        handle.close()
    owner = _owner(handle)
    here = socket.gethostname()
    if owner is not None and owner.get("host") != here:
        handle.close()  # the kernel's lock may not reach over hosts, so its word is not enough
        raise LockedError(f"{file.parent} is locked by {_describe(owner)}; if it has ended, remove {file}")
    handle.truncate(0)
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    json.dump({"host": here, "pid": os.getpid(), "since": since}, handle)
    handle.flush()
    return handle, f"taken over from {_describe(owner)}, which had ended without closing it" if owner else None


def _owner(handle: IO[str]) -> dict[str, Any] | None:
    handle.seek(0)
    try:
        owner = json.loads(handle.read())
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _describe(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "another process"
    since = f" since {owner['since']}" if "since" in owner else ""
    return f"process {owner.get('pid')} on host {owner.get('host')}{since}"
