"""DoRA lab: fine-tune with weight-decomposed adapters, watch magnitude and direction move, rebuild the paper's tables.

``dora_lab.inject`` is loaded on first use, so ``import dora_lab`` imports no torch: the reading side stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_lab.adapters import inject

__version__ = "0.1.0"
__all__ = ["__version__", "inject"]


def __getattr__(name: str) -> Any:
    """Import ``inject`` on first use (PEP 562); raises AttributeError for any other unknown name."""
    if name == "inject":
        from dora_lab.adapters import inject

        return inject
    raise AttributeError(f"module 'dora_lab' has no attribute '{name}'")
