"""Saved adapters and models: their file formats are read and written here and nowhere else.

`formats` turns an adapter file of anybody's into one neutral value and back; `adapters` puts such values on live models
(`save_adapter`, `load_adapter`, `export`) and keeps the manifest that ties an adapter to its base.
"""

from __future__ import annotations

from dora_lab.checkpoints.adapters import export, fingerprint, load_adapter, save_adapter
from dora_lab.checkpoints.formats import Adapter, Factors, read_adapter
from dora_lab.files import CheckpointError

__all__ = [
    "Adapter",
    "CheckpointError",
    "Factors",
    "export",
    "fingerprint",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]
