"""Figures of any rows: what is drawn, what is said of it, the numbers beside it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import make_spec, write_run
from PIL import Image
from typer.testing import CliRunner

from dora_lab import report
from dora_lab.commands import inspect, plot  # noqa: F401  (each adds its commands; one alone would need no name)
from dora_lab.commands.app import app
from dora_lab.paper.axes import PANELS
from dora_lab.report import points, statistics


def rows(layers: int = 5, checkpoints: int = 3, **more: Any) -> list[dict[str, Any]]:
    """Rows as the callback writes them."""
    rng = np.random.default_rng(more.get("seed", 0))
    found = []
    for step in range(1, checkpoints + 1):
        for layer in range(layers):
            for kind in ("q_proj", "v_proj"):
                d = 0.01 * step * (1 + 0.1 * layer) * float(rng.uniform(0.8, 1.2))
                row = {"step": step * 10, "fraction": step / checkpoints, "module": f"layers.{layer}.{kind}"}
                m = 0.5 * d * float(rng.uniform(0.7, 1.3))
                found.append(row | {"layer": layer, "kind": kind, "delta_m": m, "delta_d": d} | more)
    return found


def panels(figure: Any) -> dict[str, list[str]]:
    """Title -> texts in the panel, of every panel of a figure."""
    return {axis.get_title(): [text.get_text() for text in axis.texts] for axis in figure.axes}


def test_live_rows_are_a_panel_a_kind_with_layers_counted_from_one(tmp_path: Path) -> None:
    figure = report.plot(iter(rows()), tmp_path / "live.png")
    assert {path.name for path in tmp_path.iterdir()} == {"live.png", "live.data.csv"}
    (query, texts), _ = panels(figure).items()
    assert query.startswith("query\nr = +0.") and "\nslope = 0." in query and "[" in query
    assert sorted(texts) == sorted("12345" * 3)
    data = pd.read_csv(tmp_path / "live.data.csv")
    assert len(data) == len(rows()) and set(data["layer"]) == {1, 2, 3, 4, 5}
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"layer 1", "layer 5", "33% of steps", "final"} <= set(said)
    assert "layers resampled" in figure.legends[0].get_title().get_text()
    first = (tmp_path / "live.png").read_bytes()
    report.plot(rows(), tmp_path / "live.png")
    assert (tmp_path / "live.png").read_bytes() == first


def test_what_a_panel_says_is_what_numpy_says_with_t_over_seeds() -> None:
    seeds = [rows(seed=seed, label="DoRA") for seed in range(3)]
    figure, data = report.scatter([row for part in seeds for row in part], PANELS)
    x, y = (
        [np.array([row[name] for row in part if row["kind"] == "q_proj"]) for part in seeds]
        for name in ("delta_d", "delta_m")
    )
    z = np.arctanh([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)])
    half = 4.302652729911275 * z.std(ddof=1) / np.sqrt(3)  # t(2) at 97.5 %
    first = data[data["kind"] == "q_proj"].iloc[0]
    assert [first["r"], first["r_low"], first["r_high"]] == pytest.approx(
        np.tanh([z.mean(), z.mean() - half, z.mean() + half])
    )
    slopes = [np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)]
    assert (
        first["slope"] == pytest.approx(np.mean(slopes)) and first["slope_low"] < first["slope"] < first["slope_high"]
    )
    query = next(title for title in panels(figure) if title.startswith("DoRA, query"))
    assert f"r = {first['r']:+.2f} [{first['r_low']:+.2f}, {first['r_high']:+.2f}]" in query
    assert panels(figure)[query][-1] == "paper: r −0.31, ΔD 0.16–0.32, ΔM 0.7–1.4"
    assert not any("paper" in text for texts in panels(report.plot(rows(), paper=PANELS)).values() for text in texts)


@pytest.mark.parametrize(("label", "boxed"), [("LoRA r=8", True), ("LoRA, λ 0.1", True), ("LoRA+", False)])
def test_a_method_with_its_rank_has_the_papers_box_and_another_method_has_none(label: str, boxed: bool) -> None:
    figure, _ = report.scatter(rows(label=label), PANELS)
    assert all(any(text.startswith("paper: ") for text in texts) is boxed for texts in panels(figure).values())


def test_dependent_points_get_no_fisher_interval() -> None:
    """Every layer four times over says no more than once, though Fisher's interval would halve."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 12, 1))
    once, often = ({0: (np.tile(x, n), np.tile(y, n))} for n in (1, 4))
    one, four = (statistics.layer_correlation(points) for points in (once, often))
    assert one and four and one.low is not None and four.low is not None and four.low > one.low + 0.1
    assert statistics.cautious(four).low == pytest.approx(statistics.cautious(one).low)
    lone = statistics.layer_correlation({0: ([[0.0, 1.0, 3.0]], [[0.0, 1.0, 1.0]])})
    assert lone and statistics.cautious(lone).low is None  # one layer: nothing to resample
    slopes = [statistics.layer_slope(points) for points in (once, often)]
    assert slopes[0] and slopes[1] and slopes[0].low is not None
    assert slopes[0].low < slopes[0].value < slopes[0].high and slopes[1].low == pytest.approx(slopes[0].low)
    assert statistics.layer_slope({0: (np.ones((3, 2)), np.ones((3, 2)))}) is None


