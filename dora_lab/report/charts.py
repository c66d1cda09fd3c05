"""The two charts of the lab: a scatter of ΔD and ΔM, and lines. Both are read in grey as well as in colour."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pandas ships no stubs: read from its source, any selection from a frame is "Series | ndarray | DataFrame | ..."

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from textwrap import fill
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from dora_lab.report import statistics
from dora_lab.report.figures import legend_below, new_figure
from dora_lab.report.labels import KINDS, METHODS, styles
from dora_lab.report.points import points
from dora_lab.report.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 10.0  # of what shares an axis, largest over smallest above which the axis is logarithmic
MOST = 60  # panels of one figure that can still be read
_TIMES = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))  # ticks of a decade, the finest first
MARKERS = ("o", "s", "^", "D", "v", "P", "h", "X")
GREY = "#555555"


class Printed(Protocol):
    """What a paper prints of one panel (`dora_lab.paper.axes`): the ends of its axes, and r if it gives one."""

    @property
    def kind(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def delta_d(self) -> tuple[float, float]: ...
    @property
    def delta_m(self) -> tuple[float, float]: ...
    @property
    def r(self) -> float | None: ...


def scatter(
    rows: pd.DataFrame | Iterable[Mapping[str, Any]],
    paper: Iterable[Printed] = (),
    columns: int | None = None,
    layers: str = "",
) -> tuple[Figure, pd.DataFrame]:
    """ΔD against ΔM, a panel for each label and kind: colour and number are the layer, the marker the checkpoint.

    rows: as `points` takes them. paper: panels whose r and ends of axes stand in a box where kind and method are the
        same ("FT", "LoRA r=8", and "FT, and what sets it apart"); where our axes reach theirs, they are drawn as a
        rectangle too. columns: of panels; by itself, up to four. layers: which are which, where the count does not say.
    Returns the figure and its numbers: the points, and beside the first of a panel its r and slope (ΔM per ΔD) with
    95 % intervals (see `statistics.cautious`), of plain values also where the axes are logarithmic.
    Raises: ValueError for what `points` refuses, and for more than `MOST` panels.
    """
    found = points(rows)
    known = {(panel.kind, METHODS[panel.method].label): panel for panel in paper if panel.method in METHODS}
    parts = dict[Any, pd.DataFrame](iter(found.groupby(["kind", "label"], sort=False)))
    kinds, labels = list(dict.fromkeys(key[0] for key in parts)), list(found["label"].unique())
    printed = {(kind, label): known.get((kind, re.split(", | r=", label)[0])) for kind, label in parts}
    columns = columns or min(4, len(labels) if len(labels) > 1 else len(kinds))
    blocks = [[(kind, label) for label in labels] for kind in kinds]
    blocks = [[key for block in blocks for key in block]] if len(labels) == 1 else blocks
    places = [block[start : start + columns] for block in blocks for start in range(0, len(block), columns)]
    figure, axes = _grid(len(places), columns, len(parts), 2.9)
    spans = [(part[name].min(), part[name].max()) for part in parts.values() for name in ("delta_d", "delta_m")]
    logarithmic = all(low > 0 for low, _ in spans) and any(high / low > WIDE for low, high in spans)
    looks = _Looks(found)
    estimates: dict[tuple[str, str], list[Estimate | None]] = {}
    for line, panels in zip(places, axes, strict=True):
        for key, axis in zip([*line, *[None] * (columns - len(line))], panels, strict=True):
            if key not in parts:
                axis.remove()
                continue
            estimates[key] = _estimates(parts[key])
            _panel(axis, parts[key], looks, estimates[key], printed.get(key), logarithmic)
            kind, label = key
            name = ", ".join(text for text in (label, KINDS.get(kind, kind)) if text)
            said = "\n".join([name[-46:], *map(_said, ("r", "slope"), estimates[key])])
            axis.set_title(said, fontsize=8, pad=18 if any(printed.values()) else 6)
    for axis in axes[:, 0]:
        axis.set_ylabel("ΔM (units of the weight)")
    for axis in figure.axes:
        axis.set_xlabel("ΔD")
    legend_below(figure, looks.handles(), _note(list(estimates.values()), found.attrs["lost"], logarithmic, layers))
    said = _table(estimates)
    data = found.drop(columns="at").merge(said, on=["kind", "label"])
    if not data.duplicated(["kind", "label", "layer", "seed", "checkpoint"]).any():
        data = data.drop(columns="unit")  # the name of a module, long and said by its kind and layer
    numbers = said.columns.drop(["kind", "label"])
    data[numbers] = data[numbers].mask(data.duplicated(["kind", "label"]))
    return figure, data


def lines(
    data: pd.DataFrame,
    x_name: str,
    note: str,
    *,
    ticks: Mapping[str, Mapping[float, str]] | None = None,
    limits: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
    dodge: float = 0.0,
    joined: bool = True,
    bare: Collection[str] = (),
    band: bool = False,
    doublings: bool = False,
    logarithmic: bool = False,
) -> tuple[Figure, pd.DataFrame]:
    """A line for each label: colour, dashes and marker; a row of panels for each `row`, a column for each `column`.

    data: columns row and column (texts, in the order shown), label, x, y, low, high (NaN: no interval), and maybe
        paper, a printed value drawn as a star, dots, the values that y is the mean of, and wide_low and
        wide_high, a second interval drawn dotted. note: over the legend, what line and interval are. ticks: column ->
        position -> text. limits: of all y, or by column; without them a row of panels whose labels differ by more than
        `WIDE` is logarithmic, and what is not above 0 is left out of it. dodge: how far labels stand apart in x, so
        that no bar hides another (doublings: x is logarithmic, in powers of 2). joined: whether points are. bare:
        labels that are lines without points and stay where they are. band: intervals as bands, else bars. logarithmic:
        y is, in every row.
    Returns the figure and `data`. Raises: ValueError for more than `MOST` panels.
    """
    rows, columns = (list(data[name].unique()) for name in ("row", "column"))
    figure, axes = _grid(len(rows), len(columns), len(rows) * len(columns), 2.4)
    looks = styles(data["label"].unique())
    handles: dict[str, Any] = {}
    for i, row in enumerate(rows):
        mine = data[data["row"] == row]
        scaled = logarithmic or (limits is None and _differ(mine))
        for j, column in enumerate(columns):
            axis, there = axes[i, j], mine[mine["column"] == column]
            there = there[there["y"] > 0] if scaled else there
            for k, (label, look) in enumerate(looks.items()):
                part = there[there["label"] == label]
                if len(part):
                    shift = 0.0 if label in bare else dodge * (k - (len(looks) - len(bare) - 1) / 2)
                    x = part["x"] * 2**shift if doublings else part["x"] + shift
                    drawn = _line(
                        axis, part.assign(x=x), replace(look, marker="") if label in bare else look, joined, band
                    )
                    handles.setdefault(label, drawn)
            if not len(there):
                axis.text(0.5, 0.5, "no runs", ha="center", va="center", transform=axis.transAxes)
            ends = limits.get(column) if isinstance(limits, Mapping) else limits
            _axes(axis, there, scaled, ends, doublings, (ticks or {}).get(column))
            axis.set_title(fill(column, 28) if i == 0 else "", fontsize=9)
            axis.set_xlabel(x_name if i == len(rows) - 1 else "")
        axes[i, 0].set_ylabel(row + ("\n(log scale)" if scaled else ""), fontsize=8.5)
    if "paper" in data and data["paper"].notna().any():
        handles["*"] = _key(marker="*", ls="", mfc="none", ms=9, color=GREY, label="the paper (VL-BART)")
    legend_below(figure, [handle for label, handle in handles.items() if label], note)
    return figure, data


def line_rows(rows: Iterable[tuple[object, ...]]) -> pd.DataFrame:
    """Tuples (column, label, x, y, low, high) as `lines` takes them, in one row of panels; None: no interval."""
    names = ["column", "label", "x", "y", "low", "high"]
    return pd.DataFrame(rows, columns=pd.Index(names)).astype(dict.fromkeys(names[3:], float)).assign(row="")


class _Looks:
    """Colours of layers and markers of checkpoints of a scatter; more checkpoints than markers share them in groups."""

    def __init__(self, found: pd.DataFrame) -> None:
        import seaborn as sns

        self.layers = sorted(found["layer"].dropna().unique())
        last = max(len(self.layers) - 1, 1)
        viridis = sns.color_palette("viridis", as_cmap=True)
        self.colours = {layer: viridis(0.95 * i / last) for i, layer in enumerate(self.layers)}
        texts = found.sort_values("at").drop_duplicates("at").set_index("at")["checkpoint"]
        self.groups = [part for part in np.array_split(texts.index.to_numpy(), len(MARKERS)) if len(part)]
        self.markers = {at: MARKERS[k] for k, group in enumerate(self.groups) for at in group}
        self.texts = [" to ".join(dict.fromkeys(texts[[group[0], group[-1]]])) for group in self.groups]

    def handles(self) -> list[Any]:
        step = -(-len(self.layers) // 6)  # the numbers in the markers name the others
        kept = self.layers[:: step or 1]
        found = [_key(marker="o", ls="", color=self.colours[layer], label=f"layer {layer:.0f}") for layer in kept]
        found += [_key(marker=MARKERS[k], ls="", color=GREY, label=text) for k, text in enumerate(self.texts)]
        return [*found, _key(color=GREY, lw=0.8, label="least squares")]


def _panel(
    axis: Any, part: pd.DataFrame, looks: _Looks, fit: Sequence[Estimate | None], box: Printed | None, logarithmic: bool
) -> None:
    # numbers would hide each other: those of one seed's last checkpoint are enough; and a marker that is drawn often
    # stands once in a PDF
    many = len(part) > 64
    for place, ((at, *_), here) in enumerate(part.groupby(["at"] if many else ["at", "seed"])):
        colours = [looks.colours.get(layer, GREY) for layer in here["layer"]]
        above = 2 + 0.01 * place  # a number lies under the markers that lie over its own
        axis.scatter(
            here["delta_d"], here["delta_m"], c=colours, marker=looks.markers[at], s=54, lw=0.5, edgecolors="white",
            zorder=above,
        )  # fmt: skip
        if not many or at == part["at"].max():
            for row in here[here["layer"].notna() & (here["seed"] == here["seed"].min())].itertuples():
                light = np.dot(looks.colours[row.layer][:3], (0.3, 0.59, 0.11)) > 0.5
                axis.text(
                    row.delta_d, row.delta_m, f"{row.layer:.0f}", color="black" if light else "white", size=5.5,
                    ha="center", va="center_baseline", clip_on=True, zorder=above + 0.005,
                )  # fmt: skip
    if fit[1] is not None:
        x = np.linspace(part["delta_d"].min(), part["delta_d"].max(), 50)
        y = part["delta_m"].mean() + fit[1].value * (x - part["delta_d"].mean())
        axis.plot(x, np.where(y > 0, y, np.nan), color=GREY, lw=0.8, zorder=0.9)
    if box is not None:
        _box(axis, box)
    if logarithmic:
        axis.set(xscale="log", yscale="log")
    else:
        axis.locator_params("x", nbins=3)
        axis.locator_params("y", nbins=5)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-4, 4))  # a power over it lies under the paper's box
    axis.margins(0.1)
    axis.autoscale_view()
    for side in (axis.xaxis, axis.yaxis) if logarithmic else ():
        _plain_ticks(side)


def _box(axis: Any, printed: Printed) -> None:
    """What the paper prints of this panel, over it, and its axes as a rectangle, which does not move ours."""
    from matplotlib.patches import Rectangle

    (x0, x1), (y0, y1) = printed.delta_d, printed.delta_m
    axis.add_artist(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ls="--", lw=0.8, ec="black", clip_on=True))
    r = "–" if printed.r is None else f"{printed.r:+.2f}".replace("-", "−")
    text = f"paper: r {r}, ΔD {x0:g}–{x1:g}, ΔM {y0:g}–{y1:g}"
    frame = {"fc": "white", "ec": "black", "ls": "--", "lw": 0.6, "pad": 2}
    axis.annotate(text, (0.5, 1), (0, 5), "axes fraction", "offset points", size=6.5, ha="center", bbox=frame)


def _estimates(part: pd.DataFrame) -> list[Estimate | None]:
    """r and slope of a panel, over the matrices that have every checkpoint of every seed."""
    wide = part.pivot(index="unit", columns=["seed", "at"], values=["delta_d", "delta_m"]).dropna()
    if not len(wide):
        return [None, None]
    x, y = wide["delta_d"], wide["delta_m"]
    pairs = {seed: (x[seed].to_numpy(), y[seed].to_numpy()) for seed in sorted(part["seed"].unique())}
    r = statistics.layer_correlation(pairs)
    return [r and statistics.cautious(r), statistics.layer_slope(pairs)]


def _said(name: str, found: Estimate | None) -> str:
    """`r = +0.83 [+0.70, +0.91]`."""
    if found is None:
        return f"{name} undefined"
    shown = ".3g" if name == "slope" else "+.2f"
    ends = "" if found.low is None else f" [{found.low:{shown}}, {found.high:{shown}}]"
    return f"{name} = {found.value:{shown}}{ends}".replace("-", "−")


def _note(estimates: Sequence[Sequence[Estimate | None]], lost: int, logarithmic: bool, layers: str) -> str:
    known = [found for pair in estimates for found in pair[:1] if found is not None]
    what = " or ".join(sorted({found.n for found in known})) or "no r"
    how = " or ".join(sorted({found.test for found in known if found.low is not None}))
    counted = f"counted from 1{f' ({layers})' if layers else ''}"
    parts = [f"numbers: layers, {counted}; each panel: {what}; slope: ΔM per ΔD"]
    parts += [f"[95 %: {how}]"] if how else []
    parts += ["log axes, r and slope of plain values"] if logarithmic else []
    parts += [f"rows without ΔD or ΔM: {lost}, left out, and of r their matrices"] if lost else []
    return "; ".join(parts)


def _table(estimates: Mapping[tuple[str, str], Sequence[Estimate | None]]) -> pd.DataFrame:
    ends = [(name, end) for name in ("r", "slope") for end in ("value", "low", "high")]
    names = [name if end == "value" else f"{name}_{end}" for name, end in ends]
    table = [
        {"kind": kind, "label": label}
        | {text: getattr(found[name == "slope"], end, None) for text, (name, end) in zip(names, ends, strict=True)}
        for (kind, label), found in estimates.items()
    ]
    return pd.DataFrame(table).astype(dict.fromkeys(names, float))


def _grid(rows: int, columns: int, panels: int, height: float) -> tuple[Figure, Any]:
    if panels > MOST:
        raise ValueError(
            f"{panels} panels (labels and kinds of matrix): more than {MOST} cannot be read; choose some by --kinds or "
            "--label, or select the rows"
        )
    return new_figure(rows, columns, width=max(2.45 * columns + 0.3, 4.0), height=height * rows)


def _differ(mine: pd.DataFrame) -> bool:
    tops = mine.groupby("label")["y"].max()
    return bool((tops > 0).all() and tops.max() / tops.min() > WIDE)


def _line(axis: Any, part: pd.DataFrame, look: Any, joined: bool, band: bool) -> Any:
    """One label's points, line and intervals; returns what the legend shows of them."""
    look_of_line = {"color": look.colour, "marker": look.marker, "ls": look.line if joined else "", "lw": 1.3, "ms": 6}
    (drawn,) = axis.plot(part["x"], part["y"], label=look.label, mec="white", mew=0.4, **look_of_line)
    known = part[part["low"].notna() & part["high"].notna()]
    if band:
        axis.fill_between(known["x"], known["low"], known["high"], color=look.colour, alpha=0.2, lw=0)
    else:
        for end in ("low", "high"):
            axis.plot(known["x"], known[end], ls="", marker="_", ms=4, color=look.colour)
        axis.vlines(known["x"], known["low"], known["high"], color=look.colour, lw=1)
    if "dots" in part:
        for x, values in zip(part["x"], part["dots"], strict=True):
            axis.plot([x] * len(values), values, ls="", marker=".", ms=3, color=look.colour, alpha=0.7)
    if "wide_low" in part:
        axis.vlines(part["x"], part["wide_low"], part["wide_high"], color=look.colour, lw=0.8, ls=":")
    if "paper" in part:
        axis.plot(part["x"], part["paper"], ls="", marker="*", mfc="none", ms=9, color=look.colour)
    return drawn


