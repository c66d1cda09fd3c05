"""The law of one row (report/law.py) against the axes that the paper prints: no training, no free parameter.

LoRA's panel gives the norm n; full fine-tuning's panel then asks for a decay δ, DoRA's for a decay of m, and the
released script has both. Tick labels are ranges, not points: an order of magnitude, and said so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import script
from dora_lab import report
from dora_lab.paper.axes import PANELS, Panel
from dora_lab.report import Block, law
from dora_lab.report.provenance import Provenance

TITLES = {"lora": "LoRA: the norm", "ft": "Full fine-tuning: the decay", "dora": "DoRA: the decay of m"}
WEIGHT_DECAY = 0.01  # of the released VL-BART script, on every matrix and on the magnitudes
EPOCHS = 20
# steps of an epoch at batch 500 and 300: sizes of the four data sets are from memory, not counted
SCRIPT = {"ft": (1e-4, EPOCHS * 4380), "dora": (1e-3, EPOCHS * 7300)}  # peak rate, steps
NOTES = {
    "lora": "No decay acts on W₀ and E is orthogonal to w₀, nearly: ΔM = n d / (1 - d), so n = ΔM (1 - d) / d. Both "
    "ends of the query panel give one norm.",
    "ft": "ΔM = n |δ - d| with n from LoRA's panel of the same matrices. For query r is negative, so the end of small "
    "ΔD is that of large ΔM, and δ = d + ΔM / n. For value no r is printed, ΔM is the panel's range, and the law "
    "passes 0 where d = δ. The script: δ = 1 - exp(-η λ steps / 2), peak rate 1e-4, decay 0.01, 20 epochs.",
    "dora": "m itself decays: ΔM / n of the order of δ_m = 1 - exp(-η λ steps / 2), peak rate 1e-3.",
}
ISNT = (
    "a fit, nor a run of ours. From tick labels (ranges, not points; layers differ in n), and from data sizes from "
    "memory: an order of magnitude."
)


def build(results: Path) -> list[Path]:
    """Write results/tables/law.{md,csv,tex}; returns their paths."""
    norms = {panel.kind: _norm(panel) for panel in PANELS if panel.method == "lora"}
    rows = [row for panel in PANELS for row in _rows(panel, norms[panel.kind])]
    blocks = [
        Block(
            title=title,
            cells=pd.DataFrame([_shown(row) for row in rows if row["method"] == method]).dropna(axis=1, how="all"),
            text=("Matrix", "End"),
            notes=(NOTES[method],),
        )
        for method, title in TITLES.items()
    ]
    source = Provenance((), (), (), (), False, {})
    title = "The law against the axes of figures 2 and 7"
    return report.save_table(results / "tables", "law", title, blocks, pd.DataFrame(rows), source, ISNT)


def _ends(panel: Panel) -> list[tuple[str, float, float]]:
    """(name, ΔD, ΔM) at both ends of a panel; large ΔM goes with small ΔD where full fine-tuning's r is negative."""
    (d_low, d_high), (m_low, m_high) = panel.delta_d, panel.delta_m
    if panel.r is not None and panel.r < 0 and panel.method == "ft":
        m_low, m_high = m_high, m_low
    return [("small ΔD", d_low, m_low), ("large ΔD", d_high, m_high)]


def _norm(panel: Panel) -> float:
    """The mean of the norms that both ends of a panel of LoRA give."""
    return sum(m * (1 - d) / d for _, d, m in _ends(panel)) / 2


def _rows(panel: Panel, norm: float) -> list[dict[str, Any]]:
    rows = []
    for end, d, m in _ends(panel):
        row = {"kind": panel.kind, "method": panel.method, "end": end, "delta_d": d, "delta_m": m}
        if panel.method == "lora":
            rows.append(row | {"norm": m * (1 - d) / d})
            continue
        rate, steps = SCRIPT[panel.method]
        decay = law.decayed(rate, WEIGHT_DECAY, steps)
        row |= {"norm": norm, "script_decay": decay}
        if panel.method == "dora":
            row |= {"share": m / norm}
        else:
            row |= {"ratio": decay / d, "script_delta_m": float(law.full(norm, d, decay))}
        if panel.method == "ft" and panel.r is not None:
            row |= {"needed_decay": d + m / norm}
        rows.append(row)
    return rows


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    def percent(name: str) -> str | None:
        return f"{100 * row[name]:.1f} %" if name in row else None

    printed = f"{row['delta_m']:g}"
    if row["method"] == "ft" and "needed_decay" not in row:
        low, high = next(panel.delta_m for panel in PANELS if (panel.kind, panel.method) == (row["kind"], "ft"))
        printed = f"{low:g} to {high:g}"

    return {
        "Matrix": report.KINDS[row["kind"]], "End": row["end"], "ΔD": f"{row['delta_d']:g}", "ΔM": printed,
        "n": f"{row['norm']:.2f}", "ΔM / n": percent("share"), "δ needed": percent("needed_decay"),
        "δ of the script": percent("script_decay"),
        "δ / ΔD": f"{row['ratio']:.1f}" if "ratio" in row else None,
        "ΔM by the script": f"{row['script_delta_m']:.3f}" if "script_delta_m" in row else None,
    }  # fmt: skip


if __name__ == "__main__":
    script(build, __doc__)
