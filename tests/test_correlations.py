"""Correlations of ΔD with ΔM: views, intervals, both axes, the grid's middle and trends, and what is drawn of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import make_spec
from scipy import stats

from analysis.figures import correlations as figure
from analysis.figures import why as why_figure
from analysis.tables import correlations as table
from analysis.tables import why
from dora_lab import report
from dora_lab.report import correlations, statistics


def matrices(rng: np.random.Generator, layers: int = 5, checkpoints: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return rng.random((layers, checkpoints)), rng.random((layers, checkpoints))


def test_growth_over_training_alone_makes_the_pooled_correlation_positive() -> None:
    growth_C, turned_L = np.linspace(1, 4, 4), np.linspace(0, 0.3, 5)
    x_LC, y_LC = growth_C + turned_L[:, None], growth_C - turned_L[:, None]
    r = {view: statistics.layer_correlation({0: (x_LC, y_LC)}, view) for view in statistics.VIEWS}
    assert r["pooled"] and r["pooled"].value > 0.9
    assert r["between layers"] and r["between layers"].value == pytest.approx(-1)
    assert r["over time"] and r["over time"].value == pytest.approx(1)


def test_views_against_a_plain_computation(rng: np.random.Generator) -> None:
    x_LC, y_LC = matrices(rng)
    expected = {
        "pooled": stats.pearsonr(x_LC.ravel(), y_LC.ravel()),
        "between layers": stats.pearsonr((x_LC - x_LC.mean(0)).ravel(), (y_LC - y_LC.mean(0)).ravel()),
        "over time": stats.pearsonr((x_LC.T - x_LC.mean(1)).ravel(), (y_LC.T - y_LC.mean(1)).ravel()),
        "changes": stats.pearsonr(
            np.concatenate([x_LC[:, 0], (x_LC[:, 1:] - x_LC[:, :-1]).ravel()]),
            np.concatenate([y_LC[:, 0], (y_LC[:, 1:] - y_LC[:, :-1]).ravel()]),
        ),
    }
    for view, plain in expected.items():
        found = statistics.layer_correlation({3: (x_LC, y_LC)}, view)
        assert found is not None and found.value == pytest.approx(plain.statistic)


def test_means_that_were_taken_off_widen_the_interval(rng: np.random.Generator) -> None:
    x_LC, y_LC = matrices(rng)
    found = statistics.layer_correlation({0: (x_LC, y_LC)}, "between layers")
    assert found is not None and found.low is not None
    half = stats.norm.ppf(0.975) / np.sqrt(20 - 3 - 3)  # 20 points, 4 means of which the first is Pearson's own
    assert np.arctanh(found.value) - np.arctanh(found.low) == pytest.approx(half)


@pytest.mark.parametrize("view", list(statistics.VIEWS))
def test_resampled_layers_against_every_draw_spelt_out(rng: np.random.Generator, view: str) -> None:
    """All 4^4 draws of four layers, each recomputed from the drawn rows: the same interval up to the sampling."""
    x_LC, y_LC = matrices(rng, layers=4)
    seen = [statistics._view(v, view) for v in (x_LC, y_LC)]
    drawn = []
    for layers in itertools.product(range(4), repeat=4):
        x, y = (v[list(layers)] for v in seen)
        if view == "between layers":
            x, y = x - x.mean(0), y - y.mean(0)
        if np.ptp(x) > 1e-12 and np.ptp(y) > 1e-12:
            drawn.append(stats.pearsonr(x.ravel(), y.ravel()).statistic)
    found = statistics.layer_correlation({0: (x_LC, y_LC)}, view)
    assert found is not None and found.resampled is not None
    for end, at in zip(found.resampled, (0.025, 0.975), strict=True):
        low, high = np.quantile(drawn, [at - 0.015, at + 0.015])
        assert low - 1e-9 <= end <= high + 1e-9


def test_the_same_layers_are_drawn_for_every_seed_and_seeds_are_drawn_too(rng: np.random.Generator) -> None:
    x_LC, y_LC = matrices(rng)
    once = statistics.layer_correlation({0: (x_LC, y_LC)})
    twice = statistics.layer_correlation({0: (x_LC, y_LC), 1: (x_LC, y_LC)})
    apart = statistics.layer_correlation({0: (x_LC, y_LC), 1: (x_LC, -y_LC)})
    assert once and twice and apart and once.resampled and apart.resampled
    assert twice.resampled == once.resampled  # not narrower: a second seed brings no new layer
    assert apart.resampled[1] - apart.resampled[0] > once.resampled[1] - once.resampled[0]


def test_nothing_that_varies_has_no_correlation(rng: np.random.Generator) -> None:
    x_LC, y_LC = matrices(rng)
    assert statistics.layer_correlation({}) is None
    assert statistics.layer_correlation({0: (x_LC, np.zeros_like(y_LC))}) is None
    found = statistics.layer_correlation({0: (x_LC, y_LC), 1: (x_LC, np.zeros_like(y_LC))})
    assert found is not None and len(found.per_seed) == 1
    with pytest.raises(ValueError, match="view 'layers' is not one of pooled"):
        statistics.layer_correlation({0: (x_LC, y_LC)}, "layers")
    with pytest.raises(ValueError, match="same layers and checkpoints"):
        statistics.layer_correlation({0: (x_LC, y_LC), 1: (x_LC[:3], y_LC[:3])})


def test_holm_and_the_mean_over_seeds() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []
    found = statistics.over_seeds([0.2, 0.4, 0.3])
    assert found is not None and found.low is not None and found.high is not None and found.p is not None
    assert found.value == pytest.approx(0.3) and found.low < 0.3 < found.high and 0.01 < found.p < 0.05
    assert statistics.over_seeds([0.2]) is None and statistics.over_seeds([0.1, 0.1]) is None


# ------------------------------------------------------------------------------------------------- runs of the grid
MIDDLES: dict[str, tuple[int | None, float]] = {"ft": (None, 2e-3), "lora": (8, 1e-2), "dora": (8, 1e-2)}


def with_both_axes(folder: Path) -> None:
    path = folder / "probe.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    both = [row | {"delta_m_in": 1 - row["delta_m"], "delta_d_in": row["delta_d"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in both))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods at three learning rates, three seeds; LoRA and DoRA at two ranks (alpha / rank kept)."""
    from conftest import write_run

    results = tmp_path_factory.mktemp("grid")
    for (name, (rank, rate)), seed in itertools.product(MIDDLES.items(), range(3)):
        settings: list[dict[str, Any]] = [{"optim__learning_rate": rate * step} for step in (0.25, 1, 4)]
        if rank is not None:
            settings.append({"optim__learning_rate": rate, "method__rank": 4, "method__alpha": 8.0})
        for changes in settings:
            with_both_axes(write_run(results, make_spec(name, rank, seed, experiment="decomposition", **changes)))
    return results


