"""The visit to a GPU, dry: every stage gives rows on tiny shapes, on a machine without what a GPU machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import HIDE

from analysis.tables import gpu, memory
from dora_lab.launch.experiments import experiment_names
from experiments import gpu_visit
from experiments.gpu import table

ROOT = Path(__file__).resolve().parents[1]
LACKING = ("datasets", "lm_eval", "gguf", "bitsandbytes")


def visit(
    folder: Path, *options: str, lacking: Sequence[str] = LACKING, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it in a process that finds none of the packages that are not there."""
    hidden = folder / "site"
    hidden.mkdir(parents=True, exist_ok=True)
    (hidden / "sitecustomize.py").write_text(HIDE.format(packages=tuple(lacking)))
    there = os.environ | {"PYTHONPATH": f"{hidden}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "experiments.gpu_visit", *options, "--out", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, timeout=300, check=False)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("visit")
    done = visit(folder, "--cpu", "--seconds", "250")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_the_dry_run_does_every_stage(dry: tuple[Path, str]) -> None:
    folder, told = dry
    found = rows(folder)
    assert {row["stage"] for row in found} == set(gpu_visit.STAGES)
    assert not [row for row in found if "error" in row or "out_of_memory" in row]
    skipped = {row["cell"] for row in found if "skipped" in row}
    assert all("triton" in cell or cell in ("weights", "sign", "autocast", "small") for cell in skipped), skipped
    assert not [row for row in found if row.get("ok") is False]
    assert {"right", "fast", "probe", "merge"} <= {row["stage"] for row in found if "seconds" in row or "ok" in row}
    for row in found:
        assert {"card", "driver", "torch", "commit", "tf32", "visit"} <= row.keys() and row["tf32"] is False
    shown = told.rpartition("\n\n")[2].splitlines()
    assert 20 < len(shown) <= table.HEIGHT and max(map(len, shown)) <= table.WIDTH
    assert any(line.startswith("-- checkpointed") for line in shown)
    assert [file.name for file in folder.iterdir() if file.is_file()] == ["gpu.jsonl"], "few files come back"


def test_a_short_visit_is_a_valid_one(tmp_path: Path) -> None:
    done = visit(tmp_path, "--cpu", "--seconds", "9", "--only", "ceilings,fast,llava,merge")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(tmp_path)
    late = [row["skipped"] for row in found if "skipped" in row]
    assert found and all("s are left" in words for words in late)
    again = visit(tmp_path, "--cpu", "--seconds", "0", "--only", "ceilings,fast")
    assert again.returncode == 0 and "needs about" in again.stdout
    assert all("skipped" in row for row in rows(tmp_path)[len(found) :]), "a cell was begun without time"


def test_where_it_cannot_run_it_says_so_in_one_line(tmp_path: Path) -> None:
    for options, words in ((("--only", "fats"), "no stage is called fats"), ((), "without CUDA")):
        done = visit(tmp_path, *options)
        if done.returncode == 0:
            pytest.skip("there is a GPU here")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr or "no GPU here" in done.stderr or "GiB" in done.stderr


def test_a_cell_that_raises_is_a_row_and_a_lost_device_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.gpu import visit as room

    here = room.Visit(tmp_path, 60.0, True, "one", room.stamp(True))

    def broken() -> None:
        raise ValueError("out of ideas")

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not here.cell("fast", "broken", 1, broken)
    with pytest.raises(room.PoisonedError):
        here.cell("fast", "lost", 1, lost)
    assert here.cell("fast", "good", 1, lambda: {"seconds": 1.0})
    found = rows(tmp_path)
    assert found[0]["error"] == "ValueError: out of ideas" and found[0]["traceback"][-1].endswith("broken")
    assert not here.cell("fast", "long", 1e6, lambda: {"seconds": 1.0})
    on = room.Visit(tmp_path, 60.0, True, "one", room.stamp(True))
    assert on.cell("fast", "good", 1, lost), "what is known is not measured again by the process that goes on"

    def full() -> None:
        raise room.torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    monkeypatch.setattr(room.torch.cuda, "max_memory_allocated", lambda: 7)
    assert not on.cell("fast", "full", 1, full)
    assert rows(tmp_path)[-1]["out_of_memory"] == "CUDA out of memory. Tried to allocate 2 GiB"


def test_a_ratio_of_what_was_timed_in_turns_is_round_by_round() -> None:
    rows = [
        {"group": "g", "contender": name, "seconds": 9.0, "taken": taken, "in_turns": True}
        for name, taken in (("a", [2.0, 20.0, 30.0]), ("b", [1.0, 10.0, 10.0]))
    ]
    assert table.ratio(rows[0], rows, "b") == 2.0
    assert table.ratio(rows[0] | {"in_turns": False}, rows, "b") == 1.0


def test_the_commit_that_is_told_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.gpu.visit import stamp

    monkeypatch.delenv("DORA_LAB_COMMIT", raising=False)
    assert stamp(True)["commit"] != "0123abc"
    monkeypatch.setenv("DORA_LAB_COMMIT", "0123abc")
    assert stamp(True)["commit"] == "0123abc" and stamp(True)["diff"] is None


def test_what_is_asked_for_by_name_runs_too(tmp_path: Path) -> None:
    done = visit(tmp_path, "--cpu", "--seconds", "100", "--only", "passes,profile")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(tmp_path)
    assert {row["stage"] for row in found} == {"passes", "profile"}
    assert not [row for row in found if "error" in row]
    assert any("kernels in" in line and "waits" in line for line in done.stdout.splitlines())


def test_the_tables_read_what_a_card_gave(dry: tuple[Path, str], tmp_path: Path) -> None:
    assert gpu.build(tmp_path) == memory.build(tmp_path) == []
    found = rows(dry[0])
    (tmp_path / "bench").mkdir()
    file = tmp_path / "bench" / "gpu.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    assert gpu.build(tmp_path) == memory.build(tmp_path) == [], "a dry run measures nothing"
    found = [row for row in found if row.get("contender") != "ours/dora-branch"]  # as if there had been no time for it
    for row in found:  # as if on a card
        row["card"] = "a card"
        if "contender" in row and "peak_bytes" in row:
            row["peak_bytes"] = 28_000_000_000 if row["contender"].endswith("graph") else 21_000_000_000
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    texts = {path.name: path.read_text() for one in (gpu, memory) for path in one.build(tmp_path)}
    line = next(line for line in texts["memory.md"].splitlines() if "as released" in line and "| norm detached" in line)
    assert "| 28.2 | 21.0 | 25.0 |" in " ".join(line.split()), line
    assert "| linears | ours/dora / ours/lora |" in texts["gpu.md"] and "not run" in texts["gpu.md"]
    assert "dora, norm in the graph: float32" in texts["gpu.md"]


def test_the_visit_is_no_experiment() -> None:
    assert not {"gpu_visit", "gpu"} & set(experiment_names())


def test_the_runs_of_a_real_model_come_back_as_records(tmp_path: Path) -> None:
    done = visit(tmp_path, "--cpu", "--seconds", "250", "--only", "llm", lacking=("bitsandbytes",))
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["cell"]: row for row in rows(tmp_path)}
    assert "skipped" in found["weights"], "a dry run has the embedded base"
    for name in ("sign", "autocast", "small"):
        assert (found[name].get("complete"), found[name].get("left")) == (1, 0), found[name]
        with tarfile.open(tmp_path / f"{name}-records.tar.gz") as archive:
            kept = {Path(entry).name for entry in archive.getnames()}
        probed = {"probe.jsonl"} if name != "autocast" else set()
        assert kept == {"record.json", "metrics.jsonl", "timing.jsonl", "eval.jsonl"} | probed
