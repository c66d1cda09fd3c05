"""The command for runs that see pictures, with one process and with two: the same losses, the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pictured import SHAPE, TASKS, save_bart, save_pictures
from test_pictured_run import SENTENCES

from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import iter_runs

HOUSE = Path(__file__).resolve().parents[1]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = {
    "data.feature_shape": f"{SHAPE[0]},{SHAPE[1]}", "data.visual_tokens": "4", "data.cutoff": "40",
    "data.cutoffs": "vqa=20/10", "optim.batch_size": "4", "optim.micro_batch_size": "2", "optim.epochs": "1",
    "optim.task_batch_sizes": ",".join(f"{task}=4" for task in TASKS), "evaluation.batch_size": "3",
    "evaluation.max_new_tokens": "8", "method.rank": "4", "method.alpha": "4",
}  # fmt: skip
# imported by every interpreter that starts: notes who reads features, in a file for each process of the run
COUNTED = """
import os
from dora_lab.tasks import frames, pictures
def noted(real):
    def gather(*given):
        with open(os.path.join({folder!r}, os.environ.get("RANK", "0")), "a") as file:
            file.write("x")
        return real(*given)
    return gather
pictures.gather, frames.gather = noted(pictures.gather), noted(frames.gather)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp("processes")
    base = save_bart(where / "bart", SENTENCES)
    config = json.loads((base / "config.json").read_text())
    assert config["dropout"] > 0  # what is dropped hangs on the process
    (base / "config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    return save_pictures(where / "data"), base


def run(
    results: Path,
    folders: tuple[Path, Path],
    launch: Sequence[str] = (),
    experiment: str = "image_text",
    small: Mapping[str, str] = SMALL,
) -> subprocess.CompletedProcess[str]:
    """DoRA of tier paper, its first seed."""
    results.mkdir()
    (results / "sitecustomize.py").write_text(COUNTED.format(folder=str(results)))
    changes = [text for name, value in small.items() for text in ("--with", f"{name}={value}")]
    chosen = ["--only", "method.name=dora", "--only", "seed=0", "--only", "method.detach_norm=True"]
    where = ["--data-dir", str(folders[0]), "--model-dir", str(folders[1]), "--results", str(results)]
    return subprocess.run(
        [sys.executable, *launch, "-m", "dora_lab", "run", experiment, "--tier", "paper", *where, *chosen, *changes],
        capture_output=True, text=True, check=False, cwd=HOUSE, timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{results}:{HOUSE}"},
    )  # fmt: skip


def samples(path: Path) -> dict[str, list[Any]]:
    return {
        file.stem: [json.loads(line)["output"] for line in file.read_text().splitlines()]
        for file in sorted((path / "samples").iterdir())
    }


def test_over_two_processes_as_over_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, launch in (("one", ()), ("two", TWO)):
        done = run(tmp_path / name, folders, launch)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("1 runs: 1 complete") == 1
        # four sets of pictures, read by one process
        assert [(tmp_path / name / str(rank)).exists() for rank in (0, 1)] == [True, False]
        assert (tmp_path / name / "0").read_text() == "x" * 4
    (path, one), (other, two) = (next(iter_runs(tmp_path / name)) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["spec_id"] == two["spec_id"]
    assert one["inputs"] == two["inputs"] and one["spec"]["data"]["sha256"] == one["inputs"]["data"]["sha256"]
    losses = [[row["loss"] for row in read_stream(run, "metrics")] for run in (path, other)]
    assert len(losses[0]) == 18 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    said, again = samples(path), samples(other)
    assert said.keys() == {f"{task}.generate" for task in TASKS}
    logits = said.pop("nlvr2.generate"), again.pop("nlvr2.generate")
    assert said == again and any(text for texts in said.values() for text in texts)
    for mine, theirs in zip(*logits, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


def test_what_one_process_cannot_read_ends_both(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = save_pictures(tmp_path / "data")
    (file,) = (broken / "features" / "VG").glob("*/*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    done = run(tmp_path / "two", (broken, folders[1]), TWO)
    assert done.returncode != 0 and "not a whole parquet file" in done.stdout + done.stderr
    ((_, record),) = iter_runs(tmp_path / "two")
    assert record["status"] == "failed" and "not a whole parquet file" in record["error"]