def test_the_grid_is_read_one_factor_at_a_time(grid: Path) -> None:
    probes = report.frame(grid, "decomposition", "probe")
    found = [
        (label, factor, level, middle) for label, factor, level, middle, _ in correlations.around_the_middle(probes)
    ]
    assert [s for s in found if s[0] == "FT"] == [("FT", "learning rate", rate, 2e-3) for rate in (5e-4, 2e-3, 8e-3)]
    assert [s for s in found if s[:2] == ("DoRA", "rank")] == [("DoRA", "rank", 4, 8), ("DoRA", "rank", 8, 8)]
    assert not [s for s in found if s[1] in ("alpha / rank", "training items")]
    for _, _, _, _, rows in correlations.around_the_middle(probes):
        assert rows["spec_id"].nunique() == rows["seed"].nunique() == 3
    middle = correlations.middle(probes)
    assert middle["spec_id"].nunique() == 9 and set(middle["label"]) == {"FT", "LoRA", "DoRA"}
    assert middle.loc[middle["method"] != "ft", "rank"].eq(8).all()


def test_the_two_axes_are_different_columns(grid: Path) -> None:
    middle = correlations.middle(report.frame(grid, "decomposition", "probe"))
    rows = middle[middle["label"] == "LoRA"]
    out, across = (correlations.correlate(rows, "q_proj", axis) for axis in ("out", "in"))
    assert out and across and across.value == pytest.approx(-out.value)
    assert correlations.correlate(rows.drop(columns="delta_d_in"), "q_proj", "in") is None
    assert correlations.correlate(rows, "o_proj") is None
    with pytest.raises(ValueError, match="axis 'column' is not one of out, in"):
        correlations.correlate(rows, "q_proj", "column")
    with pytest.raises(ValueError, match="differ in more than the seed"):
        correlations.correlate(report.frame(grid, "decomposition", "probe"), "q_proj")


def test_an_encoder_and_a_decoder_number_their_layers_alike(grid: Path) -> None:
    middle = correlations.middle(report.frame(grid, "decomposition", "probe"))
    one = middle[(middle["label"] == "DoRA") & (middle["seed"] == 0) & (middle["kind"] == "q_proj")]
    two = one.assign(module="decoder." + one["module"].astype(str), delta_m=one["delta_m"] + 1)
    found = correlations.correlate(pd.concat([one, two]), "q_proj")
    assert found is not None and found.n == "1 seed × 32 points"


