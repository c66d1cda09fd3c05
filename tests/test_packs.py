"""Packed runs: byte for byte what was packed, read by whoever reads folders, and every change of them is seen."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dora_lab import report
from dora_lab.commands import inspect as commands  # noqa: F401  (adds `pack`)
from dora_lab.commands.app import app, find_run
from dora_lab.io.files import hash_bytes
from dora_lab.launch.experiments import experiment_names
from dora_lab.launch.inputs import is_complete
from dora_lab.launch.runtime import Paths
from dora_lab.runs import packs
from dora_lab.runs.directory import RunDir
from dora_lab.runs.doctor import examine
from dora_lab.runs.errors import LockedError, StoreError
from dora_lab.runs.lock import acquire
from dora_lab.runs.record import read_record, run_path, spec_of
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import survey, verified

COMMITTED = Path(__file__).resolve().parents[1] / "results"


def _pack(results: Path, *options: str) -> str:
    told = CliRunner().invoke(app, ["pack", "commonsense", "--results", str(results), *options])
    assert told.exit_code == 0, told.exception
    return told.output


@pytest.fixture
def both(synthetic_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same runs in folders and packed, parts of four."""
    monkeypatch.setattr(packs, "SIZE", 4)
    results = tmp_path / "packed"
    shutil.copytree(synthetic_results, results)
    done = len([1 for _, record in survey(results, "commonsense").runs if record["status"] == "complete"])
    assert f"{done} runs packed, 0 were before" in _pack(results, "--remove")
    return synthetic_results, results


def test_frames_of_packed_runs_are_those_of_folders(both: tuple[Path, Path]) -> None:
    folders, packed = both
    experiment = packed / "runs" / "commonsense"
    assert len(list(experiment.glob("part-*.parquet"))) > 1
    for stream in ("eval", "probe", "metrics", "timing", "record"):
        one, other = (report.frame(root, "commonsense", stream) for root in (folders, packed))
        assert (len(one) or stream == "timing") and one.astype(str).equals(other.astype(str)), stream
    for path, record in survey(folders, "commonsense").runs:
        if record["status"] == "complete":
            where = experiment / path.name
            assert not where.exists() and read_record(where) == record
            files = {file.name: file.read_bytes() for file in path.iterdir() if file.name in packs.FILES}
            assert packs.packed(where) == files
            assert find_run(path.name[:8], packed) == where
    assert not list(packs.faults(experiment))


def test_numbers_in_base64_are_kept_apart_and_come_back_byte_for_byte() -> None:
    numbers = np.random.default_rng(0).normal(size=150).astype("<f2").tobytes()
    text = base64.b64encode(numbers)
    plain = b'{"correct": "%b", "sha256": "%b", "per_item": {"margin": "' % (b"01" * 50, b"5f" * 32)
    content = plain + text + b'", "fact": "' + base64.b64encode(numbers[:75]) + b'"}}'
    rest, apart = packs._apart(content)
    assert rest == plain + b'\x00300", "fact": "\x0075"}}'
    assert apart == (numbers + numbers[:75])[::2] + (numbers + numbers[:75])[1::2]
    assert packs._together(rest, apart) == content
    for whole in (
        b"",
        b"{}",
        b'"\x00300"\n' + content,
        b'"' + b"A" * 70 + b'B=="',
        *(b'{"a": %c}\n{"a": 1}\n' % byte for byte in range(6)),
    ):
        assert packs._apart(whole) == (whole, None)  # the fourth: other base64 of the same bytes


def test_a_second_call_packs_what_is_new_and_writes_no_part_again(both: tuple[Path, Path]) -> None:
    folders, packed = both
    experiment = packed / "runs" / "commonsense"
    before = {file.name: file.read_bytes() for file in experiment.glob("part-*.parquet")}
    assert _pack(packed).startswith("0 runs packed")
    lines = (experiment / packs.INDEX).read_text().splitlines()
    gone = json.loads(lines[-1])["run"]  # packed last, so alone in no other part
    last = sorted(before)[-1]
    rows = [row for row in pq.read_table(experiment / last).to_pylist() if row["run"] != gone]
    (experiment / last).unlink()
    pq.write_table(pa.Table.from_pylist(rows, packs.schema()), experiment / last)
    (experiment / packs.INDEX).write_text("\n".join(lines[:-1]) + "\n")
    before[last] = (experiment / last).read_bytes()
    shutil.copytree(folders / "runs" / "commonsense" / gone, experiment / gone)
    assert "1 runs packed" in _pack(packed, "--remove")
    assert {name: (experiment / name).read_bytes() for name in before} == before
    assert len(list(experiment.glob("part-*.parquet"))) == len(before) + 1
    assert not list(packs.faults(experiment))


