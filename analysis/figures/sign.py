"""What decides the sign of figure 2: r against δ / ΔD, and figure 2 again with decay beside without.

`sign`: late and early checkpoints, a panel for each kind of matrix; the lines by the law are of the layers' norms and
|E| as measured in runs of other seeds (experiments/_sign_norms.py), at the last checkpoint. `sign_figure2`: the least
decay under which query has the paper's pattern of signs (FT −, LoRA +, DoRA −; one λ for all), over no decay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import script
from analysis.cells import KINDS, WINDOWS, of_cells, zs
from analysis.tables.sign import with_decay
from dora_lab import report
from dora_lab.paper.axes import PANELS
from experiments import sign
from experiments._sign_norms import BASES, delta_d, predicted
from experiments.sign import DECAYS, SAME, Cell

TICKS = (0, 0.5, 1, 2.4, 5, 10, 20, 50)  # 2.4: where the paper's panel lies
SHOWN = {"late": "checkpoints from 0.7 on", "early": "checkpoints from 0.25 on"}
LAW = "{} by the law"
METHODS = ("ft", "lora", "dora")
PATTERN = {"ft": -1, "lora": 1, "dora": -1}  # of the paper's r of query


def build(results: Path) -> list[Path]:
    """Write results/figures/{sign,sign_figure2}.{pdf,png,data.csv}; returns the paths, none without runs."""
    probes = of_cells(results, "sign", sign.cells())
    if not len(probes):
        return []
    plain = probes[[cell.control in ("", SAME) for cell in probes["cell"]]]
    paths: list[Path] = []
    for name, drawn in (("sign", curves(plain)), ("sign_figure2", figure2(plain))):
        if drawn is not None:
            source = report.provenance(plain, probes.attrs["statuses"])
            paths += report.save_figure(drawn[0], results / "figures", name, source, drawn[1])
    return paths


def curves(probes: pd.DataFrame) -> Any:
    """r against δ / ΔD and its numbers. x is spaced as arsinh: 0 has a place."""
    found = [
        {"row": f"r of ΔD and ΔM\n{SHOWN[row['window']]}", "column": report.KINDS[row["kind"]],
         "label": report.METHODS[row["cell"].method].label, "ratio": row["ratio"], "y": row["r"], "low": row["low"],
         "high": row["high"], "wide_low": row["layers_low"], "wide_high": row["layers_high"], "seeds": row["seeds"]}
        for row in with_decay(probes)
        if row["kind"] in KINDS
    ]  # fmt: skip
    top = max(row["ratio"] for row in found)
    found += [
        {"row": f"r of ΔD and ΔM\n{SHOWN['late']}", "column": report.KINDS[kind], "ratio": ratio, "y": y,
         "label": LAW.format(report.METHODS[method].label)}
        for kind in KINDS
        for method in METHODS
        for ratio, y in _by_law(method, kind, top)
    ]  # fmt: skip
    rows = [f"r of ΔD and ΔM\n{SHOWN[window]}" for window in WINDOWS]
    columns = [report.KINDS[kind] for kind in KINDS]
    labels = [report.METHODS[method].label for method in METHODS]
    order = {text: at for at, text in enumerate([*rows, *columns, *labels, *map(LAW.format, labels)])}
    data = pd.DataFrame(found).assign(x=lambda rows: np.arcsinh(rows["ratio"]))
    data = data.sort_values(["row", "column", "label", "x"], key=lambda of: of.map(lambda v: order.get(v, v)))
    ticks = {float(np.arcsinh(tick)): f"{tick:g}" for tick in TICKS if tick <= max(top, 5)}
    note = (
        "bars: 95 %, t over seeds of Fisher's z (of one seed: layers resampled); dotted: layers and seeds resampled; "
        "LoRA: δ of A and B, which does not reach W₀"
    )
    ticked = dict.fromkeys(data["column"].unique(), ticks)
    bare = [*map(LAW.format, labels)]
    return report.lines(data, "δ / ΔD", note, limits=(-1.05, 1.05), dodge=0.08, ticks=ticked, bare=bare)


def _by_law(method: str, kind: str, top: float) -> list[tuple[float, float]]:
    """(δ / ΔD, r), as far as δ is below 90 %."""
    base, ratios = BASES["mini"], np.sinh(np.linspace(0, np.arcsinh(top), 41))
    d = delta_d(base, method, (kind,))
    return [(float(x), predicted(base, method, kind, "found", x * d)[0]) for x in ratios if x * d < 0.9]


def figure2(probes: pd.DataFrame) -> Any:
    """ΔD against ΔM of query and value, late checkpoints, three methods under one λ and without decay, and its numbers.

    None where no λ gives query the paper's signs, or a run without decay is not there.
    """
    z = zs(probes[probes["kind"] == "q_proj"])

    def cell(method: str, decay: float) -> Cell:
        return Cell(method, "" if method == "ft" or not decay else SAME, decay)

    def has_pattern(decay: float) -> bool:
        seeds = [list(z.get((cell(method, decay), "q_proj", "late"), {}).values()) for method in METHODS]
        return all(seeds) and all(np.mean(of) * PATTERN[m] > 0 for of, m in zip(seeds, METHODS, strict=True))

    least = next((decay for decay in DECAYS if decay and has_pattern(decay)), None)
    there = set(probes["cell"])
    if least is None or not {cell(method, 0.0) for method in METHODS} <= there:
        return None
    late = probes[(probes["fraction"] >= WINDOWS["late"]) & probes["kind"].isin(("q_proj", "v_proj"))]
    parts = [
        late[late["cell"] == cell(method, decay)].assign(
            label=f"{report.METHODS[method].label}, {f'λ of δ {decay:.1%}' if decay else 'no decay'}"
        )
        for decay in (least, 0.0)
        for method in METHODS
    ]
    # without method and rank, by which a figure orders its labels
    return report.scatter(pd.concat(parts).drop(columns=["method", "rank"]), PANELS, columns=len(METHODS))


if __name__ == "__main__":
    script(build, __doc__)
