"""The command line as people meet it: tables on a terminal and in a pipe, wrong names, how a command ends."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_spec, write_run
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.commands import results as room
from dora_lab.commands.app import find_run
from dora_lab.commands.ending import ASKED, MACHINE, OURS, run_to_end, told
from dora_lab.house import HOUSE, RESULTS
from dora_lab.launch.experiments import experiment_names, load_experiment
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import SpecError, derive, spec_id


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The results folders of a user and of the lab; the user has one seed of two."""
    root = tmp_path_factory.mktemp("two")
    for name, seeds in (("mine", (0,)), ("theirs", (0, 1))):
        for seed in seeds:
            write_run(root / name, make_spec("dora", 8, seed))
    return root / "mine", root / "theirs"


def compared(two: tuple[Path, Path], *more: str) -> Any:
    return CliRunner().invoke(app, ["compare", "--results", str(two[0]), "--committed", str(two[1]), *more])


def dora_lab(*arguments: object, **changes: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dora_lab", *map(str, arguments)]
    place = {"env": os.environ | {"PYTHONPATH": str(HOUSE)} | changes.pop("env", {})} | changes
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **place)


def on_a_terminal(*arguments: object) -> str:
    """What a command prints on a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "dora_lab", *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=theirs,
        stderr=theirs, cwd=HOUSE, env=environment | {"TERM": "xterm-256color", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    process.wait(timeout=60)
    return said.decode()


def test_one_answer_in_four_forms(two: tuple[Path, Path]) -> None:
    text = compared(two)
    assert text.exit_code == 1 and "missing (1 of 2; the others:" in text.stdout
    assert all(len(line) <= 100 for line in text.stdout.splitlines()[:-2])  # the notes are sentences
    rows = json.loads(compared(two, "--format", "json").stdout)
    table = list(csv.DictReader(io.StringIO(compared(two, "--format", "csv").stdout)))
    assert [row["method"] for row in rows] == [row["method"] for row in table] == ["dora rank 8"] * 2
    assert {row["agreement"] for row in rows} == {"missing"} and table[0]["runs"] == "1"
    assert float(table[0]["local"]) == pytest.approx(rows[0]["local"], abs=1e-9)
    page = compared(two, "--format", "md").stdout
    assert "| dora rank 8 | generate | 1/2 |" in page


def test_mine_stand_beside_theirs_task_by_task(two: tuple[Path, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, make_spec("lora", 4, seed))  # no committed run is like these
    shutil.copytree(two[0], tmp_path, dirs_exist_ok=True)
    rows = json.loads(compared((tmp_path, two[1]), "--tasks", "--format", "json").stdout)
    lines = {(row["method"], row["whose"]): row for row in rows if row.get("protocol") == "generate" and "whose" in row}
    counts = {key: row["runs"] for key, row in lines.items()}
    assert counts == {("dora rank 8", "yours"): 1, ("dora rank 8", "committed"): 2, ("lora rank 4", "yours"): 2}
    scores = [
        [row["value"] for row in read_stream(find_run(run_id, two[1]), "eval")
         if row["protocol"] == "generate" and row["task"] == "boolq"]
        for run_id in (spec_id(make_spec("dora", 8, seed)) for seed in (0, 1))
    ]  # fmt: skip
    assert lines["dora rank 8", "committed"]["BoolQ"] == pytest.approx(sum(map(sum, scores)) / 2)
    text = compared((tmp_path, two[1]), "--tasks").stdout
    assert "dora rank 8 yours" in " ".join(text.split()) and "dora rank 8 committed" in " ".join(text.split())


def test_colour_on_a_terminal_and_never_in_a_pipe(two: tuple[Path, Path]) -> None:
    asked = ["compare", "--results", two[1], "--committed", two[1]]
    assert "\x1b[32msame bytes" in on_a_terminal(*asked)
    assert "\x1b" not in dora_lab(*asked, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).stdout


def test_a_narrow_encoding_is_written_in_words(two: tuple[Path, Path]) -> None:
    done = dora_lab("verify", "commonsense", "--results", two[1], env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0, done.stderr
    assert "Delta D and Delta M" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "comonsense"], "did you mean 'commonsense'?"),
        (["compare", "comonsense", "--results", "there"], "did you mean 'commonsense'?"),
        (["run", "commonsense-sweeep", "--dry-run"], "did you mean 'commonsense_sweep'?"),
        (["reproduce", "decompositoin"], "did you mean 'decomposition'?"),
        (["pack", "comonsense", "--results", "there"], "did you mean 'commonsense'?"),
        (["verify", "--results", "thre"], "did you mean 'there'?"),
        (["verify", "--results", "there/runs/commonsense"], "there?"),
        (["run", "commonsense", "--dry-run", "--only", "method=dora", "--with", "method.target_modules=q_prj"],
         "'q_prj' is no linear layer here; did you mean 'q_proj'?"),
        (["run", "commonsense", "--dry-run", "--with", "data.tasks=bolq"], "did you mean 'boolq'?"),
        (["doctor", "thre"], "did you mean 'there'?"),
        (["card", "zz"], "none is that; there are"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_told_with_the_near_ones(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "there", make_spec("lora", 8, 0))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ValueError) and words in str(done.exception), done


def test_a_near_run_is_named(tmp_path: Path) -> None:
    name = write_run(tmp_path, make_spec("lora", 8, 0)).name
    with pytest.raises(SpecError, match=f"did you mean {name[:5]}"):
        find_run(f"{name[:4]}x", tmp_path)


def test_an_empty_answer_says_what_there_is() -> None:
    assert "they are about commonsense" in CliRunner().invoke(app, ["verify", "sign"]).stdout
    rows = json.loads(CliRunner().invoke(app, ["verify", "sign", "--format", "json"]).stdout)
    assert rows == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (SpecError("seed = -1"), ASKED, "seed = -1"),
        (OverflowError("too large"), ASKED, "too large"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there.json"), MACHINE, "there.json: No space left"),
        (OSError("no name, no number"), MACHINE, "no name, no number"),
        (MemoryError(), MACHINE, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), MACHINE, "(CUDA)"),
        (KeyError("inner"), OURS, "report"),
        (RuntimeError("inner"), OURS, "report"),
    ],
)
def test_what_an_error_becomes(error: Exception, code: int, words: str) -> None:
    text, found = told(error)
    assert found == code and words in text and "\n" not in text


def test_a_fault_of_ours_keeps_its_traceback_and_others_have_none(tmp_path: Path) -> None:
    code = "from dora_lab.commands.ending import run_to_end; run_to_end(lambda: {}['inner'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE)
    assert done.returncode == OURS and "KeyError: 'inner'" in done.stderr and "please report" in done.stderr
    (tmp_path / "file").touch()
    run = write_run(tmp_path, make_spec("lora", 8, 0))
    done = dora_lab("card", run, "--out", tmp_path / "file" / "card.md")
    assert done.returncode == MACHINE and done.stderr.count("\n") == 1 and "Not a directory" in done.stderr


def test_an_error_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise ValueError("no module '\x1b]0;title\x07q_proj'")

    with pytest.raises(SystemExit):
        run_to_end(wrong)
    assert capsys.readouterr().err == "error: no module '\\x1b]0;title\\x07q_proj'\n"


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dora_lab", "list"], stdout=full, stderr=subprocess.PIPE, cwd=HOUSE
        )
    assert (done.returncode, done.stderr.decode()) == (MACHINE, "error: No space left on device\n")


def test_every_command_shows_two_examples_that_it_takes() -> None:
    names = re.findall(r"^│ ([a-z-]+) ", CliRunner().invoke(app, ["--help"]).output.split("Commands")[1], re.M)
    assert len(names) > 10
    for name in names:
        told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "160"}).output
        shown = re.findall(rf"dora-lab ({name}\b.*)", told.partition("Examples:")[2])
        assert len(shown) == 2, (name, told)
        for option in re.findall(r"--[a-z-]+", " ".join(shown)):
            assert option in told.partition("Examples:")[0], (name, option)


def test_the_version_and_the_exit_codes_are_said() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("dora-lab ")
    told = CliRunner().invoke(app, ["--help"]).output
    assert "Exit codes" in told and "--install-completion" in told


def test_the_shell_completes_experiments() -> None:
    asked = {"_DORA_LAB_COMPLETE": "complete_bash", "COMP_WORDS": "dora-lab run comm", "COMP_CWORD": "2"}
    code = "import sys; sys.argv[0] = 'dora-lab'; from dora_lab.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE, env=os.environ | asked
    )
    assert done.stdout.split() == [name for name in experiment_names() if name.startswith("comm")]


@pytest.mark.parametrize(("arguments", "quick"), [([], ""), (["--quick"], ""), ([], "1")])
def test_reproduce_quick(arguments: list[str], quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(room, "run_many", lambda specs, *more, **options: asked.extend(specs) or [])
    monkeypatch.setattr(room, "rebuild", lambda results: True)
    compared: list[set[str]] = []
    monkeypatch.setattr(room, "told_apart", lambda *more, only: compared.append(only))
    done = CliRunner().invoke(
        app, ["reproduce", "commonsense-sweep", "--results", str(tmp_path), *arguments], env={"QUICK": quick}
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.startswith(f"{len(asked)} runs: some ") and "minutes of one core" in done.output
    assert compared == [{spec_id(spec) for spec in asked}]
    whole = load_experiment("commonsense_sweep").specs("mini")
    settings = {spec.optim.learning_rate if spec.optim else None: 0 for spec in whole}
    assert {spec.optim.learning_rate if spec.optim else None: 0 for spec in asked} == settings
    assert len({spec.seed for spec in asked}) == 1 or not (arguments or quick)
    if not (arguments or quick):
        assert len(asked) == len(whole)


def test_reproduce_all_says_first_how_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(room, "run_many", lambda specs, *more, **options: asked.extend(specs) or [])
    monkeypatch.setattr(room, "rebuild", lambda results: True)
    monkeypatch.setattr(room, "told_apart", lambda *more, only: None)
    done = CliRunner().invoke(app, ["reproduce", "all", "--results", str(tmp_path)])
    assert done.exit_code == 0, (done.output, done.exception)
    every = {name: load_experiment(name) for name in experiment_names()}
    assert {spec.experiment for spec in asked} >= {name for name, module in every.items() if "mini" in module.TIERS} - {
        "visual_instruction", "image_text_decay"
    }  # fmt: skip
    assert re.match(rf"{len(asked)} runs \(capacity 104, .*\): some \d+ hours of one core", done.output)


def test_how_long_runs_take_is_what_the_committed_ones_took(tmp_path: Path) -> None:
    """Two runs of commonsense by hand, a third that nobody has made as long as their mean."""
    module = load_experiment("commonsense")
    made = [spec for spec in module.reproduced() if spec.optim is not None][:2]
    third = derive(made[0], {"seed": 77})
    took = [sum(read_record(run_path(RESULTS, spec))["seconds"].values()) for spec in made]
    said = room.announced({"commonsense": [*made, third]})
    assert said == f"3 runs: some {1.5 * sum(took) / 60:.0f} minutes of one core, as the committed ones took"
    none = room.announced({"commonsense": made}, tmp_path)
    assert none.endswith("how long 2 of them last is not known")


@pytest.mark.parametrize("option", ["--tokens=-5", "--jobs=0", "--threads=0"])
def test_a_number_that_nothing_can_have_is_refused(option: str) -> None:
    done = CliRunner().invoke(app, ["run", "commonsense", "--dry-run", option])
    assert done.exit_code == 2 and option.partition("=")[0] in done.output and "Invalid value" in done.output, (
        done.output
    )
    assert "FLOP" not in done.output
