"""Runs from spec to directory, several at once, and the command line around them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tiny import boolq_items, make_spec, save_data
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab.commands.run import summary
from dora_lab.launch import experiments, stages
from dora_lab.launch.experiments import load_experiment
from dora_lab.launch.inputs import is_complete
from dora_lab.launch.pool import run_many
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import TIERS, Paths, Runtime
from dora_lab.launch.select import chosen
from dora_lab.models.base import hash_model
from dora_lab.runs import provenance
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import iter_runs
from dora_lab.spec import Method, Spec, SpecError
from dora_lab.tasks import ItemError, sources
from dora_lab.training import trainer
from dora_lab.training.fit import Interrupted

HOUSE = Path(__file__).resolve().parents[1]


@pytest.fixture
def paths(inputs: Path, tmp_path: Path) -> Paths:
    return Paths(tmp_path, inputs / "data", inputs / "model")


def base_spec() -> Spec:
    return replace(make_spec(), method=Method(name="base"), optim=None, probe=None)


def stopped(when: Callable[[str, int], bool]) -> Runtime:
    """A runtime that asks its run to stop at a phase and a number of steps."""
    stop = threading.Event()
    return Runtime(stop=stop, progress=lambda phase, done, *_: stop.set() if when(phase, done) else None)


def test_pipeline_end_to_end(paths: Paths) -> None:
    spec = make_spec()
    assert run_spec(spec, paths) == "complete"
    path = run_path(paths.results, spec)
    record = read_record(path)
    assert record["status"] == "complete" and record["error"] is None
    assert record["params"]["trainable"] < record["params"]["total"]
    assert record["training"]["steps"] == 20
    assert record["inputs"]["items"]["train"] == {"boolq": 40}
    assert len(record["inputs"]["model"]["sha256"]) == len(record["inputs"]["data"]["sha256"]) == 64
    assert set(record["seconds"]) == {"load", "train", "evaluate"}
    assert record["peak_memory_bytes"] > 1e8
    assert {"torch", "transformers", "lm_eval"} <= set(record["packages"])
    assert {"commit", "diff"} == set(record["code"])
    assert [row["step"] for row in read_stream(path, "metrics")] == list(range(1, 21))
    probes = read_stream(path, "probe")
    assert {row["step"] for row in probes} == {5, 10, 15, 20} and len(probes) == 4 * 2 * 7
    assert len(read_stream(path, "eval")) == 4
    assert (path / "adapter" / "adapter_model.safetensors").exists() and not (path / "checkpoints").exists()
    moved = [row["delta_d"] for row in probes if row["kind"] == "q_proj" and row["step"] == 20]
    still = [row["delta_d"] for row in probes if row["kind"] == "o_proj"]
    assert all(value > 0 for value in moved) and all(value == 0 for value in still)
    before = path.stat().st_mtime_ns, (path / "record.json").read_bytes()
    assert run_spec(spec, paths) == "skipped"
    assert before == (path.stat().st_mtime_ns, (path / "record.json").read_bytes())


def test_the_same_spec_gives_the_same_numbers(paths: Paths, tmp_path: Path) -> None:
    again = replace(paths, results=tmp_path / "again")
    for where in (paths, again):
        run_spec(make_spec(), where)
    for stream in ("eval", "probe"):
        one, two = (read_stream(run_path(where.results, make_spec()), stream) for where in (paths, again))
        assert one == two


def test_base_is_evaluated_without_training(paths: Paths) -> None:
    run_spec(base_spec(), paths)
    path = run_path(paths.results, base_spec())
    assert read_record(path)["params"]["trainable"] == 0
    assert read_stream(path, "metrics") == read_stream(path, "probe") == []
    assert len(read_stream(path, "eval")) == 4


def test_interrupted_run_goes_on(paths: Paths) -> None:
    spec = make_spec()
    with pytest.raises(Interrupted):
        run_spec(spec, paths, stopped(lambda _, done: done == 7))
    path = run_path(paths.results, spec)
    assert read_record(path)["status"] == "interrupted"
    run_spec(spec, paths)
    assert read_record(path)["training"]["resumed_from"] == 8
    assert [row["step"] for row in read_stream(path, "metrics")] == list(range(1, 21))


def test_run_interrupted_while_evaluating_does_not_train_again(paths: Paths, tmp_path: Path) -> None:
    spec = make_spec()
    with pytest.raises(KeyboardInterrupt):
        run_spec(spec, paths, stopped(lambda phase, _: phase == "evaluate"))
    run_spec(spec, paths)
    path = run_path(paths.results, spec)
    assert read_record(path)["training"]["resumed_from"] == 20
    whole = replace(paths, results=tmp_path / "whole")
    run_spec(spec, whole)
    assert read_stream(path, "eval") == read_stream(run_path(whole.results, spec), "eval")


def test_a_tier_says_where_a_run_computes_unless_it_is_told(paths: Paths, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for number, (tier, runtime, threads) in enumerate(
            [("mini", Runtime(), 1), ("small", Runtime(), 3), ("small", Runtime(threads=2), 2)]
        ):
            spec, where = replace(base_spec(), tier=tier), replace(paths, results=tmp_path / str(number))
            run_spec(spec, where, runtime)
            record = read_record(run_path(where.results, spec))
            assert (record["device"], record["threads"]) == ("cpu", threads)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_table_of_tiers() -> None:
    cores = provenance.cores()
    assert tuple(TIERS) == get_args(get_type_hints(Spec)["tier"])
    assert {tier: Runtime().of(tier).jobs for tier in TIERS} == {"mini": cores, "small": 1, "paper": 1}
    assert Runtime().of("paper").device == "cuda" and Runtime(device="cpu").of("paper").device == "cpu"
    assert Runtime(threads=cores).of("mini").jobs == Runtime(device="cuda").of("mini").jobs == 1
    for wrong, words in (
        ({"threads": 0}, "threads = 0 must be"),
        ({"device": "gpu"}, "device 'gpu' must be one of cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            Runtime(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_costs_no_run_what_it_has(paths: Paths) -> None:
    spec = make_spec()
    with pytest.raises(Interrupted):
        run_spec(spec, paths, stopped(lambda _, done: done == 7))
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        run_spec(spec, paths, Runtime(device="cuda"))
    assert read_record(run_path(paths.results, spec))["status"] == "interrupted"
    run_spec(spec, paths, Runtime(threads=2))
    record = read_record(run_path(paths.results, spec))
    assert record["threads"] == 2 and record["training"]["resumed_from"] == 8
    assert record["notes"] == ["went on with other code, packages or machine: threads was 1, is 2"]


def test_failed_run_says_why_and_starts_anew(paths: Paths) -> None:
    spec = make_spec(method__rank=500)
    for _ in range(2):
        with pytest.raises(ValueError, match="rank = 500"):
            run_spec(spec, paths)
    record = read_record(run_path(paths.results, spec))
    assert record["status"] == "failed" and "rank = 500 must be in 1 .. 32" in record["error"]


@pytest.mark.parametrize("where", ["save_trained", "merge", "evaluate"])
def test_an_error_after_training_keeps_the_training(
    where: str, paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = make_spec(), replace(paths, results=tmp_path / "whole")
    with monkeypatch.context() as broken:
        for words in ("no memory", "again none"):
            broken.setattr(stages, where, raiser(words))
            with pytest.raises(RuntimeError, match=words):
                run_spec(spec, paths)
            record = read_record(run_path(paths.results, spec))
            assert (record["status"], record["error"]) == ("interrupted", f"RuntimeError: {words}")
        broken.setattr(stages, "model_and_tokenizer", raiser("not even a model"))
        with pytest.raises(RuntimeError, match="not even"):
            run_spec(spec, paths)
    run_spec(spec, paths)
    record = read_record(run_path(paths.results, spec))
    assert record["status"] == "complete" and record["training"]["resumed_from"] == 20 and "trained" not in record
    run_spec(spec, whole)
    for stream in ("metrics", "probe", "eval"):
        found = (run_path(place.results, spec) / f"{stream}.jsonl" for place in (paths, whole))
        assert next(found).read_bytes() == next(found).read_bytes()


def raiser(words: str) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError(words)

    return broken


def test_an_error_while_training_still_fails_the_run(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    monkeypatch.setattr(trainer.RunTrainer, "refuse_weights", raiser("a weight is nan"))
    with pytest.raises(RuntimeError):
        run_spec(spec, paths)
    assert read_record(run_path(paths.results, spec))["status"] == "failed"


def test_what_the_evaluation_cannot_take_is_told_before_training(paths: Paths, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    items = boolq_items(6, start=1000)
    items[4]["instruction"] = "red " * 600 + items[4]["instruction"]
    (data / "boolq" / "test.json").write_text(json.dumps(items))
    spec = make_spec()
    with pytest.raises(ItemError, match=r"boolq, item 4: a prompt of \d+ tokens"):
        run_spec(spec, replace(paths, data_dir=data))
    assert not read_stream(run_path(tmp_path, spec), "metrics")
    assert read_record(run_path(tmp_path, spec))["status"] == "failed"
    items[4]["instruction"] = "\ud800 " + items[3]["instruction"]
    (data / "boolq" / "test.json").write_text(json.dumps(items))
    with pytest.raises(
        ItemError, match=r"test.json, item 4, field 'instruction': half a character .*d800.* at place 0"
    ):
        run_spec(spec, replace(paths, data_dir=data))


def test_a_rate_that_never_leaves_zero_is_refused(paths: Paths) -> None:
    idle = make_spec(optim__epochs=0.1, optim__warmup_steps=3)
    with pytest.raises(SpecError, match=r"warmup_steps = 3: training has 1 step, all of learning rate 0"):
        run_spec(idle, paths)
    assert not read_stream(run_path(paths.results, idle), "metrics")
    late = make_spec(optim__epochs=1.0, optim__warmup_steps=10)
    run_spec(late, paths)
    path = run_path(paths.results, late)
    best = max(row["learning_rate"] for row in read_stream(path, "metrics"))
    (note,) = read_record(path)["notes"]
    assert note.endswith(f"5 steps, the learning rate reaches {best:g} of optim.learning_rate = 0.005")
    early = make_spec(optim__eval_steps=6, optim__keep="best_loss", data__validation_items=8, optim__epochs=1.0)
    with pytest.raises(SpecError, match=r"eval_steps = 6: training has 4 steps"):
        run_spec(early, paths)


def test_complete_run_of_other_inputs_is_replaced(paths: Paths, tmp_path: Path) -> None:
    data = save_data(tmp_path / "data")
    spec, own = base_spec(), replace(paths, data_dir=data)
    run_spec(spec, own)
    assert is_complete(spec, own)
    (data / "boolq" / "test.json").write_text(json.dumps(boolq_items(7)))
    assert not is_complete(spec, own)
    run_spec(spec, own)
    assert read_stream(run_path(tmp_path, spec), "eval")[0]["n"] == 7


def test_run_many_skips_records_failures_and_goes_on(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    specs = [base_spec(), make_spec(method__rank=500), make_spec()]
    outcomes = run_many(specs, paths, jobs=2)
    assert [outcome.status for outcome in outcomes] == ["complete", "failed", "complete"]
    assert "rank = 500" in (outcomes[1].error or "")
    assert "[3/3]" in capfd.readouterr().err
    again = run_many([specs[0], specs[2]], paths, jobs=2)
    assert [outcome.status for outcome in again] == ["skipped", "skipped"]
    text = summary(outcomes, paths.results)
    assert "3 runs: 2 complete, 1 failed" in text and "generate" in text


def start(paths: Paths, specs: list[Spec]) -> subprocess.Popen[str]:
    """`run_many` in a process of its own, which can be sent signals."""
    from dora_lab.spec import to_dict

    code = (
        "import json, sys; from pathlib import Path; from dora_lab.launch.runtime import Paths\n"
        "from dora_lab.spec import from_dict; from dora_lab.launch.pool import run_many\n"
        "specs = [from_dict(s) for s in json.loads(sys.argv[1])]\n"
        "print([o.status for o in run_many(specs, Paths(*map(Path, sys.argv[2:])), jobs=1)])\n"
    )
    places = [str(place) for place in vars(paths).values() if place is not None]
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps([to_dict(spec) for spec in specs]), *places],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HOUSE,
    )  # fmt: skip


def wait_for_steps(paths: Paths, spec: Spec, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(read_stream(run_path(paths.results, spec), "metrics")) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not begin")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_interrupts_and_the_next_call_resumes(number: signal.Signals, paths: Paths) -> None:
    long = make_spec(optim__epochs=400.0)
    process = start(paths, [long, make_spec(seed=1)])
    wait_for_steps(paths, long, 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=90)
    assert out.strip() == "['interrupted', 'interrupted']", err
    record = read_record(run_path(paths.results, long))
    assert record["status"] == "interrupted"
    assert not run_path(paths.results, make_spec(seed=1)).exists()
    steps = len(read_stream(run_path(paths.results, long), "metrics"))
    with pytest.raises(Interrupted):
        run_spec(long, paths, stopped(lambda _, done: done > steps + 2))
    rows = read_stream(run_path(paths.results, long), "metrics")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > steps


def test_killed_worker_is_reported_and_the_others_go_on(paths: Paths) -> None:
    long, short = make_spec(optim__epochs=400.0), make_spec(seed=1)
    process = start(paths, [long, short])
    wait_for_steps(paths, long, 3)
    owner = json.loads((run_path(paths.results, long) / "lock").read_text())
    os.kill(owner["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert out.strip() == "['interrupted', 'complete']", err
    assert "signal 9" in err


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "lm_eval", "datasets", "pandas", "scipy", "matplotlib"}
    code = f"import sys, dora_lab.__main__; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE, check=True)
    assert done.stdout.strip() == "[]"


EXPERIMENT = """\"\"\"A tiny experiment for the tests.\"\"\"
import sys
sys.path.insert(0, {tests!r})
from tiny import make_spec
from dataclasses import replace
from dora_lab.spec import Method
TIERS = ("mini",)
def specs(tier):
    base = replace(make_spec(), method=Method(name="base"), optim=None, probe=None)
    return [base] + [make_spec(seed=s, method__rank=r) for r in (2, 4) for s in (0, 1)]