def test_scales_that_differ_get_logarithmic_axes() -> None:
    near, far = rows(label="near"), [row | {"delta_d": row["delta_d"] * 40} for row in rows(label="far")]
    scales = lambda figure: [axis.get_yscale() for axis in figure.axes]  # noqa: E731
    assert scales(report.plot(near + far, form="layers")) == ["linear", "linear", "log", "log"]
    assert scales(report.plot(near, form="layers")) == ["linear"] * 4
    assert set(scales(report.plot(rows(checkpoints=3)))) == {"linear"}
    wide = [row | {"delta_d": row["delta_d"] ** 3, "delta_m": row["delta_m"] ** 3} for row in rows()]
    assert set(scales(report.plot(wide))) == {"log"}


def test_lines_differ_in_colour_or_dash_and_marker_and_begin_at_zero() -> None:
    figure = report.plot([row for name in ("LoRA", "DoRA", "DoRA r=2") for row in rows(label=name)], form="training")
    drawn = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in drawn] == ["LoRA", "DoRA", "DoRA r=2"]
    assert [line.get_linestyle() for line in drawn[:2]] == [report.style(name).line for name in ("LoRA", "DoRA")]
    assert len({line.get_marker() for line in drawn}) == 3
    assert all(line.get_xdata()[0] == line.get_ydata()[0] == 0 for line in drawn)


def test_a_row_without_a_value_is_left_out_and_said(tmp_path: Path) -> None:
    given = rows()
    given[0]["delta_d"] = None
    found = points.points(given)
    assert len(found) == len(given) - 1 and found.attrs["lost"] == 1
    figure = report.plot(given)
    assert "rows without ΔD or ΔM: 1" in figure.legends[0].get_title().get_text().replace("\n", " ")
    many = report.plot(rows(layers=9, checkpoints=20))  # more checkpoints than markers, more points than numbers
    assert "95% of steps to final" in {text.get_text() for text in many.legends[0].get_texts()}
    assert sorted(panels(many).popitem()[1]) == list("123456789")


BAD: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "no rows": (lambda r: r.clear(), "no rows"),
    "no field": (lambda r: [row.pop("delta_m") for row in r], "field 'delta_m' is in no row"),
    "no number": (lambda r: r[3].update(delta_d="oops"), "row 4: field 'delta_d' = 'oops'"),
    "infinite": (lambda r: r[3].update(delta_d=float("inf")), "row 4: field 'delta_d' = inf"),
    "no kind": (lambda r: r[2].update(kind=None), "row 3: field 'kind'"),
    "twice": (lambda r: r.append(dict(r[0])), "row 31: 'layers.0.q_proj' is there twice"),
    "axes": (lambda r: [row.update(axis="out" if k else "in") for k, row in enumerate(r)], "field 'axis'"),
    "nothing": (lambda r: [row.update(delta_d=None) for row in r], "no row has both"),
    "too many": (lambda r: r.extend([x | {"label": f"{k}"} for k in range(40) for x in r[:2]]), "more than 60"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_cannot_be_drawn_say_which_and_why(name: str, tmp_path: Path) -> None:
    given = [row | {"step": None, "fraction": None} for row in rows(checkpoints=1, layers=15)]
    BAD[name][0](given)
    with pytest.raises(ValueError, match=BAD[name][1]) as caught:
        report.plot(given, tmp_path / "x.png")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "dora"):
        for seed in (0, 1):
            write_run(folder, make_spec(method, 8, seed))
    return folder