def test_a_stream_that_its_record_vouches_for_is_hashed_there_alone(synthetic_results: Path, tmp_path: Path) -> None:
    folder = next(path for path, one in survey(synthetic_results, "commonsense").runs if one["status"] == "complete")
    files = {name: (folder / name).read_bytes() for name in packs.FILES if (folder / name).is_file()}
    streams = {Path(name).stem: content for name, content in files.items() if name != "record.json"}
    marks = {name: {"bytes": len(content), "sha256": hash_bytes(content)} for name, content in streams.items()}
    marks["timing"] = {"bytes": 0, "sha256": hash_bytes(b"")}  # never written: no file
    record = json.loads(files["record.json"]) | {"streams": marks}
    files = {name: content for name, content in files.items() if name != "timing.jsonl"}
    files["record.json"] = json.dumps(record).encode()
    home = tmp_path / "runs" / "commonsense"
    home.mkdir(parents=True)
    (part,) = packs.write(home, [(folder.name, files, "finished")])
    empty = {name for name, content in files.items() if not content}
    assert {*packs.index(home)[folder.name]["files"]} == {"record.json"} | empty  # type: ignore[misc]
    assert packs.packed(home / folder.name) == files and not list(packs.faults(home))
    for name in files:
        rows = pq.read_table(part).to_pylist()
        (row,) = (row for row in rows if row["file"] == name)
        row["content"] += b" "
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, packs.schema()), tmp_path / name / part.name)
        shutil.copy(home / packs.INDEX, tmp_path / name)
        ((_, why),) = packs.faults(tmp_path / name)
        assert f"{name} of run {folder.name} is not what index.jsonl or its record says" in why
        rows.remove(row)
        (tmp_path / name / part.name).unlink()
        pq.write_table(pa.Table.from_pylist(rows, packs.schema()), tmp_path / name / part.name)
        ((_, why),) = packs.faults(tmp_path / name)
        assert f"{name} of run {folder.name} is missing" in why


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def _rewrite(change: Callable[[list[dict]], list[dict]]) -> Callable[[Path], None]:
    def harm(experiment: Path) -> None:
        part = experiment / "part-0001.parquet"
        rows = change(pq.read_table(part).to_pylist())
        pq.write_table(pa.Table.from_pylist(rows, packs.schema()), part)

    return harm


def _swap(rows: list[dict]) -> list[dict]:
    """The losses of two runs in each other's place."""
    losses = [row for row in rows if row["file"] == "metrics.jsonl"][:2]
    losses[0]["content"], losses[1]["content"] = losses[1]["content"], losses[0]["content"]
    return rows


