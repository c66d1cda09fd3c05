"""The run directory: whole or marked otherwise, one writer, nothing that is not a value."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dora_lab import report
from dora_lab.runs import directory
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import LockedError, StoreError
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import iter_runs
from dora_lab.spec import Data, Evaluation, Method, Model, Spec, spec_id, to_dict

SPEC = Spec(
    experiment="commonsense",
    tier="mini",
    seed=0,
    model=Model(name="mini"),
    data=Data(name="mini", tasks=("boolq",)),
    method=Method(name="base"),
    optim=None,
    probe=None,
    evaluation=Evaluation(),
)


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        assert run.path == tmp_path / "runs" / "commonsense" / spec_id(SPEC)
        assert read_record(run.path)["status"] == "running"
        run.append("metrics", {"step": 1, "loss": 0.5, "eval_loss": None})
        run.append("metrics", {"step": 2, "loss": 0.25})
        run.record(seconds={"train": 1.5}, params={"trainable": 3, "total": 7})
        run.record(seconds={"evaluate": 2.5})
        run.finish("complete")
    record = read_record(run.path)
    assert (record["schema"], record["spec"], record["spec_id"]) == (1, to_dict(SPEC), spec_id(SPEC))
    assert (record["status"], record["error"], record["notes"]) == ("complete", None, [])
    assert record["seconds"] == {"train": 1.5, "evaluate": 2.5}
    assert read_stream(run.path, "metrics") == [{"step": 1, "loss": 0.5, "eval_loss": None}, {"step": 2, "loss": 0.25}]
    assert read_stream(run.path, "probe") == []
    assert sorted(file.name for file in run.path.iterdir()) == ["metrics.jsonl", "record.json"]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"step": 1, "loss": float("nan")}, "'loss' = nan"),
        ({"loss": float("inf")}, "'loss' = inf"),
        ({"by_task": {"boolq": [0.5, float("nan")]}}, "'by_task.boolq[1]' = nan"),
        ({"path": Path("x")}, "'path' = "),
    ],
)
def test_no_value_is_refused_by_name(tmp_path: Path, row: dict[str, object], field: str) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        with pytest.raises(StoreError, match="is no JSON value") as caught:
            run.append("metrics", row)
        assert f"field {field}" in str(caught.value)
        with pytest.raises(StoreError, match="is no JSON value"):
            run.record(extra=row)
        assert read_stream(run.path, "metrics") == [] and "extra" not in read_record(run.path)


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        run.append("metrics", {"step": 1})
        run.append("probe", {"step": 1})
    with (run.path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 2, "lo')
    with (run.path / "probe.jsonl").open("a") as torn:
        torn.write('{"step": 2}')  # whole but for its newline
    assert read_stream(run.path, "metrics") == [{"step": 1}]
    with RunDir.open(tmp_path, SPEC) as run:
        run.append("metrics", {"step": 3})
        run.append("probe", {"step": 3})
    assert read_stream(run.path, "metrics") == [{"step": 1}, {"step": 3}]
    assert read_stream(run.path, "probe") == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert read_record(run.path)["notes"] == ["metrics.jsonl: a torn last line of 15 bytes was removed"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": NaN}', "", r'{"a": "\ud800"}'])
def test_any_other_broken_line_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "eval.jsonl").write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(StoreError, match=r"eval\.jsonl, line 2"):
        read_stream(tmp_path, "eval")


def test_half_a_character_is_refused_in_a_record_and_kept_out_of_one(tmp_path: Path) -> None:
    with pytest.raises(OSError), RunDir.open(tmp_path, SPEC) as run:
        raise OSError(2, "no such file", "caf\udce9.json")
    assert "caf" in read_record(run.path)["error"]
    report.frame(tmp_path, stream="record")
    file = run.path / "record.json"
    whole = file.read_text()
    file.write_text(whole.replace('"status"', r'"more": "\ud83d\ude00", "status"', 1))  # two halves are a character
    assert read_record(run.path)["more"] == "\U0001f600"
    file.write_text(whole.replace('"status"', r'"more": "\ud83d", "status"', 1))
    with pytest.raises(StoreError, match=r"record\.json is not JSON \(half a character \('.ud83d'\)\)"):
        read_record(run.path)


def test_streams_are_cut_back_to_their_marks(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        for step in range(5):
            run.append("metrics", {"step": step})
            if step == 2:
                marks = run.marks()
        assert run.strayed(marks) is None
        run.cut("metrics", marks["metrics"]["bytes"])
        run.append("metrics", {"step": 9})
        run.cut("eval")
        assert [row["step"] for row in read_stream(run.path, "metrics")] == [0, 1, 2, 9]
        assert run.strayed(marks) is None
        (run.path / "metrics.jsonl").write_text('{"step": 7}\n')
        assert run.strayed(marks) == "metrics"


def test_an_exception_marks_the_run(tmp_path: Path) -> None:
    for error, status, text in (
        (RuntimeError("loss is NaN at step 3"), "failed", "RuntimeError: loss is NaN at step 3"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ):
        with pytest.raises(type(error)), RunDir.open(tmp_path, SPEC) as run:
            assert run.status == "running"
            raise error
        assert (read_record(run.path)["status"], read_record(run.path)["error"]) == (status, text)
    with RunDir.open(tmp_path, SPEC) as run:
        pass
    assert read_record(run.path)["status"] == "interrupted"


def test_a_complete_run_is_not_written_to(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        run.finish("complete")
    before = (run.path / "record.json").read_bytes()
    with RunDir.open(tmp_path, SPEC) as run:
        assert run.complete
        for write in (lambda: run.append("metrics", {}), lambda: run.record(a=1), lambda: run.finish("failed", "x")):
            with pytest.raises(StoreError, match="is complete and is not written to"):
                write()
    with pytest.raises(StoreError, match="is closed"):
        run.append("metrics", {})
    assert (run.path / "record.json").read_bytes() == before


def test_misuse_is_refused(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        for use, words in (
            (lambda: run.append("metric", {}), "did you mean 'metrics'?"),
            (lambda: run.record(status="complete"), "use finish"),
            (lambda: run.finish("done"), "unknown status 'done'"),
            (lambda: run.finish("failed"), "and only it, has an error"),
            (lambda: run.finish("complete", "error"), "and only it, has an error"),
        ):
            with pytest.raises(StoreError, match=words):
                use()


def test_one_writer(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        with pytest.raises(LockedError, match=rf"process {os.getpid()} on host .* since 2\d{{3}}-"):
            RunDir.open(tmp_path, SPEC)
        assert (run.path / "lock").exists()
        with RunDir.open(tmp_path, replace(SPEC, seed=1)):
            pass
    with RunDir.open(tmp_path, SPEC):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib, test_store; from dora_lab.runs.directory import RunDir\n"
        "run = RunDir.open(pathlib.Path(sys.argv[1]), test_store.SPEC); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=rf"process {process.pid} on host .* since 2\d{{3}}-"):
            RunDir.open(tmp_path, SPEC)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with RunDir.open(tmp_path, SPEC) as run:
        (note,) = read_record(run.path)["notes"]
    assert note.startswith(f"taken over from process {process.pid} on host {socket.gethostname()} since 2")
    assert note.endswith(", which had ended without closing it")


def test_the_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    path = run_path(tmp_path, SPEC)
    path.mkdir(parents=True)
    (path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(LockedError, match=r"process 1 on host elsewhere.*if it has ended, remove"):
        RunDir.open(tmp_path, SPEC)


def test_records_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        run.record(a=1)
        before = (run.path / "record.json").read_bytes()

        def crash(*_: object) -> None:
            raise OSError("no space left")

        with monkeypatch.context() as patch:
            patch.setattr(directory.os, "replace", crash)
            with pytest.raises(OSError, match="no space"):
                run.record(a=2)
        assert (run.path / "record.json").read_bytes() == before
        run.record(b=3)
        assert read_record(run.path)["a"] == 1


def test_a_reader_never_sees_half_a_record(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, SPEC) as run:
        code = "import sys; from dora_lab.runs.directory import read_record\nwhile True: read_record(sys.argv[1])"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        reader = subprocess.Popen([sys.executable, "-c", code, str(run.path)], env=environment, stderr=subprocess.PIPE)
        end = time.monotonic() + 1
        count = 0
        while time.monotonic() < end:
            run.record(text="x" * (count % 20000))
            count += 1
        alive = reader.poll() is None
        reader.kill()
        _, errors = reader.communicate()
        assert alive, errors


def test_damaged_records_are_named(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    with pytest.raises(StoreError, match="does not exist"):
        read_record(tmp_path)
    for text, words in (
        ("{", "is not JSON"),
        ("[]", "schema None"),
        ('{"schema": 2}', "schema 2, this version reads 1"),
        ('{"schema": 1, "spec": {}, "spec_id": "", "error": null}', "field 'status' is missing"),
    ):
        file.write_text(text)
        with pytest.raises(StoreError, match=words):
            read_record(tmp_path)


def test_runs_are_found_in_order(tmp_path: Path) -> None:
    assert list(iter_runs(tmp_path)) == []
    for spec in (replace(SPEC, experiment="b"), replace(SPEC, experiment="a", seed=1), replace(SPEC, experiment="a")):
        with RunDir.open(tmp_path, spec):
            pass
    found = [path.relative_to(tmp_path / "runs").parts for path, _ in iter_runs(tmp_path)]
    assert found == sorted(found) and [parts[0] for parts in found] == ["a", "a", "b"]
    assert [record["spec"]["experiment"] for _, record in iter_runs(tmp_path, "b")] == ["b"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A disk with room for a thousand bytes: what was there stays, whoever writes, and nothing is left beside it."""
    import resource

    import pandas as pd

    from dora_lab import report
    from dora_lab.io.atomic import write_text

    source = report.Provenance(("x",), ("mini",), ("abc",), (), False, {})
    table = pd.DataFrame({"word": ["a" * 5000]})
    figure, _ = report.new_figure(1, 1, width=2, height=2)
    writers = {
        "x.txt": lambda: write_text(tmp_path / "x.txt", "b" * 5000),
        "x.csv": lambda: report.save_table(tmp_path, "x", "x", [report.Block(title="x", cells=table)], table, source),
        "x.pdf": lambda: report.save_figure(figure, tmp_path, "x", source),
    }
    names = [*writers, "x.md", "x.tex", "x.png"]
    for name in names:
        (tmp_path / name).write_text("as it was")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for write in writers.values():
            with pytest.raises(OSError, match="too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(names, "as it was")
