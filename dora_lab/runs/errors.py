"""What a run directory raises, and which of it a run cannot help."""

from __future__ import annotations


class StoreError(ValueError):
    """A run directory that cannot be read or written as asked; says which file and what to do."""


class LockedError(StoreError):
    """Another process is writing to the run directory."""


class ResumeError(StoreError):
    """What is there cannot be gone on with: it is of other inputs; says what differs. Nothing was changed."""


# what a run cannot help and a later call may find mended: the run is interrupted, not failed, and keeps its checkpoints
OUTSIDE = (KeyboardInterrupt, SystemExit, OSError, ResumeError)
