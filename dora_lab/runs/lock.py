"""The lock of a run directory: one writer at a time, named by machine, process and a word of its own.

Three signs say whether who is named in a lock still lives; none is enough alone. The kernel's lock ends with its
process, but some network disks grant it to everybody, and it reaches no other machine. A process id can be looked up on
its own machine alone (the same boot of the same kernel, and the same space of process ids). A holder's *beat*, the time
of its lock file, renewed every `BEAT` seconds, reaches everywhere, but a machine may sleep. So a lock is taken over
from who is dead by the best sign there is, and a holder looks before each write whether the lock is still its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, NamedTuple

from dora_lab.io.text import shown
from dora_lab.runs.errors import LockedError

BEAT = 30.0  # seconds
STALE = 600.0  # seconds without a beat after which a holder on another machine is taken for dead


class Holder(NamedTuple):
    """Who is named in a lock file, and whether they live as far as can be told."""

    name: str
    alive: bool


class Lock:
    """A lock that is held: its file open, a thread that renews the beat."""

    def __init__(self, file: Path, handle: IO[str], text: str) -> None:
        self.file, self._handle, self._text = file, handle, text
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._renew, daemon=True)
        self._beat.start()

    def require(self) -> None:
        """Raise LockedError if the lock is no longer this process's: the file was removed, or another has taken it."""
        if (now := _read(self.file)) != self._text:
            whose = _describe(_owner(now)) if now else "nobody: its lock file was removed"
            raise LockedError(f"{self.file.parent} now belongs to {whose}; this process stops writing to it")

    def release(self) -> None:
        """Give it back: the file is removed if it is still this process's."""
        self._ended.set()
        with contextlib.suppress(OSError):  # gone already, or the disk is read-only by now: the kernel's lock ends
            if _read(self.file) == self._text:
                os.unlink(self.file)
        self._handle.close()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed in between
                os.utime(self._handle.fileno())


def acquire(file: Path) -> tuple[Lock, str | None]:
    """Take the lock file of a run directory.

    Returns the lock and, if a dead process had left its name there, a note. Raises LockedError, naming the holder, if
    it lives or may live.
    """
    while True:
        handle = file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(_read(file))
            handle.close()
            raise LockedError(f"{file.parent} is being written by {_describe(owner)}; wait for it or stop it") from None
        # the former holder may have removed the file between our open and our lock: then ours is a file without a name
        if file.exists() and os.path.samestat(os.fstat(handle.fileno()), file.stat()):
            break
        handle.close()
    owner = _owner(_read(file))
    if owner is not None and _lives(file, owner, _excludes(file, handle)):
        handle.close()
        far = "" if _here(owner) else f" (on another machine, its last sign of life {max(_age(file), 0):.0f} s ago)"
        raise LockedError(
            f"{file.parent} is being written by {_describe(owner)}{far}; wait for it or stop it: {STALE / 60:.0f} "
            f"minutes after its last sign of life it counts as dead; if it has ended, remove {file}"
        )
    handle.truncate(0)
    text = json.dumps({**_self(), "since": datetime.now(timezone.utc).isoformat(timespec="seconds")})
    handle.write(text)
    handle.flush()
    note = f"taken over from {_describe(owner)}, which had ended without closing it" if owner else None
    return Lock(file, handle, text), note


def holder(file: Path) -> Holder | None:
    """Who is named in a lock file, and whether they live; None if there is no such file. It stays as it is."""
    try:
        with file.open("r") as handle:
            owner = _owner(_read(file))
            name = _describe(owner) if owner else "somebody without a name"
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Holder(name, True)
            return Holder(name, owner is not None and _lives(file, owner, _excludes(file, handle)))
    except FileNotFoundError:
        return None
    except OSError:  # a disk without locks
        return Holder(name, owner is not None and _lives(file, owner, kernel=False))


def _lives(file: Path, owner: dict[str, Any], kernel: bool) -> bool:
    """Whether the owner of a lock that the kernel would give us lives; `kernel`: whether its locks exclude here."""
    if _here(owner):
        return not kernel and _runs(owner)
    if owner.get("boot") == _boot() is not None:  # a container of this kernel: its processes cannot be looked up
        return not kernel and _age(file) < STALE
    return "word" not in owner or _age(file) < STALE  # a lock of an older version has no beat


def _excludes(file: Path, held: IO[str]) -> bool:
    """Whether the kernel's locks exclude on this disk: with `held` locked, another one must be refused."""
    with file.open("r") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(), "pid": pid, "boot": _boot(), "space": _space(), "began": _began(pid),
        "word": secrets.token_hex(8),
    }  # fmt: skip


def _here(owner: dict[str, Any]) -> bool:
    """Whether the owner's process would be among those that can be looked up from here."""
    if owner.get("boot") is None or _boot() is None:  # a system that does not say, or a lock of an older version
        return owner.get("host") == socket.gethostname()
    if owner["boot"] != _boot():
        # the same name after another boot: this machine, started again, and all its processes are gone
        return owner.get("host") == socket.gethostname()
    return owner.get("space") == _space()


def _runs(owner: dict[str, Any]) -> bool:
    """Whether the owner's process is there, and no other one that got its number after it."""
    if owner.get("boot") not in (None, _boot()):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, ValueError, KeyError, TypeError, OverflowError):
        return False
    except OSError:
        pass  # it is another user's
    return owner.get("began") in (None, _began(int(owner["pid"])))


def _boot() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _space() -> int | None:
    """The space of process ids that this process is in; a container has its own."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return None


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the boot; tells it from a later one of the same number."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _age(file: Path) -> float:
    """Seconds since the last beat, by the disk's own clock where it can be asked: it need not be this machine's."""
    probe = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    now = time.time()
    with contextlib.suppress(OSError):  # a disk that may only be read
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    return now - file.stat().st_mtime


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _owner(text: str) -> dict[str, Any] | None:
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _describe(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "another process"
    since = f" since {owner['since']}" if "since" in owner else ""
    return shown(f"process {owner.get('pid')} on host {owner.get('host')}{since}")
