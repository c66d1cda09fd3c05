"""What reading raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A saved model or adapter that cannot be used: names the file, what is wrong and what to do."""


class LoadError(ValueError):
    """A model or data source that cannot be used; says which and what to do."""