"""


@pytest.fixture
def tiny_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "tiny_one.py").write_text(EXPERIMENT.format(tests=str(Path(__file__).parent)))
    monkeypatch.setattr(experiments, "EXPERIMENTS", folder)
    return load_experiment("tiny_one")


def test_only_selects(tiny_experiment: Any) -> None:
    def found(*only: str) -> list[tuple[str, int | None, int]]:
        return [(s.method.name, s.method.rank, s.seed) for s in chosen(tiny_experiment, "mini", only)]

    assert found("method=base") == [("base", None, 0)]
    assert found("method.name=dora", "seed=1") == [("dora", 2, 1), ("dora", 4, 1)]
    assert found("rank=none,4") == [("base", None, 0), ("dora", 4, 0), ("dora", 4, 1)]
    assert found("alpha=8") == found("alpha=8.0") == found("method.name=dora")
    with pytest.raises(SpecError, match="--only seed=7 matches no spec; values there: 0, 1"):
        found("seed=7")
    with pytest.raises(SpecError, match="--only sed: no such field; did you mean 'seed'"):
        found("sed=1")
    with pytest.raises(SpecError, match="expected FIELD=VALUE"):
        found("seed")


def test_with_changes_every_spec_that_has_the_field(tiny_experiment: Any) -> None:
    specs = chosen(tiny_experiment, "mini", (), ["optim.learning_rate=0.25", "evaluation.num_beams=2"])
    assert [spec.optim.learning_rate if spec.optim else None for spec in specs] == [None, 0.25, 0.25, 0.25, 0.25]
    assert {spec.evaluation.num_beams for spec in specs} == {2}
    with pytest.raises(SpecError, match="some specs became the same run"):
        chosen(tiny_experiment, "mini", ["method=dora"], ["seed=3"])


def test_folders_given_on_the_command_line_are_in_the_spec(tiny_experiment: Any, inputs: Path) -> None:
    specs = chosen(tiny_experiment, "mini", data_dir=inputs / "data", model_dir=inputs / "model")
    for spec in specs:
        assert spec.data.name == "llm_adapters" and spec.data.tasks == ("boolq", "ARC-Easy")
        assert spec.data.sha256 == sources.hash_data(inputs / "data")
        assert spec.model.name == "model" and spec.model.revision == hash_model(inputs / "model")[:12]


def test_command_line(tiny_experiment: Any, inputs: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(command.app, ["list"])
    assert re.search(r"^experiment .* mini\ntiny_one +A tiny experiment for the tests\. +5$", listed.output, re.M)
    given = ["run", "tiny_one", "--data-dir", str(inputs / "data"), "--model-dir", str(inputs / "model"),
             "--results", str(tmp_path / "results"), "--only", "method=base"]  # fmt: skip
    dry = runner.invoke(command.app, [*given, "--dry-run"])
    assert dry.exit_code == 0 and "no training" in dry.output and "1 specs" in dry.output
    assert not (tmp_path / "results").exists()
    done = runner.invoke(command.app, [*given, "--threads", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "1 complete" in done.output
    ((_, record),) = iter_runs(tmp_path / "results")
    assert (record["threads"], record["device"]) == (2, "cpu")
    assert "1 skipped" in runner.invoke(command.app, given).output
    failing = [*given[:-1], "seed=0", "--only", "rank=2", "--with", "method.rank=500", "--with", "method.alpha=1"]
    failed = runner.invoke(command.app, failing)
    assert failed.exit_code == 1 and "1 failed" in failed.output


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dora_lab", "run", "comonsense"], capture_output=True, text=True, cwd=HOUSE, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown experiment 'comonsense'; did you mean 'commonsense'?")
