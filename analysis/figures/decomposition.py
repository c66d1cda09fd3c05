"""Figure 2 and 7: ΔD against ΔM for query and value under FT, LoRA and DoRA, with Pearson's r beside the paper's.

r is computed within a seed and averaged over seeds (Fisher z); the points of all seeds are drawn. Colour is the layer,
the marker the checkpoint. The axes of the panels differ, as in the paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import colormaps
from matplotlib.lines import Line2D

from analysis import probe_figures, script
from dora_lab import report
from dora_lab.paper import claims, layer_correlation
from dora_lab.report.statistics import Estimate

METHODS = ("FT", "LoRA", "DoRA")
KINDS = ("q_proj", "v_proj")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def build(results: Path) -> list[Path]:
    """Write results/figures/decomposition{suffix}.{pdf,png}, one pair per group of runs; returns the paths."""
    paper = claims("commonsense")
    return probe_figures(results, "commonsense", "decomposition", lambda rows: draw(rows, paper))


def draw(probes: pd.DataFrame, paper: pd.DataFrame) -> Any:
    """The figure for the probe rows of one group of runs."""
    figure, axes = report.new_figure(len(KINDS), len(METHODS), width=10.0, height=5.6)
    shown = probes[probes["label"].isin(METHODS) & probes["kind"].isin(KINDS)]
    layers, fractions = sorted(shown["layer"].unique()), sorted(shown["fraction"].unique())
    colours = {layer: colormaps["viridis"](0.92 * i / max(len(layers) - 1, 1)) for i, layer in enumerate(layers)}
    markers = {fraction: MARKERS[k % len(MARKERS)] for k, fraction in enumerate(fractions)}
    estimates = {
        (i, j): layer_correlation(probes, label, kind)
        for i, kind in enumerate(KINDS)
        for j, label in enumerate(METHODS)
    }
    for i, kind in enumerate(KINDS):
        for j, label in enumerate(METHODS):
            axis, rows = axes[i, j], shown[(shown["kind"] == kind) & (shown["label"] == label)]
            sns.scatterplot(
                rows, x="delta_d", y="delta_m", hue="layer", style="fraction", palette=colours, markers=markers,
                s=30, linewidth=0.4, edgecolor="white", legend=False, ax=axis,
            )  # fmt: skip
            caption = _caption(estimates[i, j], paper, label, kind)
            axis.set(title=f"{label}, {report.KINDS[kind]}\n{caption}", xlabel="", ylabel="")
            axis.title.set_fontsize(8.5)
            axis.locator_params(nbins=5)
            axis.margins(0.08)
            if not len(rows):
                axis.text(0.5, 0.5, "no runs", ha="center", va="center", transform=axis.transAxes)
        axes[i, 0].set_ylabel("ΔM: mean |m − m₀|")
    for axis in axes[-1]:
        axis.set_xlabel("ΔD: mean (1 − cos)")
    step = -(-len(layers) // 8)  # at most eight layers in the legend
    handles = [
        Line2D([], [], marker="o", ls="", color=colours[layer], label=f"layer {layer + 1}")
        for layer in layers[:: step or 1]
    ]
    handles.append(Line2D([], [], ls="", label=""))
    said = {fraction: "final" if fraction == 1 else f"{fraction:.0%} of steps" for fraction in fractions}
    handles += [
        Line2D([], [], marker=marker, ls="", color="#555555", label=said[fraction])
        for fraction, marker in markers.items()
    ]
    counts = "\n".join(sorted({estimate.n for estimate in estimates.values() if estimate})) or "no points"
    figure.legend(
        handles=handles,
        loc="outside right center",
        frameon=False,
        alignment="left",
        title=f"each panel:\n{counts}\nr: within a seed,\nmean over seeds\n[95 % interval]\n",
        title_fontsize=8,
    )
    return figure


def _caption(estimate: Estimate | None, paper: pd.DataFrame, label: str, kind: str) -> str:
    """`r = +0.83 [+0.70, +0.91], paper +0.83`; the paper prints none (–) for the value matrices."""
    printed = paper[
        (paper["metric"] == "correlation")
        & (paper["kind"] == "number")
        & (paper["method"] == label)
        & (paper["subject"] == report.KINDS[kind])
    ]["value"]
    ours = "r –"
    if estimate is not None:
        ours = f"r = {estimate.value:+.2f}" + (
            "" if estimate.low is None or estimate.high is None else f" [{estimate.low:+.2f}, {estimate.high:+.2f}]"
        )
    return f"{ours}, paper {f'{printed.iloc[0]:+.2f}' if len(printed) else '–'}".replace("-", "−")


if __name__ == "__main__":
    script(build, __doc__)
