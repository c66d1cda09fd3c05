"""A run that is killed, cut short or shared ends as one that nothing happened to; see also tests/faults.

DORA_LAB_EVERY_KILL=1 tries every file operation of a save and of a finish instead of every ninth.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Runtime
from dora_lab.runs import checkpoints
from dora_lab.runs.directory import RunDir
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Method, Spec, derive, to_dict
from tests.faults import _crash as crash

pytestmark = pytest.mark.usefixtures("one_thread")
HOUSE = Path(__file__).resolve().parents[1]
STRIDE = 1 if os.environ.get("DORA_LAB_EVERY_KILL") else 9
CASES = {
    "ft": crash.small_spec("ft"),
    "lora": crash.small_spec("lora"),
    "dora": crash.small_spec("dora"),
    "dora bf16": crash.small_spec("dora", model__dtype="bfloat16"),
    "lora best": crash.small_spec(
        "lora", data__validation_items=4, optim__eval_steps=1, optim__keep="best_loss", optim__learning_rate=0.3
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_again_and_again_it_ends_the_same(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    kills = crash.kill_again_and_again(tmp_path, CASES[name], rng, longest=0.6)
    assert kills > 0
    crash.same_as_whole(tmp_path, CASES[name])
    steps = [row["step"] for row in read_stream(run_path(tmp_path, CASES[name]), "metrics") if "loss" in row]
    assert steps == list(range(1, crash.STEPS + 1))


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_killed_again_and_again_end_the_same(tmp_path: Path, shard: bool) -> None:
    kills = crash.kill_again_and_again(tmp_path, CASES["dora"], random.Random(3), longest=1.5, processes=2, shard=shard)
    assert kills > 0
    crash.same_as_whole(tmp_path, CASES["dora"], processes=2, shard=shard)
    record = read_record(run_path(tmp_path, CASES["dora"]))
    assert (record["processes"], record["sharded"], record["status"]) == (2, shard, "complete")


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_go_on_from_a_checkpoint(tmp_path: Path, shard: bool) -> None:
    spec = CASES["dora"]
    pids = crash.start(tmp_path, spec, 2, tmp_path / "errors.txt", shard)
    checkpoint = run_path(tmp_path, spec) / "checkpoints" / "checkpoint-2"
    crash.wait_for(checkpoint.exists, pids, tmp_path / "errors.txt")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        crash.ended(pid)
    crash.same_as_whole(tmp_path, spec, processes=2, shard=shard)
    assert read_record(run_path(tmp_path, spec))["training"]["resumed_from"] in (2, 4)


@pytest.mark.parametrize("window", ["save", "finish"])
def test_killed_at_its_file_operations_it_ends_the_same(window: str, tmp_path: Path) -> None:
    spec = CASES["dora"]
    of = crash.count_or_kill(tmp_path / "count", spec, window, None, 0)
    assert of > 5
    tried = sorted({*range(1, of + 1, STRIDE), of})
    for k in tried:
        crash.count_or_kill(tmp_path / str(k), spec, window, k, seed=k)
        crash.same_as_whole(tmp_path / str(k), spec)
    print(f"{window}: {len(tried)} of {of} file operations tried, all survived")


def test_the_harness_sees_a_save_that_is_not_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without verification, a checkpoint whose file was torn is resumed and the end is another, or none."""

    def believe(folder: Path) -> tuple[Any, None]:
        return json.loads((folder / checkpoints.MANIFEST).read_text()), None

    spec = CASES["dora"]
    crash.begin(tmp_path, spec, crash.kill_me)
    file = run_path(tmp_path, spec) / "checkpoints" / "checkpoint-4" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    crash.reference(spec)
    monkeypatch.setattr(checkpoints, "read_manifest", believe)
    with pytest.raises(AssertionError, match=r"model\.safetensors"):
        crash.same_as_whole(tmp_path, spec)