def _index(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def harm(experiment: Path) -> None:
        file = experiment / packs.INDEX
        file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")

    return harm


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a byte of a part": (lambda folder: _flip(folder / "part-0001.parquet"), r"part-0001\.parquet: .*restore"),
    "a part cut short": (
        lambda folder: (folder / "part-0001.parquet").write_bytes((folder / "part-0001.parquet").read_bytes()[:900]),
        r"cannot be read .*restore the file",
    ),
    "another table": (
        lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "part-0001.parquet"),
        r"cannot be read|none of a run",
    ),
    "streams swapped": (_rewrite(_swap), r"metrics\.jsonl of run \w+ is not what index\.jsonl or its record says"),
    "columns of other lengths": (
        _rewrite(lambda rows: [rows[0] | {"content": b"\x01\x02 \x02\n\x01a\nb\x01a"}, *rows[1:]]),
        r"part-0001\.parquet: .* cannot be put together; restore",
    ),
    "a column that is no base64": (
        _rewrite(lambda rows: [rows[0] | {"content": b"\x01\x02\n\x01\x03AAAAA"}, *rows[1:]]),
        r"cannot be put together; restore",
    ),
    "a name that escapes": (
        _rewrite(lambda rows: [rows[0] | {"file": "../../x"}, *rows[1:]]), r"is none of a run's files",
    ),
    "a run left out": (
        _rewrite(lambda rows: [row for row in rows if row["run"] != rows[0]["run"]]),
        r"is in no part; restore the parts",
    ),
    "a stream left out": (_rewrite(lambda rows: rows[:-1]), r"of run \w+ is missing; restore"),
    "a link to nothing": (
        lambda folder: (folder / "part-0002.parquet").unlink()
        or (folder / "part-0002.parquet").symlink_to(folder / "gone"),
        r"part-0002\.parquet: is no file; restore it",
    ),
    "a part twice": (
        lambda folder: shutil.copy(folder / "part-0001.parquet", folder / "part-0009.parquet"),
        r"part-0009\.parquet: run \w+ is in part-0001\.parquet too",
    ),
    "the index cut": (_index(lambda lines: lines[1:]), r"is not in index\.jsonl"),
    "a line of the index twice": (_index(lambda lines: [*lines, lines[0]]), r"index\.jsonl.* line \d+: damaged"),
    "a hash of the index": (
        _index(lambda lines: [lines[0].replace('"record.json": "', '"record.json": "0'), *lines[1:]]), r"is not what",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_every_change_is_seen_and_its_runs_are_left_out(name: str, both: tuple[Path, Path]) -> None:
    _, packed = both
    whole = len(survey(packed, "commonsense").runs)
    harm, said = HARMS[name]
    harm(packed / "runs" / "commonsense")
    found = survey(packed, "commonsense")
    assert found.left_out and len(found.runs) < whole + (name == "a part twice"), "a table would not know"
    told = "\n".join(lost.why for lost in found.left_out)
    assert re.search(said, told), told
    assert all("\n" not in lost.why for lost in found.left_out)
    assert list(examine(packed))


def test_a_folder_beside_its_packed_run_is_one_run_or_refused(both: tuple[Path, Path]) -> None:
    folders, packed = both
    path = next(path for path, record in survey(folders, "commonsense").runs if record["status"] == "complete")
    whole = len(survey(packed, "commonsense").runs)
    copy = packed / "runs" / "commonsense" / path.name
    shutil.copytree(path, copy)
    assert len(survey(packed, "commonsense").runs) == whole
    assert not list(packs.faults(copy.parent))
    file = copy / "eval.jsonl"
    file.write_text(file.read_text().replace('"n": ', '"n":  ', 1))
    found = survey(packed, "commonsense")
    assert len(found.runs) == whole - 1 and "differs from the packed run" in found.left_out[0].why


def test_a_folder_with_part_of_a_packed_run_is_no_run_without_rows(both: tuple[Path, Path]) -> None:
    folders, packed = both
    done = [path for path, record in survey(folders, "commonsense").runs if record["status"] == "complete"]
    path = next(path for path in done if read_rows(path, "probe"))
    whole = len(survey(packed, "commonsense").runs)
    beside = packed / "runs" / "commonsense" / path.name
    beside.mkdir()
    shutil.copy(path / "eval.jsonl", beside)  # what an interrupted --remove leaves
    assert len(survey(packed, "commonsense").runs) == whole and read_rows(beside, "probe")
    shutil.copy(path / "record.json", beside)
    (left_out,) = survey(packed, "commonsense").left_out
    assert "differs from the packed run of that name; move the folder" in left_out.why


def _unpacked(both: tuple[Path, Path], count: int) -> tuple[Path, list[str]]:
    """The packed experiment where `count` runs are in folders, and never were packed; its folder and their names."""
    folders, packed = both
    shutil.rmtree(packed)
    shutil.copytree(folders, packed)
    experiment = packed / "runs" / "commonsense"
    done = [path.name for path, record in survey(packed, "commonsense").runs if record["status"] == "complete"]
    for run in done[:count]:
        (experiment / run).rename(packed / run)
    _pack(packed, "--remove")
    for run in done[:count]:
        (packed / run).rename(experiment / run)
    return experiment, done[:count]


def _refused(results: Path) -> str:
    told = CliRunner().invoke(app, ["pack", "commonsense", "--results", str(results), "--remove"])
    assert isinstance(told.exception, StoreError | LockedError), told.output
    return str(told.exception)


def test_a_part_that_is_there_is_never_written_again(both: tuple[Path, Path]) -> None:
    experiment, _ = _unpacked(both, 2)
    (experiment / "part-0001.parquet").rename(experiment / "part-0007.parquet")
    before = {part.name: part.read_bytes() for part in experiment.glob("part-*")}
    _pack(both[1], "--remove")
    after = {part.name: part.read_bytes() for part in experiment.glob("part-*")}
    assert before.items() <= after.items() and {*after} - {*before} == {"part-0008.parquet"}
    assert not list(packs.faults(experiment))


def test_nothing_is_packed_where_a_part_is_missing(both: tuple[Path, Path]) -> None:
    experiment, new = _unpacked(both, 2)
    (experiment / "part-0001.parquet").unlink()
    assert re.search(r"index\.jsonl: run \w+ and 3 more are in no part; restore the parts", _refused(both[1]))
    assert all((experiment / run / "record.json").is_file() for run in new)


def test_packing_that_was_interrupted_loses_no_run(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, new = _unpacked(both, 2)
    last = sorted(experiment.glob("part-*"))[-1].name

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packs, "write_text", killed)  # between part and index
        CliRunner().invoke(app, ["pack", "commonsense", "--results", str(both[1]), "--remove"])
    (left,) = {part.name for part in experiment.glob("part-*") if part.name > last}
    told = _refused(both[1])
    assert left in told and told.endswith("where its folder is there (packing was interrupted), delete the part")
    (experiment / left).unlink()
    assert "2 runs packed" in _pack(both[1], "--remove")
    assert not list(packs.faults(experiment)) and not any((experiment / run).exists() for run in new)


def test_one_process_at_a_time_packs_an_experiment(both: tuple[Path, Path]) -> None:
    experiment, new = _unpacked(both, 1)
    held, _ = acquire(experiment / "lock")
    assert "is being written by process" in _refused(both[1])
    held.release()
    assert (experiment / new[0]).is_dir() and "1 runs packed" in _pack(both[1])


def test_what_a_part_would_not_give_back_is_refused_before_it_is_there(both: tuple[Path, Path]) -> None:
    experiment, new = _unpacked(both, 1)
    before = {*experiment.glob("part-*")}
    (experiment / new[0] / "timing.jsonl").write_bytes(b"\x05torn")  # no line end: a stream that was cut off
    assert _refused(both[1]).startswith(f"run {new[0]}: timing.jsonl cannot be packed")
    assert {*experiment.glob("part-*")} == before and not list(packs.faults(experiment))


def test_a_run_whose_part_cannot_be_read_is_not_made_again(both: tuple[Path, Path]) -> None:
    _, packed = both
    path, record = next(run for run in survey(packed, "commonsense").runs if not run[0].exists())
    spec, paths = spec_of(record), Paths(packed)
    path = run_path(packed, spec)
    assert not is_complete(spec, paths)  # of a synthetic record's inputs; made again it would be in a folder beside
    with pytest.raises(StoreError, match="is packed, of inputs that have changed since; choose another --results"):
        RunDir.open(packed, spec)
    assert not path.exists()
    for part in path.parent.glob("part-*"):
        part.write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=r"cannot be read .* restore the file"):
        is_complete(spec, paths)


