"""r against δ / ΔD on thirty real layers, kind by kind, beside what the norms alone predicted (experiment `sign`).

The prediction is that of experiments/registered/sign.md, made before the runs: its line is the median, its dotted bars
5 to 95 % of draws, without points the same with each layer's |E| as an earlier run had it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis import script
from analysis.cells import measured
from analysis.tables.sign_small import KINDS, of_small, predicted
from dora_lab import report

TICKS = (0, 0.5, 1, 2.5, 5)
BY_NORMS, BY_E = "FT by the norms", "FT by norms and |E|"
NORMS = {"with": "FT, norms with |E|", "against": "FT, norms against |E|"}
LATE = "r of ΔD and ΔM\ncheckpoints from 0.7 on"
NOTE = "bars: 95 %, t over seeds of Fisher's z (of one seed: layers resampled); dotted: 5 to 95 % of draws"
FIGURES = {"sign_small": KINDS[:4], "sign_small_mlp": KINDS[4:]}
AT = {"wide_low": np.nan, "wide_high": np.nan}


def build(results: Path) -> list[Path]:
    """Write results/figures/{sign_small,sign_small_mlp}.{pdf,png,data.csv}; returns the paths, none without runs."""
    probes = of_small(results)
    if not len(probes):
        return []
    found = [
        {"kind": row["kind"], "label": NORMS.get(cell.norms, report.METHODS[cell.method].label), "ratio": cell.ratio,
         "y": row["r"], "low": row["low"], "high": row["high"], "seeds": row["seeds"], **AT}
        for row in measured(probes)
        if row["window"] == "late"
        for cell in [row["cell"]]
    ]  # fmt: skip
    for (kind, ratio), of in predicted().items():
        found.append({"kind": kind, "label": BY_NORMS, "ratio": ratio, "y": of.r, **AT, "wide_low": of.low,
                      "wide_high": of.high})  # fmt: skip
        found.append({"kind": kind, "label": BY_E, "ratio": ratio, "y": of.measured, **AT})
    labels = [*(report.METHODS[m].label for m in ("ft", "lora", "dora")), *NORMS.values(), BY_NORMS, BY_E]
    place = {name: at for at, name in enumerate([*KINDS, *labels])}
    data = pd.DataFrame(found).assign(row=LATE, x=lambda rows: np.arcsinh(rows["ratio"]))
    data = data.sort_values(["kind", "label", "x"], key=lambda of: of if of.name == "x" else of.map(place))
    data = data.assign(column=data["kind"].map(report.KINDS))
    source = report.provenance(probes, probes.attrs["statuses"])
    marks = {float(np.arcsinh(tick)): f"{tick:g}" for tick in TICKS}
    ticks = dict.fromkeys(data["column"].unique(), marks)
    paths: list[Path] = []
    for name, kinds in FIGURES.items():
        figure, shown = report.lines(
            data[data["kind"].isin(kinds)], "δ / ΔD", NOTE, limits=(-1.05, 1.05), dodge=0.05, ticks=ticks, bare=(BY_E,)
        )
        paths += report.save_figure(figure, results / "figures", name, source, shown)
    return paths


if __name__ == "__main__":
    script(build, __doc__)
