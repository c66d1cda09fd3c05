"""One writer per run, whoever removes its lock, whatever the disk's locks are worth, wherever the holder was killed."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.runs import doctor, lock
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import LockedError
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import from_dict

SPEC = from_dict(make_spec("lora", 8, 0))


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that grants every lock to everybody."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def written(root: Path, **named: Any) -> Path:
    """The lock file of an interrupted run as this process would have written it, but for some fields."""
    with RunDir.open(root, SPEC) as run:
        text = json.loads((run.path / "lock").read_text())
    (run.path / "lock").write_text(json.dumps(text | named))
    return run.path / "lock"


def ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def old(file: Path) -> None:
    then = time.time() - lock.STALE - 5
    os.utime(file, (then, then))


def test_a_holder_whose_lock_was_removed_writes_no_more(tmp_path: Path) -> None:
    first = RunDir.open(tmp_path, SPEC)
    first.append("metrics", {"step": 1})
    os.unlink(first.path / "lock")
    with RunDir.open(tmp_path, SPEC) as second:
        writes: list[Callable[[], Any]] = [
            lambda: first.append("metrics", {"step": 2}),
            lambda: first.record(params={"total": 1}),
            lambda: first.note("here"),
            lambda: first.cut("metrics"),
            lambda: first.finish("complete"),
            lambda: first.restart("why"),
        ]
        for write in writes:
            with pytest.raises(LockedError, match="now belongs to process"):
                write()
        first.close()
        assert (second.path / "lock").exists()  # it is not the first one's to remove
        second.append("metrics", {"step": 3})
        assert [row["step"] for row in read_stream(second.path, "metrics")] == [1, 3]
        second.finish("complete")
    assert read_record(first.path)["status"] == "complete" and not (first.path / "lock").exists()


def test_leaving_a_run_that_was_lost_says_nothing_over_it(tmp_path: Path) -> None:
    with pytest.raises(LockedError, match="its lock file was removed"), RunDir.open(tmp_path, SPEC) as run:
        os.unlink(run.path / "lock")
        run.append("metrics", {"step": 1})
    assert read_record(run.path)["status"] == "running"


@pytest.mark.usefixtures("no_kernel")
def test_where_locks_exclude_nobody_a_living_process_is_asked_for(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        with pytest.raises(LockedError, match=f"is being written by process {os.getpid()} on"):
            RunDir.open(tmp_path, SPEC)
        assert list(doctor.examine(run.path)) == []
    file = written(tmp_path, began=1)  # another process got the number
    with RunDir.open(tmp_path, SPEC):
        pass
    file = written(tmp_path, pid=ended())
    with RunDir.open(tmp_path, SPEC):
        pass
    assert not file.exists()


def test_a_container_of_this_machine_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    written(tmp_path, host="box-1", space=1, pid=1)
    (finding,) = doctor.examine(run_path(tmp_path, SPEC))
    assert "left by process 1 on host box-1" in finding.what and finding.mend == doctor.AGAIN
    with RunDir.open(tmp_path, SPEC) as run:
        assert "taken over from process 1 on host box-1" in read_record(run.path)["notes"][-1]


def test_another_machine_lives_as_long_as_its_beat(tmp_path: Path) -> None:
    file = written(tmp_path, host="node-7", boot="another")
    with pytest.raises(LockedError, match=r"host node-7.*last sign of life 0 s ago.*10 minutes after"):
        RunDir.open(tmp_path, SPEC)
    assert list(doctor.examine(file.parent)) == []
    old(file)
    (finding,) = doctor.examine(file.parent)
    assert "node-7" in finding.what
    with RunDir.open(tmp_path, SPEC):
        pass


def test_this_machine_after_another_boot(tmp_path: Path) -> None:
    written(tmp_path, boot="the one before", pid=os.getpid())
    with RunDir.open(tmp_path, SPEC):
        pass


def test_a_lock_of_an_older_version_on_another_machine_stays(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    old(file)
    with pytest.raises(LockedError, match="host elsewhere"):
        RunDir.open(tmp_path, SPEC)


def test_the_beat_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with RunDir.open(tmp_path, SPEC) as run:
        old(run.path / "lock")
        time.sleep(0.3)
        assert time.time() - (run.path / "lock").stat().st_mtime < 60


def test_killed_between_the_last_word_and_the_lock(tmp_path: Path) -> None:
    """Nobody opens a complete run again, so its lock is to be deleted; then nothing is wrong."""
    with RunDir.open(tmp_path, SPEC) as run:
        run.finish("complete")
    named = {"host": socket.gethostname(), "pid": ended()}
    (run.path / "lock").write_text(json.dumps(named))
    found = [one for one in doctor.examine(run.path) if one.where.name == "lock"]
    assert [one.mend for one in found] == ["delete it"]
    (run.path / "lock").unlink()
    assert not [one for one in doctor.examine(run.path) if one.where.name == "lock"]


def test_a_lock_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    file = written(tmp_path, host="\x1b]0;title\x07", boot="another", pid=1)
    old(file)
    done = CliRunner().invoke(app, ["doctor", str(file.parent)])
    assert "\\x1b]0;title\\x07" in done.output and "\x1b" not in done.output