def test_the_command_draws_runs_experiments_and_files(results: Path, tmp_path: Path) -> None:
    def drawn(*options: str) -> Any:
        return CliRunner().invoke(app, ["plot", *options, "--results", str(results)])

    run = next((results / "runs" / "commonsense").iterdir())
    out = tmp_path / "a.png"
    assert drawn("commonsense", "--out", str(out), "--kinds", "q_proj", "--label", "LoRA").exit_code == 0
    data = pd.read_csv(tmp_path / "a.data.csv")
    assert set(data["kind"]) == {"q_proj"} and set(data["label"]) == {"LoRA"} and set(data["seed"]) == {0, 1}
    with Image.open(out) as image:
        assert "2 complete runs" in image.info["Description"]
    assert drawn(run.name, str(run), "--out", str(out)).exit_code == 0
    assert pd.read_csv(tmp_path / "a.data.csv")["seed"].nunique() == 1
    for ending in ("csv", "jsonl", "parquet"):
        file, frame = tmp_path / f"rows.{ending}", pd.DataFrame(rows(tuned="/models/mine"))
        if ending == "csv":
            frame.to_csv(file, index=False)
        elif ending == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
        else:
            frame.to_parquet(file)
        assert drawn(str(file), "--out", str(tmp_path / "rows.png"), "--form", "layers").exit_code == 0
        assert set(pd.read_csv(tmp_path / "rows.data.csv")["label"]) == {"mine"}
    (tmp_path / "bad.csv").write_text("module,kind,delta_m,delta_d\na,q,0.1,oops\n")
    for options, words in (
        ((str(tmp_path / "bad.csv"),), "bad.csv: row 1: field 'delta_d' = 'oops'"),
        ((str(tmp_path / "none.csv"),), "there is no such file"),
        ((str(out),), "a file of rows ends in"),
        ((str(file), run.name), "not both"),
        ((str(file), "--kinds", "q_prj"), "did you mean 'q_proj'"),
        ((str(file), "--form", "pie"), "form 'pie' is not one of"),
        ((str(file), "--out", "x.svg"), "must end in .png or .pdf"),
        ((str(file), "--out", str(tmp_path / "no" / "x.png")), "does not exist; create it"),
        (("nothing",), "run 'nothing'"),
    ):
        refused = drawn(*options)
        assert isinstance(refused.exception, ValueError) and words in str(refused.exception)
        assert "\n" not in str(refused.exception)


def test_mine_stand_beside_the_committed_and_are_marked(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "both.png"
    write_run(mine, make_spec("dora", 8, 0))  # a run that is committed, too
    write_run(mine, make_spec("dora", 8, 7))
    monkeypatch.setattr(plot, "RESULTS", results)

    def drawn(*options: str) -> Any:
        return CliRunner().invoke(app, ["plot", *options, "--beside", "--out", str(out)])

    assert drawn("commonsense", "--results", str(mine)).exit_code == 0
    seeds = pd.read_csv(tmp_path / "both.data.csv").groupby("label")["seed"].unique().map(set).to_dict()
    assert seeds == {"LoRA": {0, 1}, "DoRA": {0, 1}, "DoRA (yours)": {0, 7}}
    one = drawn("commonsense", "--results", str(mine), "--label", "DoRA")
    assert one.exit_code == 0, one.output
    assert set(pd.read_csv(tmp_path / "both.data.csv")["label"]) == {"DoRA", "DoRA (yours)"}
    committed = next((results / "runs" / "commonsense").iterdir())
    for options, words in (
        (("commonsense", "--results", str(results)), "holds the committed runs themselves"),
        ((str(committed), "--results", str(mine)), "is a committed run"),
        (("ranks", "--results", str(mine)), "no complete run"),
    ):
        refused = drawn(*options)
        assert isinstance(refused.exception, ValueError) and words in str(refused.exception), refused.exception
