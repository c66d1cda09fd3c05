"""DoRA lab: fine-tune with weight-decomposed adapters, watch magnitude and direction move, rebuild the paper's tables.

The functions are loaded on first use, so ``import dora_lab`` imports no torch: the reading side stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_lab.formats.live import export, load_adapter, save_adapter
    from dora_lab.methods.inject import attach, detach, inject, merge, unmerge
    from dora_lab.spec import Method

__version__ = "0.1.0"
__all__ = [
    "Method",
    "__version__",
    "attach",
    "detach",
    "export",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "unmerge",
]
_ROOMS = {
    "spec": ("Method",),
    "methods.inject": ("attach", "detach", "inject", "merge", "unmerge"),
    "formats.live": ("export", "load_adapter", "save_adapter"),
}


def __getattr__(name: str) -> Any:
    """Import a public function on first use (PEP 562); raises AttributeError for any other unknown name."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"dora_lab.{room}"), name)
    raise AttributeError(f"module 'dora_lab' has no attribute '{name}'")