@pytest.mark.parametrize(("method", "shard"), [("dora", False), ("dora", True), ("lora", True), ("ft", True)])
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, method: str, shard: bool) -> None:
    best = {"data__validation_items": 4, "optim__eval_steps": 1, "optim__keep": "best_loss"}
    spec = crash.small_spec(method, method__dropout=0.0, optim__micro_batch_size=2, **best)
    crash.finish(tmp_path / "one", spec)
    crash.finish(tmp_path / "two", spec, processes=2, shard=shard)
    places = [run_path(tmp_path / name, spec) for name in ("one", "two")]
    one, two = (read_stream(place, "metrics") for place in places)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for name, near in (("tokens", 0.0), ("loss", 1e-4), ("eval_loss", 1e-4), ("grad_norm", 1e-3)):
        values = [[row[name] for row in rows if name in row] for rows in (one, two)]
        assert values[0] and values[0] == pytest.approx(values[1], rel=near)
    for stream in ("probe", "eval"):
        rows = [read_stream(place, stream) for place in places]
        assert len(rows[0]) == len(rows[1]) > 0
    measured = [[row["delta_d"] for row in read_stream(place, "probe")] for place in places]
    assert measured[0] == pytest.approx(measured[1], rel=1e-3)
    saved = [load_file(next((place / "adapter").glob("*.safetensors"))) for place in places]
    assert saved[0].keys() == saved[1].keys()
    for name, weight in saved[0].items():
        torch.testing.assert_close(saved[1][name], weight, rtol=1e-3, atol=1e-5)


def test_a_base_that_is_not_trained_is_not_cut(tmp_path: Path) -> None:
    """The first process evaluates alone: with shares it would wait for the others for ever."""
    spec = replace(crash.small_spec(), method=Method(name="base"), optim=None, probe=None)
    crash.finish(tmp_path, spec, processes=2, shard=True)
    assert read_record(run_path(tmp_path, spec))["sharded"] is False


def test_shares_of_one_process_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start several with torchrun"):
        run_spec(CASES["dora"], crash.paths(tmp_path), Runtime(shard=True))
    assert not any(tmp_path.rglob("record.json"))


def test_micro_batches_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    spec = crash.small_spec("dora", optim__micro_batch_size=8)
    pids = crash.start(tmp_path, spec, 2, tmp_path / "errors.txt")
    assert [crash.ended(pid) for pid in pids] == [1, 1]
    assert "= 1 micro-batches cannot be shared by 2 processes" in (tmp_path / "errors0.txt").read_text()


def test_an_evaluation_goes_on_after_its_whole_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dora_lab.evaluation import evaluate

    spec = crash.small_spec("dora", data__tasks="boolq,ARC-Easy", evaluation__protocols="generate,loglikelihood")
    asked: list[tuple[str, str]] = []
    score = evaluate.answers

    def counted(*arguments: Any) -> Any:
        asked.append((arguments[3].protocol.name, arguments[3].task.name))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(evaluate, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        run_spec(spec, crash.paths(tmp_path))
    assert len(read_stream(run_path(tmp_path, spec), "eval")) == 2
    run_spec(spec, crash.paths(tmp_path))
    wanted = [(protocol, task) for protocol in ("generate", "loglikelihood") for task in ("boolq", "ARC-Easy")]
    assert asked == [*wanted[:3], *wanted[2:]]
    rows = read_stream(run_path(tmp_path, spec), "eval")
    assert [(row["protocol"], row["task"]) for row in rows] == wanted
    crash.finish(tmp_path / "whole", spec)
    whole = run_path(tmp_path / "whole", spec) / "eval.jsonl"
    assert whole.read_bytes() == (run_path(tmp_path, spec) / "eval.jsonl").read_bytes()


SHARE = """
import json, sys
from pathlib import Path
from dora_lab.launch.runtime import Paths
from dora_lab.spec import from_dict
from dora_lab.launch.pool import run_many
specs = [from_dict(given) for given in json.loads(sys.argv[1])]
print(json.dumps([outcome.status for outcome in run_many(specs, Paths(*map(Path, sys.argv[2:])), jobs=1)]))
"""


def test_two_calls_side_by_side_share_the_runs(tmp_path: Path) -> None:
    specs = [crash.small_spec("dora", seed=seed, optim__epochs=12.0) for seed in range(4)]
    places = [str(place) for place in vars(crash.paths(tmp_path)).values()][:3]
    command = [sys.executable, "-c", SHARE, json.dumps([to_dict(spec) for spec in specs]), *places]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HOUSE) for _ in "ab"
    ]
    told = [process.communicate(timeout=300) for process in both]
    statuses = [json.loads(out.splitlines()[-1]) for out, _ in told]
    assert all({*pair} == {"complete", "skipped"} for pair in zip(*statuses, strict=True)), (statuses, told)
    assert "put off, " in told[0][1] + told[1][1] and "is being written by process" in told[0][1] + told[1][1]
    for spec in specs:  # done once: no row twice, no second start
        path = run_path(tmp_path, spec)
        assert len(read_stream(path, "metrics")) == read_record(path)["training"]["steps"]
        assert read_record(path)["training"]["resumed_from"] is None and read_record(path)["notes"] == []


