"""A full disk, whoever writes: an OSError, the run interrupted, the training kept, the old file whole."""

from __future__ import annotations

import contextlib
import csv
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_spec
from safetensors.torch import save_file
from typer.testing import CliRunner

from dora_lab import report
from dora_lab.__main__ import app
from dora_lab.commands.app import RESULTS
from dora_lab.io.atomic import disk_errors, replacing
from dora_lab.report import probe_rows
from dora_lab.runs.directory import RunDir
from dora_lab.runs.record import read_record
from dora_lab.runs.survey import iter_runs
from dora_lab.spec import from_dict

BIG = torch.zeros(100_000)


@contextlib.contextmanager
def full(room: int = 2000) -> Iterator[None]:
    """A disk on which no file can become longer than `room` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "safetensors": lambda file: save_file({"a": BIG}, file),
    "torch": lambda file: torch.save({"a": BIG}, file),
    "plain": lambda file: file.write_bytes(bytes(100_000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_training_outlives_a_full_disk_while_its_adapter_is_written(name: str, tmp_path: Path) -> None:
    spec = from_dict(make_spec("lora", 8, 0))
    with pytest.raises(OSError, match=r"could not be written|too large"), RunDir.open(tmp_path, spec) as run:
        (run.checkpoints / "checkpoint-48").mkdir(parents=True)
        with full(), replacing(run.path / "adapter_model.safetensors") as file:
            WRITERS[name](file)
    record = read_record(run.path)
    assert record["status"] == "interrupted" and "OSError" in record["error"]
    with RunDir.open(tmp_path, spec) as run:  # a failed run would be wiped here
        assert (run.checkpoints / "checkpoint-48").is_dir()


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path / "x"):
        raise RuntimeError("shapes do not fit")


ROWS = [{"tuned": "t", "module": f"m{i}", "delta_m": 0.1, "delta_d": 0.2, "kind": "q", "layer": i} for i in range(400)]


SOURCE = report.Provenance(("x",), ("mini",), ("abc",), (), False, {})


@pytest.mark.parametrize("ending", ["csv", "jsonl", "png"])
def test_rows_of_the_probe_replace_a_file_whole_or_not_at_all(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{ending}"
    file.write_text("as it was")
    with full(), pytest.raises(OSError, match="too large"):
        (probe_rows.plot if ending == "png" else probe_rows.save)(ROWS, file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    cells = pd.DataFrame(rows)
    report.save_table(folder, "x", "x", [report.Block(title="x", cells=cells)], cells, SOURCE)


def write_picture(folder: Path, rows: list[dict[str, Any]]) -> None:
    figure, axes = report.new_figure(1, 1, 4, 3)
    axes[0, 0].plot([row["delta_d"] for row in rows], [row["delta_m"] for row in rows])
    report.save_figure(figure, folder, "x", SOURCE, pd.DataFrame(rows))


@pytest.mark.parametrize("write", [write_table, write_picture])
def test_a_report_replaces_its_files_whole_or_not_at_all(write: Callable[..., None], tmp_path: Path) -> None:
    """What `report` writes: tables, figures and the numbers beside them."""
    write(tmp_path, ROWS[:3])
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(old) == 3
    with full(), pytest.raises(OSError, match="too large"):
        write(tmp_path, ROWS)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_a_card_replaces_its_file_whole_or_not_at_all(tmp_path: Path) -> None:
    (run, _), file = next(iter_runs(RESULTS, "commonsense")), tmp_path / "card.md"
    file.write_text("as it was")
    with full(100):
        assert CliRunner().invoke(app, ["card", str(run), "--out", str(file)]).exit_code != 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]


def test_no_csv_holds_a_formula(tmp_path: Path) -> None:
    evil = ["=1+1", "+1+cmd", "-cmd", "@x", "plain", "\t=1"]
    table = pd.DataFrame({"word": evil, "value": [-1.0] * 6})
    report.save_table(tmp_path, "x", "x", [report.Block(title="x", cells=table)], table, SOURCE)
    probe_rows.save([{"module": text, "delta_m": -1.0} for text in evil], tmp_path / "rows.csv")
    for name in ("x.csv", "rows.csv"):
        with (tmp_path / name).open(newline="") as lines:
            rows = list(csv.reader(lines))[1:]
        assert [row[0] for row in rows] == ["'=1+1", "'+1+cmd", "'-cmd", "'@x", "plain", "'\t=1"]
        assert {float(row[1]) for row in rows} == {-1.0}