def test_the_tables_of_the_grid(grid: Path) -> None:
    paths = why.build(grid) + table.build(grid)
    assert {path.name for path in paths} == {f"{n}.{e}" for n in ("why", "correlations") for e in ("md", "csv", "tex")}
    data = pd.read_csv(grid / "tables" / "why.csv")
    counts = data["what"].value_counts()
    views = len(why.KINDS) * len(why.VIEWS)
    assert dict(counts) == {
        "level": (3 + 5 + 5) * views,
        "trend": 5 * views,
        "methods": 3 * views,
        "distance": 5 * 2 * 2,
    }
    tests = data[data["p"].notna()]
    assert (tests["p_holm"] >= tests["p"]).all() and tests["p_holm"].max() <= 1
    text = (grid / "tables" / "correlations.md").read_text(encoding="utf-8")
    assert "one magnitude per output feature" in text and "one magnitude per input feature" in text
    assert "| DoRA | query | −0.31 | −0.62 |" in text and text.count("shreyassks/DoRA") == 4


def test_a_trend_is_the_slope_per_doubling(grid: Path) -> None:
    settings = list(correlations.around_the_middle(report.frame(grid, "decomposition", "probe")))
    data = why.measured(settings)
    row = data[(data["what"] == "trend") & (data["label"] == "FT") & (data["kind"] == "q_proj")].iloc[0]
    levels = [s for s in settings if s[:2] == ("FT", "learning rate")]
    z_FS = []
    for *_, rows in levels:
        found = correlations.correlate(rows, "q_proj", "out", str(row["view"]))
        assert found is not None
        z_FS.append(np.arctanh(found.per_seed))
    slopes = (z_FS[2] - z_FS[0]) / 4  # the levels are two doublings apart on each side
    assert row["z"] == pytest.approx(slopes.mean())


def test_figures_are_drawn_from_the_grid_and_not_without_one(grid: Path, tmp_path: Path) -> None:
    names = {path.name for path in [*figure.build(grid), *why_figure.build(grid)]}
    assert names == {f"{name}.{ending}" for name in ("axes", "why") for ending in ("pdf", "png", "data.csv")}
    assert figure.build(tmp_path) == why_figure.build(tmp_path) == why.build(tmp_path) == []


def test_of_a_method_with_several_ranks_the_one_that_stands_for_it_is_drawn(tmp_path: Path, run_writer: Any) -> None:
    for method, ranks in (("ft", (None,)), ("lora", (4, 8, 16)), ("dora", (4, 8, 16))):
        for rank in ranks:
            run_writer(tmp_path, make_spec(method, rank, 0))
    rows = report.frame(tmp_path, "commonsense", "probe")
    _, data = figure.draw(rows, [("r", "pooled", "out", "pooled")])
    assert set(data["label"]) == {"FT", "LoRA r=8", "DoRA r=8"}
    query = data[(data["label"] == "LoRA r=8") & (data["x"] == figure.KINDS.index("q_proj"))]
    assert query["paper"].tolist() == [0.83]


def test_a_grid_that_was_stopped_early_is_still_read(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    for rate in (1e-3, 4e-3):
        run_writer(tmp_path, make_spec("dora", 8, 0, experiment="decomposition", optim__learning_rate=rate))
    data = why.measured(list(correlations.around_the_middle(report.frame(tmp_path, "decomposition", "probe"))))
    assert data["p"].isna().all() and data.loc[data["what"] == "level", "r"].notna().all()
    assert why.build(tmp_path) and why_figure.build(tmp_path)


def test_the_committed_middle_is_the_committed_commonsense_again() -> None:
    """The same settings and seeds in another experiment give the same weights: nothing else is in a run."""
    results = Path(__file__).resolve().parents[1] / "results"
    grid, runs = (report.frame(results, name, "probe") for name in ("decomposition", "commonsense"))
    if not len(grid) or not len(runs):
        pytest.skip("no committed runs of both experiments")
    keys = ["label", "seed", "module", "fraction"]
    both = correlations.middle(grid).merge(runs[runs["data"] == "mini"], on=keys, suffixes=("", "_other"))
    assert both["spec_id"].nunique() == 9
    for measure in ("delta_m", "delta_d"):
        assert both[measure].to_numpy() == pytest.approx(both[f"{measure}_other"].to_numpy(), rel=1e-3)


def test_the_note_on_the_grid_is_of_the_committed_records() -> None:
    """Every interval in results/decomposition.md, with its number, and the count of runs are those of the tables."""
    results = Path(__file__).resolve().parents[1] / "results"
    tables = [(results / "tables" / f"{name}.md").read_text(encoding="utf-8") for name in ("why", "correlations")]
    printed = "".join(tables).replace(", Fisher [", " [")
    note = (results / "decomposition.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:([−+]?\d+\.\d\d) )?(\[[−\d., ]+\])", note)
    assert len(found) >= 8
    for number, interval in found:
        assert f"{number.removeprefix('+')} {interval}".strip() in printed
    runs = report.frame(results, "decomposition", "record")
    assert re.findall(r"[Tt]he (\d+) runs", note) == [str(len(runs))] * 2
