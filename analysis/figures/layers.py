"""Figures 3 and 8: how far magnitude and direction have moved in each layer at the end of training: q, k and v.

One line per method: the mean over seeds, with bars from the lowest to the highest seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import probe_figures, script
from dora_lab import report

KINDS = ("q_proj", "k_proj", "v_proj")
MEASURES = {"delta_m": "ΔM: mean |m − m₀|", "delta_d": "ΔD: mean (1 − cos)"}
WIDE = 20.0  # highest over lowest value of a row of panels above which its axis is logarithmic


def build(results: Path) -> list[Path]:
    """Write results/figures/layers{suffix}.{pdf,png}, one pair per group of runs; returns the paths."""
    return probe_figures(results, "commonsense", "layers", draw)


def draw(probes: pd.DataFrame) -> Any:
    """The figure for the probe rows of one group of runs; the last checkpoint of every run."""
    last = probes[probes["kind"].isin(KINDS) & (probes["step"] == probes.groupby("spec_id")["step"].transform("max"))]
    labels = report.ordered_labels(last)
    figure, axes = report.new_figure(len(MEASURES), len(KINDS), width=10.0, height=5.4)
    for i, (measure, name) in enumerate(MEASURES.items()):
        positive = last.loc[last[measure] > 0, measure]
        logarithmic = len(positive) == len(last) > 0 and positive.max() / positive.min() > WIDE
        for j, kind in enumerate(KINDS):
            axis = axes[i, j]
            for k, (label, look) in enumerate(report.styles(labels).items()):
                rows = last[(last["kind"] == kind) & (last["label"] == label)]
                _line(axis, rows, measure, look, shift=0.08 * (k - (len(labels) - 1) / 2))
            axis.set_title(report.KINDS[kind] if i == 0 else "")
            if not (last["kind"] == kind).any():
                axis.text(0.5, 0.5, "no runs", ha="center", va="center", transform=axis.transAxes)
            if logarithmic:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            layers = sorted(last["layer"].unique())
            axis.set_xticks([layer + 1 for layer in layers[:: -(-len(layers) // 12) or 1]])
        axes[i, 0].set_ylabel(name + (" (log scale)" if logarithmic else ""))
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    found = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
    seeds = last["seed"].nunique()
    figure.legend(
        handles=list(found.values()),
        loc="outside right center",
        frameon=False,
        alignment="left",
        title=f"mean of {seeds} seeds,\nbars: all seeds" if seeds > 1 else "one seed",
    )
    return figure


def _line(axis: Any, rows: pd.DataFrame, measure: str, look: report.Style, shift: float) -> None:
    """Mean over seeds per layer with bars to the extremes, shifted sideways so that bars do not hide each other."""
    if not len(rows):
        return
    by_layer = rows.groupby("layer")[measure].agg(["mean", "min", "max"])
    axis.errorbar(
        by_layer.index + 1 + shift,
        by_layer["mean"],
        label=look.label,
        color=look.colour,
        marker=look.marker,
        ls=look.line,
        ms=5,
        lw=1.3,
        capsize=2,
        yerr=[by_layer["mean"] - by_layer["min"], by_layer["max"] - by_layer["mean"]],
    )


if __name__ == "__main__":
    script(build, __doc__)
