"""The ranges that figures 2 and 7 are drawn over: between the outermost ticks of each axis. No point can be read off.

VL-BART after the four image-text tasks; four checkpoints of twelve layers (six and six) in every panel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One panel: kind of matrix, method, ranges of mean ΔD and ΔM, and the r that is printed for it."""

    kind: str
    method: str
    delta_d: tuple[float, float]
    delta_m: tuple[float, float]
    r: float | None  # section 4.1, query matrices alone


PANELS = (
    Panel("q_proj", "ft", (0.014, 0.022), (0.05, 0.09), -0.62),
    Panel("q_proj", "lora", (0.10, 0.16), (0.25, 0.45), 0.83),
    Panel("q_proj", "dora", (0.16, 0.32), (0.7, 1.4), -0.31),
    Panel("v_proj", "ft", (0.02, 0.08), (0.020, 0.055), None),
    Panel("v_proj", "lora", (0.150, 0.325), (0.2, 0.8), None),
    Panel("v_proj", "dora", (0.20, 0.50), (0.4, 1.0), None),
)
