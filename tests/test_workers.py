"""Worker processes: whatever prints in them, lies beside them or ends them, `run_many` comes to its end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import make_spec

from dora_lab.launch.pool import Outcome, run_many
from dora_lab.launch.runtime import Paths
from dora_lab.spec import from_dict, to_dict

KILLED = "import os; os.kill(os.getpid(), 9)\n"
ORPHAN = """import os, time
if (orphan := os.fork()) == 0:
    time.sleep(60)
    open(f"{__file__}.slept", "w").close()
    os._exit(0)
with open(f"{__file__}.orphan", "w") as file:
    file.write(str(orphan))
os._exit(3)
"""


def ended(tmp_path: Path, first: str | None, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """How a run ends in a worker that begins with some code; its model is not there, so it is soon over."""
    if first is not None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(first)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    made = to_dict(from_dict(make_spec("base", None, 0)))
    spec = from_dict(made | {"model": made["model"] | {"name": str(tmp_path / "no model")}, "tier": "paper"})
    (outcome,) = run_many([spec], Paths(tmp_path / "results"), jobs=1, quiet=True)
    return outcome


def test_a_worker_may_print_before_its_first_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ended(tmp_path, None, monkeypatch)
    printing = ended(tmp_path, "print('hello')\nprint('{}', flush=True)\n", monkeypatch)
    assert plain.status == printing.status == "failed" and plain.error == printing.error


def test_a_file_of_the_working_directory_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not the one of Python')\n")
    monkeypatch.chdir(tmp_path)
    outcome = ended(tmp_path, None, monkeypatch)
    assert outcome.status == "failed" and "no model" in str(outcome.error)


@pytest.mark.parametrize(("first", "words"), [(KILLED, "signal 9"), (ORPHAN, "exit code 3")])
def test_a_worker_that_is_gone_is_noticed(
    first: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a process that it started holds its pipe."""
    outcome = ended(tmp_path, first, monkeypatch)
    assert outcome.status == "interrupted" and words in str(outcome.error)
    if first == ORPHAN:
        site = tmp_path / "site"
        os.kill(int((site / "sitecustomize.py.orphan").read_text()), signal.SIGKILL)
        assert not (site / "sitecustomize.py.slept").exists(), "it was waited for"