def _axes(
    axis: Any, there: pd.DataFrame, logarithmic: bool, limits: Any, doublings: bool, ticks: Mapping[float, str] | None
) -> None:
    from matplotlib.ticker import MaxNLocator

    if doublings:
        axis.set_xscale("log", base=2)
    if ticks is not None:
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
    elif len(there) and (there["x"] % 1 == 0).all():
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if logarithmic:
        axis.set_yscale("log")
        if limits is not None:
            axis.set_ylim(*limits)
        _plain_ticks(axis.yaxis)
    elif limits is not None:
        axis.set_ylim(*limits)
        if limits[0] < 0 < limits[1]:
            axis.axhline(0, color=GREY, lw=0.8)
    else:
        axis.set_ylim(bottom=0)


def _plain_ticks(axis: Any) -> None:
    """At most four or so ticks of a logarithmic axis, written out, with room between them: few here span a decade."""
    from matplotlib.ticker import NullFormatter

    low, high = axis.get_view_interval()
    powers = [10.0**k for k in range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))))]
    sets = [[k * power for power in powers for k in times if low <= k * power <= high] for times in _TIMES]
    room = 0.18 * np.log10(high / low)
    ticks = next((some for some in sets if len(some) <= 4 and not (np.diff(np.log10(some)) < room).any()), sets[-1])
    axis.set_ticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_minor_formatter(NullFormatter())


def _key(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)
