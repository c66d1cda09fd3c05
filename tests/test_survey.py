"""What is no run counts nowhere, and what cannot be read stops nothing else: copies, damage, runs of three steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_spec, write_run, write_tree
from typer.testing import CliRunner

from dora_lab import paper, report
from dora_lab.__main__ import app
from dora_lab.commands.app import find_run
from dora_lab.io.files import hash_bytes
from dora_lab.launch.experiments import published_specs
from dora_lab.report import card, correlations
from dora_lab.runs import provenance
from dora_lab.runs.errors import StoreError
from dora_lab.runs.survey import survey, verified
from dora_lab.spec import SpecError


def copies(results: Path) -> list[Path]:
    """Every kind of copy of a run in a results folder."""
    runs = results / "runs"
    run = sorted((runs / "commonsense").iterdir())[0]
    (runs / "elsewhere").mkdir()
    made = [run.with_name(f"{run.name}.bak"), run.with_name(f"{run.name} (copy)"), run.with_name("0" * 12)]
    made += [runs / "elsewhere" / run.name]
    for folder in made:
        shutil.copytree(run, folder)
    shutil.copytree(runs / "commonsense", runs / "commonsense.bak")
    return made


def test_copies_of_runs_count_nowhere(tmp_path: Path) -> None:
    """The oracle is the tree without the copies."""
    clean, copied = write_tree(tmp_path / "a"), write_tree(tmp_path / "b")
    made = copies(copied)
    found = survey(copied)
    there, again = ([path.relative_to(root) for path, _ in survey(root).runs] for root in (clean, copied))
    assert there == again and set(made) <= {lost.path for lost in found.left_out}
    assert all("is no run: its record is of commonsense/" in lost.why for lost in found.left_out)
    for stream in ("eval", "probe", "record"):
        pd.testing.assert_frame_equal(report.frame(clean, None, stream), report.frame(copied, None, stream))
    for experiment in ("commonsense", None):
        one, other = (
            paper.verdicts(
                report.frame(root, experiment), report.frame(root, experiment, "probe"), paper.claims("commonsense")
            )
            for root in (clean, copied)
        )
        pd.testing.assert_frame_equal(one, other)
    compared = paper.compare(copied, clean)
    assert compared.agrees and len(compared.left_out) == len(found.left_out)
    counts = [paper.cells(root, paper.claims(), published_specs())["n"].tolist() for root in (clean, copied)]
    assert counts[0] == counts[1]
    assert report.frame(copied).attrs["statuses"] == {report.REFUSED: len(found.left_out)}


def test_a_run_is_found_by_its_id_beside_its_copy(tmp_path: Path) -> None:
    run = write_run(tmp_path, make_spec("lora", 8, 0))
    shutil.copytree(run, run.with_name(f"{run.name}.bak"))
    assert find_run(run.name[:6], tmp_path) == run
    with pytest.raises(SpecError, match="none is that"):
        find_run(f"{run.name}.b", tmp_path)


def damage(run: Path) -> None:
    """A run whose probe stream is not what its record says."""
    record = json.loads((run / "record.json").read_text())
    marks = {"probe": {"bytes": 1, "sha256": hash_bytes(b"other")}}
    (run / "record.json").write_text(json.dumps(record | {"streams": marks}))


def test_a_bad_run_is_left_out_of_every_stream_and_the_rest_is_reported(tmp_path: Path) -> None:
    clean = write_tree(tmp_path / "a", seeds=(0,))
    results = write_tree(tmp_path / "b", seeds=(0,))
    bad = [write_run(results, make_spec("lora", 8, seed)) for seed in (1, 2, 3)]
    damage(bad[0])
    (bad[1] / "record.json").write_text("{")
    (bad[2] / "eval.jsonl").write_text('{"task": 1}\n')
    assert [lost.path for lost in survey(results).left_out] == sorted(bad)
    for stream in ("eval", "probe"):
        pd.testing.assert_frame_equal(report.frame(clean, None, stream), report.frame(results, None, stream))
    done = CliRunner().invoke(app, ["report", "--results", str(results)])
    assert done.exit_code == 0, done.output
    assert all(f"left out: {run}" in done.stderr for run in bad)
    told = (results / "tables" / "commonsense.md").read_text(encoding="utf-8")
    assert f"3 runs are not complete and left out: 3 {report.REFUSED}" in told
    with pytest.raises(StoreError, match="is not what it was"):
        verified(bad[0])


def short(results: Path) -> Path:
    """A run of three steps: two of its four fractions fall on step 2."""
    run = write_run(results, make_spec("dora", 8, 0))
    rows = [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]
    seen: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        row["step"] = {0.25: 1, 0.5: 2, 0.75: 2, 1.0: 3}[row["fraction"]]
        measured = {name: row[name] for name in ("delta_m", "delta_d", "relative_change")}
        row |= seen.setdefault((row["step"], row["module"]), measured)
    (run / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_two_fractions_on_one_step_are_one_point(tmp_path: Path) -> None:
    run = short(tmp_path)
    rows = [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]
    once = {(row["step"], row["module"]): row for row in rows if row["kind"] == "q_proj"}
    x, y = (np.array([row[name] for row in once.values()]) for name in ("delta_d", "delta_m"))
    r = float(np.corrcoef(x, y)[0, 1])
    probes = report.frame(tmp_path, None, "probe")
    for found in (correlations.correlate(probes, "q_proj"), paper.layer_correlation(probes, "DoRA", "q_proj")):
        assert found is not None and len(once) == 12
        assert found.value == pytest.approx(r, abs=1e-12) and "12 points" in found.n
    done = CliRunner().invoke(app, ["report", "--results", str(tmp_path)])
    assert done.exit_code == 0 and not done.stderr, done.stderr


def test_a_table_that_cannot_be_built_stops_no_other(tmp_path: Path) -> None:
    write_run(tmp_path, make_spec("lora", 8, 0))
    run = write_run(tmp_path, make_spec("dora", 8, 0))
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    rows[0]["prompt_sha256"] = "0" * 64  # other items: the two cannot be paired
    (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(app, ["report", "--results", str(tmp_path)])
    assert done.exit_code == 1 and "Traceback" not in done.output
    assert "not built, its files stay as they were: analysis/tables/verdicts.py: task boolq" in done.stderr
    assert (tmp_path / "tables" / "commonsense.md").exists() and (tmp_path / "figures" / "layers.pdf").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "--results", "TYPO"], "neither runs/ nor bench/ is there"),
        (["verify", "--results", "TYPO"], "TYPO is no results folder: neither runs/ nor bench/"),
        (["verify", "nonsense"], "unknown experiment 'nonsense'"),
        (["compare", "--results", "TYPO"], "TYPO is no results folder"),
    ],
)
def test_a_typo_is_told(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, SpecError) and words in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_what_files_say_steers_no_terminal(tmp_path: Path) -> None:
    """A model's name that would set the title of the window and hide what follows."""
    run = write_run(tmp_path, make_spec("lora", 8, 0, model__name="evil\x1b]0;title\x07\u202e"))
    for arguments in (["card", str(run)], ["diff", str(run), "published"], ["verify", "--results", str(tmp_path)]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0 and "evil\\x1b]0;title\\x07\\u202e" in done.output, done.output
        assert not set("\x1b\x07\u202e") & set(done.output)


def test_without_git_the_code_is_named_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is a change of one byte, and git's own hash of nothing."""
    for folder in provenance.CODE:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1\n")
    monkeypatch.setattr(provenance, "SOURCE", tmp_path)  # no repository
    monkeypatch.setattr(provenance, "CODE", {name: tmp_path / name for name in provenance.CODE})
    before = provenance.code()
    assert before["commit"] is None and before["files"] == provenance.code()["files"]
    (tmp_path / "dora_lab" / "__pycache__").mkdir()
    (tmp_path / "dora_lab" / "__pycache__" / "a.pyc").write_text("")
    assert provenance.code() == before
    (tmp_path / "experiments" / "a.py").write_text("2\n")
    assert provenance.code()["files"] != before["files"]
    run = write_run(tmp_path, make_spec("lora", 8, 0))
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record | {"code": before}))
    assert f"code files {before['files']}." in report.provenance(report.frame(tmp_path)).caption()
    assert f"code: files of sha256 {before['files']}" in card.card(run)
