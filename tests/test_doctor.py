"""The doctor finds every kind of damage, one at a time, and nothing where nothing is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec, write_run
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.commands.app import RESULTS
from dora_lab.paper.claims import examine as examine_claims
from dora_lab.runs import doctor
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import StoreError
from dora_lab.runs.lock import acquire
from dora_lab.runs.streams import STREAMS, read_stream
from dora_lab.spec import from_dict
from tests.faults._models import copy, flip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run whose record and streams agree."""
    spec = make_spec("lora", 8, 0)
    other = write_run(tmp_path / "other", spec)
    with RunDir.open(tmp_path / "results", from_dict(spec)) as made:
        for name in STREAMS:
            for row in read_stream(other, name):
                made.append(name, row)
        made.record(training={"steps": 200}, inputs={"items": {"test": dict.fromkeys(spec["data"]["tasks"], 120)}})
        made.finish("complete")
    return made.path


def edit(path: Path, **changes: Any) -> None:
    record = json.loads((path / "record.json").read_text()) | changes
    (path / "record.json").write_text(json.dumps(record))


def rows(name: str, change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    """Change the rows of a stream of a run whose record has no hashes."""

    def damage(path: Path) -> None:
        edit(path, streams=None)
        found = read_stream(path, name)
        change(found)
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))

    return damage


def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def lock(path: Path, pid: int) -> None:
    (path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))


def renamed(path: Path) -> None:
    shutil.move(path, path.with_name("0123456789ab"))


def backed_up(path: Path) -> None:
    shutil.copytree(path, path.with_name(f"{path.name}.bak"))


def relabelled(path: Path) -> None:
    """The losses of a run under another seed's name."""
    other = write_run(path.parents[2], make_spec("lora", 8, 1))
    shutil.copy(path / "metrics.jsonl", other)


def measured_twice(path: Path) -> None:
    (path.parents[2] / "bench").mkdir()
    (path.parents[2] / "bench" / "speed.jsonl").write_text('{"seconds": 1.5}\n{"seconds": 2}\n{"seconds": 1.5}\n')


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no record": (lambda p: (p / "record.json").unlink(), "does not exist"),
    "record cut": (lambda p: (p / "record.json").write_text("{"), "is not JSON"),
    "spec changed": (lambda p: edit(p, spec=make_spec("lora", 8, 1)), "but its spec is"),
    "field unknown": (lambda p: edit(p, spec=make_spec("lora", 8, 0) | {"new": 1}), "unknown field 'new'"),
    "folder renamed": (renamed, "its record is of the run commonsense/"),
    "a copy beside it": (backed_up, "a copy: move it out of runs/"),
    "a copy in another experiment": (
        lambda p: shutil.copytree(p, p.parents[1] / "elsewhere" / p.name),
        "a copy: move it out of runs/",
    ),
    "killed": (lambda p: edit(p, status="running"), "nobody runs it: it was killed"),
    "failed without a reason": (lambda p: edit(p, status="failed"), "status failed with error None"),
    "stale lock": (lambda p: lock(p, dead()), "which has ended"),
    "stream changed": (lambda p: flip(p / "eval.jsonl", random.Random(0)), "eval.jsonl"),
    "stream lost": (lambda p: (p / "probe.jsonl").unlink(), "is not what it was when the run was finished"),
    "torn line": (lambda p: (p / "probe.jsonl").open("a").write('{"st'), "a torn last line"),
    "NaN": (rows("metrics", lambda r: r[1].update(loss=float("nan"))), "line 2: NaN is not a value"),
    "row twice": (rows("probe", lambda r: r.append(r[-1])), "1 rows are there twice"),
    "rows out of order": (rows("metrics", lambda r: r.reverse()), "comes after a later one"),
    "row of text": (rows("eval", lambda r: r[0].update(value="high")), "field 'value' = 'high'"),
    "score lost": (rows("eval", lambda r: r.pop()), "1 of 16 scores are missing, the first is openbookqa"),
    "score raised": (rows("eval", lambda r: r[3].update(value=0.99)), "is not what its 120 answers say"),
    "items lost": (rows("eval", lambda r: r[0].update(n=119, correct=None)), "n = 119, the record says 120 items"),
    "training cut": (rows("metrics", lambda r: r.pop()), "the last loss is of step 100, the run had 200"),
    "checkpoint lost": (rows("probe", lambda r: r.__delitem__(slice(-12, None))), "rows per fraction are"),
    "out of range": (rows("probe", lambda r: r[0].update(delta_d=2.5)), "delta_d = 2.5 is outside 0 .. 2"),
    "temporary": (lambda p: (p / ".record.json.17.tmp").write_text(""), "a temporary that was left behind"),
    "checkpoint": (lambda p: (p / "checkpoints" / "checkpoint-5").mkdir(parents=True), "broken checkpoint (no-manif"),
    "quarantine": (lambda p: (p / "checkpoints" / "quarantine" / "x").mkdir(parents=True), "that was put aside"),
    "file among runs": (lambda p: (p.parent / "notes.txt").write_text(""), "a file where runs lie"),
    "benchmark": (
        lambda p: [(p.parents[2] / "bench").mkdir(), (p.parents[2] / "bench" / "speed.jsonl").write_text("{\n")],
        "speed.jsonl: line 1",
    ),
    "a measurement twice": (measured_twice, "1 measurements are there twice, the first on line 1"),
    "another seed's losses": (relabelled, ", which has another seed, to the last digit"),
}


def test_nothing_is_wrong(run: Path) -> None:
    assert list(doctor.examine(run.parents[2])) == list(doctor.examine(run)) == []
    found = CliRunner().invoke(app, ["doctor", str(run)])
    assert (found.exit_code, found.output) == (0, "nothing is wrong\n")


@pytest.mark.parametrize("name", DAMAGE)
def test_every_damage_is_found(name: str, run: Path) -> None:
    damage, words = DAMAGE[name]
    damage(run)
    found = CliRunner().invoke(app, ["doctor", str(run.parents[2])])
    assert found.exit_code == 1 and words in found.output, found.output
    assert "    mend: " in found.output and "Traceback" not in found.output
    assert found.output.splitlines()[-1].endswith("finding") or found.output.splitlines()[-1].endswith("findings")


def test_a_run_in_progress_is_left_alone(run: Path) -> None:
    edit(run, status="running")
    (run / "lock").unlink(missing_ok=True)
    held, _ = acquire(run / "lock")
    (run / ".record.json.17.tmp").write_text("")
    assert list(doctor.examine(run)) == []
    held.release()


def test_an_adapter_is_examined(tmp_path: Path) -> None:
    saved = copy("adapter", tmp_path)
    assert list(doctor.examine(saved)) == []
    flip(saved / "adapter_model.safetensors", random.Random(0))
    (finding,) = doctor.examine(saved)
    assert "changed since it was saved" in finding.what and finding.mend == "fetch the folder again"
    with pytest.raises(StoreError, match="neither a results folder"):
        list(doctor.examine(tmp_path))


def test_claims_are_examined(run: Path, tmp_path: Path) -> None:
    (tmp_path / "claims.csv").write_text("experiment\n")
    (finding,) = examine_claims(tmp_path / "claims.csv")
    assert "columns" in finding.what + finding.mend


def test_the_committed_results_are_sound() -> None:
    findings = [one for one in doctor.examine(RESULTS) if "local" not in one.where.parts]
    assert findings == []


def test_no_torch_is_imported() -> None:
    code = "import sys; from dora_lab.runs import doctor; assert not {'torch', 'transformers'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