EXPERIMENT = '''"""Small."""
import sys
sys.path[:0] = [{house!r}]
from tests.faults._crash import small_spec
TIERS = ("mini",)
def specs(tier):
    return [small_spec("dora"), small_spec("lora")]
'''


def test_torchrun_runs_the_command_line_over_two_processes(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(EXPERIMENT.format(house=str(HOUSE)))
    places = crash.paths(tmp_path / "results")
    code = (
        "import sys; from pathlib import Path; from dora_lab.__main__ import main; "
        "from dora_lab.launch import experiments; "
        f"experiments.EXPERIMENTS = Path({str(tmp_path)!r}); main()"
    )
    (tmp_path / "go.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = ["--data-dir", str(places.data_dir), "--model-dir", str(places.model_dir), "--results", str(places.results)]
    changed = ["--with", "data.tasks=boolq", "--with", "data.test_items=4"]
    done = subprocess.run(
        [*launch, str(tmp_path / "go.py"), "run", "small", *given, *changed],
        capture_output=True, text=True, cwd=HOUSE, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(HOUSE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 runs: 2 complete") == 1, done.stdout
    records = [read_record(path.parent) for path in (places.results / "runs" / "tiny").glob("*/record.json")]
    assert [(record["status"], record["processes"]) for record in records] == [("complete", 2)] * 2


def test_what_differs_is_named() -> None:
    then = {"spec": {"seed": 1, "optim": {"learning_rate": 0.1}}, "processes": 1}
    now = {"spec": {"seed": 1, "optim": {"learning_rate": 0.2}}, "processes": 2, "steps": 4}
    assert checkpoints.differences(then, now) == [
        "processes was 1, is 2",
        "spec.optim.learning_rate was 0.1, is 0.2",
        "steps was null, is 4",
    ]


def checkpoint(root: Path, step: int, spec: Spec) -> checkpoints.Checkpoints:
    """A checkpoint of one file, in a run that is closed again."""
    with RunDir.open(root, spec) as run:
        found = checkpoints.Checkpoints(run, {"seed": spec.seed})
        with found.writing(step, 0, []) as folder:
            (folder / "weights").write_bytes(bytes(100))
    return found


def test_a_broken_manifest_or_a_foreign_file_is_put_aside(tmp_path: Path) -> None:
    spec = CASES["dora"]
    for fault, harm in {
        "manifest-changed": lambda folder: edit(folder / "manifest.json", '"step": 1', '"step": 2'),
        "manifest-unreadable": lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest-of-another-format": lambda folder: (folder / "manifest.json").write_text('{"spec_id": "x"}'),
        "no-manifest": lambda folder: (folder / "manifest.json").unlink(),
        "scaler.pt-unknown": lambda folder: (folder / "scaler.pt").write_bytes(b"x"),
        "metrics.jsonl-changed": lambda folder: (folder.parents[1] / "metrics.jsonl").unlink(),
    }.items():
        with RunDir.open(tmp_path / fault, spec) as run:
            run.append("metrics", {"step": 1})
        found = checkpoint(tmp_path / fault, 1, spec)
        harm(found.folder / "checkpoint-1")
        with RunDir.open(tmp_path / fault, spec) as run:
            assert checkpoints.Checkpoints(run, {"seed": 0}).newest() is None
            assert any(fault in note for note in read_record(run.path)["notes"])
        assert [path.name for path in (found.folder / "quarantine").iterdir()] == [f"checkpoint-1.{fault}"]


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_quarantine_outlives_the_run_and_keeps_both_of_a_name(tmp_path: Path) -> None:
    spec = CASES["dora"]
    for _ in range(2):
        folder = checkpoint(tmp_path, 3, spec).folder
        (folder / "checkpoint-3" / "weights").write_bytes(b"other")
        with RunDir.open(tmp_path, spec) as run:
            assert checkpoints.Checkpoints(run, {"seed": 0}).newest() is None
    checkpoints.clear(folder)
    left = sorted(path.name for path in (folder / "quarantine").iterdir())
    assert left == ["checkpoint-3.weights-changed", "checkpoint-3.weights-changed.2"]


def test_a_run_whose_data_is_not_given_keeps_what_it_has(tmp_path: Path) -> None:
    from dataclasses import replace

    from dora_lab.io.errors import LoadError
    from dora_lab.runs.errors import ResumeError

    spec = CASES["lora"]
    without = replace(crash.paths(tmp_path), data_dir=None)
    crash.begin(tmp_path, spec, crash.kill_me)
    for _ in range(2):
        with pytest.raises(ResumeError, match="data"):
            run_spec(spec, without)
        assert read_record(run_path(tmp_path, spec))["status"] == "interrupted"
    crash.same_as_whole(tmp_path, spec)
    assert read_record(run_path(tmp_path, spec))["training"]["resumed_from"] == 4
    with pytest.raises(LoadError):
        run_spec(spec, replace(without, results=tmp_path / "new"))
    assert read_record(run_path(tmp_path / "new", spec))["status"] == "failed"


def test_code_that_changed_under_a_run_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dora_lab.runs import provenance

    spec = CASES["lora"]
    crash.begin(tmp_path, spec, crash.kill_me)
    monkeypatch.setattr(provenance, "code", lambda: {"commit": "0" * 40, "diff": None})
    run_spec(spec, crash.paths(tmp_path))
    notes = read_record(run_path(tmp_path, spec))["notes"]
    assert any(note.startswith("went on with other code, packages or machine: code.commit was") for note in notes)


def test_a_stopped_run_is_not_behind_its_checkpoint(tmp_path: Path) -> None:
    """The checkpoint's marks are of the streams as they are at its step: nothing is lost between them."""
    spec = derive(CASES["dora"], {"optim.epochs": 3.0})
    crash.begin(tmp_path, spec, crash.kill_me, at=9)
    path = run_path(tmp_path, spec)
    manifest, _ = checkpoints.read_manifest(path / "checkpoints" / "checkpoint-8")
    assert manifest is not None
    lines = (path / "metrics.jsonl").read_bytes()[: manifest["streams"]["metrics"]["bytes"]].splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize(
    ("others", "asked", "code"),
    [(True, "list", 0), (True, "run no_such_experiment", 2), (False, "list", -signal.SIGABRT)],
)
def test_a_process_of_several_ends_before_its_interpreter_does(others: bool, asked: str, code: int) -> None:
    """What aborts at the interpreter's end, as a group's threads do now and then, reaches a process alone, no other."""
    code_of_main = "import atexit, os; from dora_lab.__main__ import main; atexit.register(os.abort); main()"
    done = subprocess.run(
        [sys.executable, "-c", code_of_main, *asked.split()],
        capture_output=True, text=True, cwd=HOUSE, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(HOUSE), **({"RANK": "0", "WORLD_SIZE": "2"} if others else {})},
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    assert "commonsense" in (done.stderr if code == 2 else done.stdout)