def test_what_is_committed_is_packed_and_whole() -> None:
    found = survey(COMMITTED)
    assert len(found.runs) >= 163 and not found.left_out
    for path, _ in found.runs[:5]:
        assert verified(path) and read_rows(path, "eval")
    files = [file for file in COMMITTED.rglob("*") if file.is_file() and "local" not in file.parts]
    made = (".pdf", ".data.csv")  # of figures, by `dora-lab report`: git ignores them
    assert sum(file.stat().st_size for file in files if not file.name.endswith(made)) <= 25e6


def test_a_run_that_is_nowhere_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist; is this a run directory"):
        read_record(tmp_path / "runs" / "x" / "0123456789ab")
    told = CliRunner().invoke(app, ["pack", "commonsens", "--results", str(tmp_path)])
    assert "is no results folder" in str(told.exception)


def test_every_run_that_a_committed_table_names_is_among_the_committed_records() -> None:
    """A pattern for the `samples/` of a run once kept a whole experiment of that name out of the repository."""
    there = {path.name for path, _ in survey(COMMITTED).runs}
    for table in sorted((COMMITTED / "tables").glob("*.md")):
        named = re.findall(r"<!-- runs: ([0-9a-f ]*) -->", table.read_text(encoding="utf-8"))
        assert len(named) == 1, table
        assert not {*named[0].split()} - there, table


@pytest.mark.skipif(not (COMMITTED.parent / ".git").exists(), reason="asks git of a clone")
def test_no_experiment_is_called_by_what_git_ignores() -> None:
    places = [f"results/runs/{name}/part-0001.parquet" for name in experiment_names()]
    ignored = subprocess.run(["git", "check-ignore", *places], capture_output=True, text=True, cwd=COMMITTED.parent)
    assert ignored.returncode == 1, ignored.stdout + ignored.stderr
