"""Frames, labels, scores, tables and figures of the reading side."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import ITEMS, make_spec

from dora_lab import report
from dora_lab.spec import from_dict, spec_id
from tests.faults.data import assert_harmless


def test_frame_has_one_row_per_stream_row_of_complete_runs(synthetic_results: Path) -> None:
    evals = report.frame(synthetic_results, "commonsense", "eval")
    assert len(evals) == 13 * 8 * 2
    assert evals.attrs["incomplete"] == 2
    assert evals.attrs["statuses"] == {"DoRA interrupted": 1, "LoRA failed": 1}
    assert set(evals["label"]) == {"Base", "FT", "LoRA", "DoRA", "DoRA†"}
    assert evals.loc[evals["method"] == "lora", "optim.learning_rate"].eq(1e-3).all()
    assert evals.loc[evals["method"] == "base", "rank"].isna().all()
    assert len(report.frame(synthetic_results, "commonsense", "probe")) == 12 * 4 * 4 * 3
    assert report.frame(synthetic_results, stream="record")["seconds.train"].eq(41.5).all()


def test_no_runs_is_an_empty_frame_with_columns(tmp_path: Path) -> None:
    for stream in ("eval", "probe", "metrics", "record"):
        empty = report.frame(tmp_path, stream=stream)
        assert len(empty) == 0 and {"label", "tier", "seed"} <= set(empty.columns)
    with pytest.raises(ValueError, match="stream 'evals'"):
        report.frame(tmp_path, stream="evals")


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(
    tmp_path: Path, run_writer: Callable[..., Path]
) -> None:
    run_writer(tmp_path, make_spec("lora", 8, 0))
    run_writer(tmp_path, make_spec("lora", 8, 0, optim__learning_rate=0.5))
    labels = set(report.frame(tmp_path)["label"])
    assert labels == {"LoRA (optim.learning_rate=0.001)", "LoRA (optim.learning_rate=0.5)"}


def test_ranks_of_a_sweep_are_told_apart(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    for rank in (2, 4, 8):
        run_writer(tmp_path, make_spec("dora", rank, 0))
    assert report.ordered_labels(report.frame(tmp_path)) == ["DoRA r=8", "DoRA r=4", "DoRA r=2"]


def test_an_unknown_method_has_its_own_name_and_comes_last(tmp_path: Path, run_writer: Callable[..., Path]) -> None:
    folder = run_writer(tmp_path, make_spec("base", None, 0))
    record = json.loads((folder / "record.json").read_text())
    record["spec"]["method"]["name"] = "newest"
    record["spec_id"] = spec_id(from_dict(record["spec"]))
    (folder / "record.json").write_text(json.dumps(record))
    folder.rename(folder.with_name(record["spec_id"]))
    run_writer(tmp_path, make_spec("dora", 8, 0))
    assert report.ordered_labels(report.frame(tmp_path)) == ["DoRA", "newest"]
    assert report.style("newest") == report.style("newest")


def test_scores_average_over_tasks_within_a_run_and_then_over_seeds(synthetic_results: Path) -> None:
    evals = report.frame(synthetic_results, "commonsense")
    scores = report.scores(evals).set_index(["protocol", "label", "task"])
    rows = evals[(evals["label"] == "DoRA") & (evals["protocol"] == "generate")]
    per_run = 100 * rows.groupby("spec_id")["value"].mean()
    average = scores.loc[("generate", "DoRA", "average")]
    assert average["mean"] == pytest.approx(per_run.mean())
    assert average["sd"] == pytest.approx(per_run.std(ddof=1))
    assert average["n_seeds"] == 3 and average["n_items"] == 8 * ITEMS
    assert average["unparsed_percent"] == pytest.approx(100 * rows["n_unparsed"].sum() / rows["n"].sum())
    assert pd.isna(scores.loc[("loglikelihood", "DoRA", "average"), "unparsed_percent"])
    assert pd.isna(scores.loc[("generate", "Base", "average"), "sd"])


def test_a_missing_score_is_missing_and_takes_the_run_out_of_the_average(
    tmp_path: Path, run_writer: Callable[..., Path]
) -> None:
    for seed in (0, 1):
        folder = run_writer(tmp_path, make_spec("lora", 8, seed))
    lines = (folder / "eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(lines[2:]))  # both protocols of the first task
    scores = report.scores(report.frame(tmp_path)).set_index(["protocol", "task"])
    assert scores.loc[("generate", "boolq"), "n_seeds"] == 1
    assert scores.loc[("generate", "average"), "n_seeds"] == 1
    assert scores.loc[("generate", "piqa"), "n_seeds"] == 2


def test_numbers_and_missing_values() -> None:
    assert report.number(68.24, 1.06) == "68.2 ± 1.1"
    assert report.number(-0.5, digits=2) == "−0.50"
    assert report.number(None) is None and report.number(float("nan")) is None
    block = report.Block(title="t", cells=pd.DataFrame({"a": ["x|y", None], "b": [None, "1"]}))
    assert "| x\\|y | – |" in report.markdown(block) and "| – | 1 |" in report.markdown(block)


HOSTILE = "a_b%#&<script>alert(1)</script>|x\\input{y}$z^~\n\0[l](u) -->漢"


def test_text_of_anybody_is_escaped_also_in_headers(tmp_path: Path) -> None:
    assert report.latex_escape("50 % & DoRA† ± 1_a") == r"50 \% \& DoRA$^\dagger$ $\pm$ 1\_a"
    assert report.latex_escape("漢") == "[U+6F22]"
    block = report.Block(title=HOSTILE, cells=pd.DataFrame({HOSTILE: [HOSTILE], "n": [None]}), notes=(HOSTILE,))
    source = report.Provenance((HOSTILE,), (HOSTILE,), (HOSTILE,), (HOSTILE,), False, {HOSTILE: 1})
    md, tex, data = report.save_table(tmp_path, "t", HOSTILE, [block], block.cells, source)
    assert "\0" in HOSTILE and "\0" not in data.read_text(encoding="utf-8")
    assert_harmless(md.read_text(encoding="utf-8"), tex.read_text(encoding="utf-8"), columns=2)


def test_readme_block(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table:begin -->\nold\n<!-- table:end -->\nb\n")
    assert report.readme_block(readme, "new")
    assert readme.read_text() == "a\n<!-- table:begin -->\nnew\n<!-- table:end -->\nb\n"
    assert not report.readme_block(readme, "new")
    with pytest.raises(ValueError, match="other:begin"):
        report.readme_block(readme, "new", name="other")


def test_provenance_names_commits_and_left_out_runs(synthetic_results: Path) -> None:
    source = report.provenance(report.frame(synthetic_results, "commonsense"))
    assert source.caption() == "Experiment commonsense, tier mini, 13 complete runs, code 0123456789."
    assert source.incomplete() == "2 runs are not complete and left out: 1 DoRA interrupted, 1 LoRA failed."


def test_the_reading_side_imports_no_torch() -> None:
    code = (
        "import sys, importlib, analysis; "
        "[importlib.import_module(m) for m in ['dora_lab.report', 'dora_lab.paper', *analysis.modules()]]; "
        "bad = [m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
