"""What a complete run keeps beside its record, samples and adapter, is held to its hashes by whoever reads it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file, save_file
from tiny import make_spec
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.commands import run as running
from dora_lab.launch.experiments import published_specs
from dora_lab.launch.pool import Outcome
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.report import card, peft_comparison
from dora_lab.runs import doctor, packs
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.survey import survey, verified

SPEC = make_spec(optim__epochs=0.4, probe=None)
SAMPLES, ADAPTER = "samples/boolq.generate.jsonl", "adapter/adapter_model.safetensors"


def hashed(run: Path) -> dict[str, str]:
    """The oracle: every file below the run but its record and streams, by Python's own hashlib."""
    files = (file for file in run.rglob("*") if file.is_file() and file.name not in packs.FILES)
    return {file.relative_to(run).as_posix(): sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of one complete run."""
    results = tmp_path_factory.mktemp("kept")
    assert run_spec(SPEC, Paths(results, inputs / "data", inputs / "model")) == "complete"
    return results


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be harmed."""
    shutil.copytree(made, tmp_path / "results")
    return run_path(tmp_path / "results", SPEC)


def test_every_file_of_a_complete_run_is_in_its_record(run: Path) -> None:
    record = read_record(run)
    assert record["files"] == hashed(run)
    assert {SAMPLES, ADAPTER, "adapter/adapter_config.json", "adapter/dora_lab.json"} <= set(record["files"])
    assert verified(run, "samples", "adapter") == record and not list(doctor.examine(run))


def texts(run: Path) -> None:
    """Other texts with the same answers: by the scores alone nobody would know."""
    file = run / SAMPLES
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"output": " " + row["output"]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def factors(run: Path) -> None:
    """Other factors, with a manifest that fits them."""
    file, manifest = run / ADAPTER, run / "adapter" / "dora_lab.json"
    weights = {name: W + 0.1 if "lora_B" in name else W for name, W in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    told = json.loads(manifest.read_text())
    told["files"][file.name] = sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(told))


def answers(run: Path) -> None:
    """Other answers, with the value that follows from them."""
    file = run / "eval.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] |= {"correct": "1" * rows[0]["n"], "value": 1.0}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "samples": (texts, f"{SAMPLES}: is not what it was"),
    "samples lost": (lambda run: (run / SAMPLES).unlink(), f"{SAMPLES}: is missing"),
    "adapter": (factors, f"{ADAPTER}: is not what it was"),
    "adapter lost": (lambda run: (run / ADAPTER).unlink(), f"{ADAPTER}: is missing"),
    "eval": (answers, "eval.jsonl: is not what it was"),
}


def readers(base: Path) -> dict[str, list[str]]:
    """The commands that read a run, by what they read of it."""
    return {
        "card RUN": ["eval"],
        "card RUN --peft": ["eval"],
        "diff RUN published": ["eval"],
        "rescore RUN": ["eval", "samples"],
        f"probe {base} RUN": ["eval", "adapter"],
    }


@pytest.mark.parametrize("harm", HARMS)
def test_what_has_changed_is_refused_by_every_reader_of_it(harm: str, run: Path, inputs: Path) -> None:
    do, words = HARMS[harm]
    for command in readers(inputs / "model"):
        assert invoke(command, run)[0] == 0, f"{command} cannot read the run as it was"
    do(run)
    for command, parts in readers(inputs / "model").items():
        code, told = invoke(command, run)
        refused = harm.partition(" ")[0] in parts
        assert (code != 0, words in told) == (refused, refused), (command, told)
    found = list(doctor.examine(run))
    assert words in {f"{one.where.relative_to(run)}: {one.what}"[: len(words)] for one in found}
    assert all("again" in one.mend for one in found)
    assert len(survey(run.parents[2]).runs) == (harm != "eval"), "tables read the streams alone"


def invoke(command: str, run: Path) -> tuple[int, str]:
    words = [str(run) if word == "RUN" else word for word in command.split()]
    done = CliRunner().invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit | ValueError), done.exception
    return done.exit_code, f"{done.output}{done.exception or ''}"


def test_readers_without_a_command_refuse_as_well(run: Path) -> None:
    answers(run)
    for read in (
        lambda: card.card(run),
        lambda: card.diff(run, published_specs()[0]),
        lambda: peft_comparison.comparison(run),
        lambda: running.summary([Outcome(SPEC, "complete")], run.parents[2]),
    ):
        with pytest.raises(StoreError, match=r"eval\.jsonl: is not what it was"):
            read()


def test_a_complete_run_that_has_changed_is_no_skipped_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`run` says which and why, prints no score of it, counts it apart and ends with 1."""
    outcomes = [Outcome(SPEC, "skipped")]
    running.tell(outcomes, run.parents[2])
    told = capsys.readouterr().out
    assert "1 runs: 1 skipped" in told and " %" in told
    answers(run)
    with pytest.raises(typer.Exit) as ended:
        running.tell(outcomes, run.parents[2])
    told = capsys.readouterr().out
    assert ended.value.exit_code == 1 and "1 runs: 1 damaged" in told and " %" not in told
    assert "eval.jsonl: is not what it was" in told


def test_records_travel_without_what_is_kept(run: Path, inputs: Path) -> None:
    """Packed or copied alone, a run is whole; samples and adapter beside a packed record are held to it."""
    results = run.parents[2]
    assert CliRunner().invoke(app, ["pack", "tiny", "--results", str(results), "--remove"]).exit_code == 0
    assert not (run / "record.json").exists() and (run / ADAPTER).is_file()
    assert invoke(f"probe {inputs / 'model'} RUN", run)[0] == 0
    factors(run)
    code, told = invoke(f"probe {inputs / 'model'} RUN", run)
    assert code == 2 and f"{ADAPTER}: is not what it was" in told
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "samples")
    assert verified(run, "samples", "adapter")["files"] and not list(doctor.examine(results))


def test_a_record_that_names_no_files_holds_nothing_to_it(run: Path) -> None:
    """Those of early versions; nothing that they lack is made up."""
    record = read_record(run)
    del record["files"]
    (run / "record.json").write_text(json.dumps(record))
    texts(run)
    assert verified(run, "samples") == record and invoke("rescore RUN", run)[0] == 0


@pytest.mark.parametrize("name", ["samples/../../../x", "samples//dev/zero", "adapter/", "adapter/a/b"])
def test_a_record_cannot_name_a_file_elsewhere(name: str, run: Path) -> None:
    record = read_record(run)
    (run / "record.json").write_text(json.dumps(record | {"files": {name: "0" * 64}}))
    with pytest.raises(StoreError, match="names a file outside its folder"):
        verified(run, "samples", "adapter")


def test_a_run_that_has_not_ended_well_names_no_files(inputs: Path, tmp_path: Path) -> None:
    """Its samples are still being written."""
    stop = threading.Event()
    stops = Runtime(
        stop=stop, progress=lambda phase, done, *_: stop.set() if (phase, done) == ("evaluate", 3) else None
    )
    paths = Paths(tmp_path, inputs / "data", inputs / "model")
    with pytest.raises(KeyboardInterrupt):
        run_spec(SPEC, paths, stops)
    path = run_path(tmp_path, SPEC)
    assert (path / SAMPLES).exists() and "files" not in read_record(path)
    assert run_spec(SPEC, paths) == "complete" and read_record(path)["files"] == hashed(path)
