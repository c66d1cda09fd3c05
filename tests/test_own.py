"""`run own`: any model's blocks, a plan from what is there, rates from its own sweep, table, verdict and figure."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file
from tiny import save_data, save_model
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab.commands import own as conducting
from dora_lab.forms.decoder import Decoder, encode
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.launch import trial
from dora_lab.launch.experiments import load_experiment
from dora_lab.launch.given import look, refuse_unfit
from dora_lab.launch.pool import Outcome
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.launch.select import chosen
from dora_lab.methods.inject import adapted, inject
from dora_lab.models import base as models
from dora_lab.models.base import model_and_tokenizer
from dora_lab.models.layout import Layout
from dora_lab.report.rates import Choice
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import survey
from dora_lab.spec import Spec, SpecError, from_dict, validate
from dora_lab.tasks import ItemError, sources

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = load_experiment("own")
ASKED = ("gpt2", "opt", "gpt_neox", "qwen2", "gemma", "phi", "bloom")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "qwen2": {*LLAMA},
    "gemma": {*LLAMA},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mamba": {"in_proj", "x_proj", "out_proj"},
}
SMALL = OWN.Size(train_items=32, validation_items=4, test_items=4, rates=3, seeds=1)


class Place(NamedTuple):
    """What a plan is made from."""

    paths: Paths
    first: Spec


def placed(name: str, folder: Path, size: Any = SMALL, **changes: Any) -> Place:
    model = save_family(name, folder / name, **changes) if name in FAMILIES else save_model(folder / name)
    paths = Paths(folder / "results", save_data(folder / "data"), model)
    return Place(paths, OWN.first(look(model, paths.data_dir, "cloze"), size))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ASKED)
def test_a_model_of_every_family_is_adapted_trained_probed_and_scored(name: str, tmp_path: Path) -> None:
    place = placed(name, tmp_path)
    assert {*place.first.method.target_modules} == TARGETS[name]
    sweep, confirmed = (
        OWN.sweep(place.first, ("lora", "dora"), (1.0,)),
        OWN.confirmation(place.first, OWN.MIDDLE, SMALL),
    )
    refuse_unfit([*sweep, *confirmed], place.paths)
    spec = next(spec for spec in confirmed if spec.method.name == "dora")
    assert run_spec(spec, place.paths, Runtime(threads=1)) == "complete"
    path = run_path(place.paths.results, spec)
    rows = read_stream(path, "probe")
    assert {row["kind"] for row in rows} == TARGETS[name]
    assert all(row["delta_d"] > 0 for row in rows if row["fraction"] == 1)  # the first step has rate 0
    assert {row["task"] for row in read_stream(path, "eval")} == {"boolq", "ARC-Easy"}
    assert [row["step"] for row in read_stream(path, "metrics") if "eval_loss" in row] == [1, 2]


@pytest.mark.parametrize("name", ASKED)
def test_an_item_is_learnt_the_same_beside_a_longer_one(name: str, tmp_path: Path) -> None:
    place = placed(name, tmp_path)
    model, tokenizer = model_and_tokenizer(place.first, place.paths.model_dir)
    inject(model.eval(), place.first.method, 0)
    items = sources.items(place.first, place.paths.data_dir)
    examples = sorted(encode(items.train, place.first.data, tokenizer).examples, key=lambda one: len(one.ids))
    short, long = examples[0], examples[-1]
    assert len(short.ids) < len(long.ids)
    form = Decoder(int(tokenizer.pad_token_id))  # type: ignore[arg-type]
    with torch.no_grad():
        alone = [float(form.loss(model, form.collate([one], [0]))) for one in (short, long)]
        beside = float(form.loss(model, form.collate([short, long], [0, 0])))
    assert beside == pytest.approx(sum(alone), rel=1e-5)
    form.loss(model, form.collate([short, long], [0, 0])).backward()
    assert all(layer.lora_B.grad is not None and layer.lora_B.grad.any() for _, layer in adapted(model))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["mixtral", "mamba"])
def test_what_cannot_be_adapted_is_named(name: str, tmp_path: Path) -> None:
    place = placed(name, tmp_path)
    found = look(place.paths.model_dir, place.paths.data_dir, "cloze")  # type: ignore[arg-type]
    assert {*found.targets} == TARGETS[name]
    left = {text.partition(":")[0] for text in found.left_out}
    assert left >= ({"experts.gate_up_proj", "gate.weight"} if name == "mixtral" else {"dt_proj", "mixer.A_log"})
    said = conducting._of_given(found, conducting.Plan(OWN, place.first, ("lora", "dora"), SMALL))
    assert sum(line.startswith("not adapted: ") for line in said) == len(found.left_out)


def test_what_does_not_work_is_said_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "open_model", loaded)
    mixtral = placed("mixtral", tmp_path / "a")
    runs = OWN.confirmation(mixtral.first, {"ft": 1e-4}, SMALL)
    refuse_unfit(runs, mixtral.paths)  # its router is stored under another name than the model's
    with monkeypatch.context() as patched:
        patched.setattr(Layout, "whole", lambda self, keys: {})
        with pytest.raises(LoadError, match=r"weight' is stored in parts or turned.*leave ft out"):
            refuse_unfit(runs, mixtral.paths)
    short = placed("gpt2", tmp_path / "b", n_positions=16)
    assert short.first.data.cutoff == 16
    with pytest.raises(ItemError, match=r"tokens and \d+ for the answer exceed the model's 16 positions"):
        refuse_unfit(OWN.confirmation(short.first, {"lora": 1e-4}, SMALL), short.paths)
    (tmp_path / "t5").mkdir()
    save_file({"shared.weight": torch.zeros(4, 4)}, tmp_path / "t5" / "model.safetensors")
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 4}))
    for file in (short.paths.model_dir or tmp_path).glob("tokenizer*"):
        (tmp_path / "t5" / file.name).write_bytes(file.read_bytes())
    with pytest.raises((LoadError, CheckpointError), match=r"config.json describes no causal language model"):
        look(tmp_path / "t5", short.paths.data_dir or tmp_path, "cloze")


def test_full_fine_tuning_is_probed_where_the_file_leaves_the_prefix_out(tmp_path: Path) -> None:
    place = placed("gpt2", tmp_path)
    file = tmp_path / "gpt2" / "model.safetensors"  # as the hub's GPT-2: "h.0.attn.c_attn.weight"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    first = OWN.first(look(tmp_path / "gpt2", tmp_path / "data", "cloze"), SMALL)
    spec = OWN.confirmation(first, {"ft": 1e-4}, SMALL)[-1]
    refuse_unfit([spec], place.paths)
    assert run_spec(spec, place.paths, Runtime(threads=1)) == "complete"
    assert {row["kind"] for row in read_stream(run_path(place.paths.results, spec), "probe")} == TARGETS["gpt2"]


def test_items_are_counted_of_the_tasks_that_are_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_data(tmp_path / "data", train=40)
    (tmp_path / "data/ARC-Easy/train.json").write_text((tmp_path / "data/ARC-Easy/test.json").read_text())
    both, one = (look(tmp_path / "model", tmp_path / "data", "cloze", only) for only in ((), ("boolq",)))
    assert (both.items, both.tasks) == (52, ("boolq", "ARC-Easy")) and (one.items, one.tasks) == (40, ("boolq",))
    with pytest.raises(LoadError, match="has no test items of 'bolq'; did you mean 'boolq'"):
        look(tmp_path / "model", tmp_path / "data", "cloze", ("bolq",))


def test_the_plan_follows_from_what_is_there() -> None:
    for items, tokens, positions in ((18_000, 128, 8192), (300, 40, None), (25, 90, 64)):
        found = replace(OWN.EXAMPLE, items=items, tokens=tokens, positions=positions)
        for size in (OWN.FULL, OWN.QUICK):
            spec = OWN.first(found, size)
            validate(spec)
            steps = spec.optim.steps(spec.data.train_items)
            assert spec.data.train_items + spec.data.validation_items <= items
            assert spec.data.cutoff == min(tokens, positions or tokens)
            assert 0 < spec.optim.warmup_steps < steps and spec.optim.eval_steps == max(1, steps // 4)
            assert 1 <= spec.optim.epochs <= 3
    assert OWN.first(replace(OWN.EXAMPLE, narrowest=10), OWN.FULL).method.rank == 5
    sweep = OWN.sweep(OWN.first(OWN.EXAMPLE, OWN.FULL), OWN.methods(True), OWN.factors(OWN.FULL))
    tries = [spec.method.name for spec in sweep]
    assert {tries.count(name) for name in ("ft", "lora", "dora")} == {5} and len(tries) == 15
    assert {spec.evaluation.split for spec in sweep} == {"validation"}


def test_every_grid_is_made_longer_by_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = conducting.Plan(OWN, OWN.first(OWN.EXAMPLE, OWN.FULL), ("lora", "dora"), OWN.FULL)
    rounds: list[list[Spec]] = []
    best = {"lora": 1e-3, "dora": 1e-3 * 4**3}  # one beyond the end of the first grid

    def ran(specs: list[Spec], *_: Any) -> list[Outcome]:
        rounds.append(specs)
        return [Outcome(spec, "complete") for spec in specs]

    def choice(name: str, specs: list[Spec], _: Path) -> Choice:
        tried = sorted(one.optim.learning_rate for one in specs if one.method.name == name and one.optim)
        lowest = min(tried, key=lambda rate: abs(rate - best[name]))
        return Choice(rate=lowest, lowest=lowest, at_end=lowest in (tried[0], tried[-1]), losses={})

    monkeypatch.setattr(conducting, "_run", ran)
    monkeypatch.setattr(conducting, "_choice", choice)
    paths = Paths(tmp_path)
    assert conducting._rates(plan, paths, Runtime(), None) == pytest.approx(best)
    assert [len(specs) for specs in rounds] == [10, 12, 14]
    best["dora"] = 1e-3 / 4**5  # too far for two more
    rounds.clear()
    assert conducting._rates(plan, paths, Runtime(), None)["dora"] == pytest.approx(1e-3 / 4**4)
    assert len(rounds) == 1 + OWN.LONGER


def test_the_estimate_adds_up(tmp_path: Path) -> None:
    place = placed("llama", tmp_path)
    specs = OWN.confirmation(place.first, {"lora": 1e-3, "ft": 1e-4}, SMALL)
    seen = trial.measure(specs[1:], place.paths, Runtime(threads=1), [4, 16])
    assert seen.micro_batch == min(seen.steps, key=seen.steps.__getitem__) and {*seen.step} == {"lora", "ft"}
    assert min(seen.item, seen.load, *seen.step.values()) > 0
    fixed = trial.Trial(load=10.0, steps={4: 2.0, 8: 1.0}, step={"lora": 1.0, "ft": 3.0}, item=0.5, tokens=1)
    assert fixed.micro_batch == 8 and fixed.of(specs[0], 8) == 10 + 4
    steps = specs[1].optim.steps(32)  # type: ignore[union-attr]
    checked = 4 / specs[1].optim.eval_steps * steps / 4 * 4 / 16 / 3  # type: ignore[union-attr]
    assert fixed.of(specs[1], 8) == pytest.approx(10 + steps + checked + 4, abs=0.1)


def test_one_slow_micro_batch_does_not_end_the_trying_but_two_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = placed("llama", tmp_path)
    specs = OWN.confirmation(place.first, {"lora": 1e-3}, SMALL)[1:]
    for seconds, tried in (([3.0, 9.0, 2.0, 4.0, 4.0, 1.0], 5), ([3.0, 9.0, 9.0, 1.0, 1.0, 1.0], 3)):
        times = iter(seconds)
        monkeypatch.setattr(trial, "_timed", lambda step, fits, times=times: next(times))
        seen = trial.measure(specs, place.paths, Runtime(threads=1), [1, 2, 4, 8, 16])
        assert [*seen.steps.values()] == seconds[:tried] and seen.steps[seen.micro_batch] == min(seconds[:tried])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """(folder, the command, what it printed) of a whole quick run on few items."""
    folder = tmp_path_factory.mktemp("own")
    save_family("gpt2", folder / "model")
    save_data(folder / "data")
    folders = {"--model-dir": "model", "--data-dir": "data", "--results": "results"}
    few = ("data.train_items=32", "data.test_items=5", "data.validation_items=4", "optim.epochs=1")
    given = ["run", "own", "--quick", "--threads", "1", *(part for text in few for part in ("--with", text))]
    given += [part for option, name in folders.items() for part in (option, str(folder / name))]
    ran = CliRunner().invoke(command.app, given)
    assert ran.exit_code == 0, ran.output
    return folder, given, ran.output


def test_it_says_what_it_will_do_and_ends_in_table_verdict_and_figure(done: tuple[Path, list[str], str]) -> None:
    folder, _, said = done
    for text in (
        "GPT2LMHeadModel", "c_attn, c_proj, c_fc", "2 steps of 16", "warm-up 1", "the fastest here", "GFLOP/s",
        "runs: 6 to choose the rates", "is not the paper's protocol", "`data.template`", "lora: rate ", "dora: rate ",
        "## Rates, model", "## Scores, model", "## Verdicts, model", "| DoRA above LoRA | accuracy", "undecided",
    ):  # fmt: skip
        assert text in said, text
    assert said.index("is not the paper's protocol") < said.index("lora: rate ") < said.index("## Scores")
    assert (folder / "results/tables/own.md").is_file()
    assert len([*(folder / "results/figures").glob("own_model_*.png")]) == 1
    runs = [record for _, record in survey(folder / "results", "own").runs]
    tested = [from_dict(record["spec"]) for record in runs if record["spec"]["evaluation"]["split"] == "test"]
    assert sorted(spec.method.name for spec in tested) == ["base", "dora", "lora"]
    assert {record["status"] for record in runs} == {"complete"}
    assert all(spec.evaluation.reuse for spec in tested)


def test_the_same_command_goes_on_with_the_runs_that_there_are(done: tuple[Path, list[str], str]) -> None:
    folder, given, first = done
    before = {path: read_record(path) for path, _ in survey(folder / "results", "own").runs}
    dry = CliRunner().invoke(command.app, [*given, "--dry-run", "--results", str(folder / "elsewhere")])
    assert dry.exit_code == 0 and "the fastest here" in dry.output and "## Rates" not in dry.output, dry.output
    assert not (folder / "elsewhere").exists()
    again = CliRunner().invoke(command.app, given)
    assert again.exit_code == 0, again.output
    assert "as in the runs that there are" in again.output and "skipped" in again.output
    assert {path: read_record(path) for path, _ in survey(folder / "results", "own").runs} == before
    tables = [said.partition("## Rates")[2].partition("/tables/own.md")[0] for said in (first, again.output)]
    assert tables[0] == tables[1] and "## Verdicts" in tables[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--with", "seed=3"], "--with seed: run own chooses it by itself"),
        (["--with", "data.name=mini"], "--with data.name: run own chooses it by itself"),
        (["--with", "optim.batch_size=abc"], "optim.batch_size = 'abc': expected a whole number"),
        (["--with", "optim.batch_size=300000000"], "optim.batch_size = 300000000: more than the 32 items"),
        (["--only", "seed=0"], "run own reads no --only"),
        (["--tier", "small"], "run own reads no --tier"),
    ],
)
def test_what_is_not_the_callers_to_say(done: tuple[Path, list[str], str], more: list[str], said: str) -> None:
    asked = CliRunner().invoke(command.app, [*done[1], *more])
    assert asked.exit_code != 0 and isinstance(asked.exception, SpecError) and said in str(asked.exception)


def test_the_micro_batch_follows_the_batch_that_was_asked_for(done: tuple[Path, list[str], str]) -> None:
    dry = CliRunner().invoke(command.app, [*done[1], "--with", "optim.batch_size=6", "--dry-run"])
    assert dry.exit_code == 0 and "steps of 6" in dry.output, (dry.output, dry.exception)


def test_answers_that_are_certain_have_a_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conducting, "read_stream", lambda *_: [{"choice_nll": 0.0}])
    specs = OWN.sweep(OWN.first(OWN.EXAMPLE, SMALL), ("lora",), (0.5, 1.0, 2.0))
    choice = conducting._choice("lora", specs, tmp_path)
    assert choice is not None and choice.rate in {spec.optim.learning_rate for spec in specs if spec.optim}


def test_quick_and_ft_are_of_own() -> None:
    for option in ("--quick", "--ft"):
        asked = CliRunner().invoke(command.app, ["run", "commonsense", option])
        assert isinstance(asked.exception, SpecError) and "are of `run own`" in str(asked.exception)
    lone = CliRunner().invoke(command.app, ["run", "own"])
    assert isinstance(lone.exception, SpecError) and "give --model-dir M" in str(lone.exception)


def test_a_folder_takes_the_place_of_the_papers_models(tmp_path: Path) -> None:
    module = load_experiment("commonsense")
    said: list[str] = []
    tiny = save_model(tmp_path / "mine")
    specs = chosen(module, "paper", model_dir=tiny, tell=said.append)
    assert len(specs) == 9 and {spec.model.name for spec in specs} == {"mine"}
    assert "takes the place of 4 models, with the settings of yahma/llama-7b-hf (the first" in said[0]
    named = tmp_path / "Llama-2-7b-hf"
    tiny.rename(named)
    dora = [spec for spec in chosen(module, "paper", model_dir=named, tell=said.append) if spec.method.name == "dora"]
    rates = {spec.method.rank: spec.optim.learning_rate for spec in dora if spec.optim}
    assert rates == {32: 2e-4, 16: 2e-4} and "Llama-2-7b-hf (by its name)" in said[1]
    config = json.loads((named / "config.json").read_text())
    sizes = {"hidden": 4096, "intermediate": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "vocab": 128256, "head_dim": None}
    config |= {f"{name}_size" if name in ("hidden", "intermediate", "vocab") else name: n for name, n in sizes.items()}
    (named / "config.json").write_text(json.dumps(config))
    eight = named.rename(tmp_path / "mine")
    chosen(module, "paper", model_dir=eight, tell=said.append)
    assert "meta-llama/Meta-Llama-3-8B (by its shape)" in said[2]
    chosen(module, "paper", ("model.name=yahma/llama-13b-hf",), model_dir=eight, tell=said.append)
    assert len(said) == 3


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "boolq" / "test.json").unlink(), r"no train\.json to train on in ARC-Easy, .*; boolq: a train"),
        (lambda f: (f / "boolq").rename(f / "mine"), r"no train\.json to train on in ARC-Easy, .*; mine: a train"),
        (lambda f: keep(f / "boolq" / "train.json", 4), r"4 items to train on; at least 5 are needed"),
    ],
)
def test_a_folder_that_nothing_can_be_trained_on_says_why(spoil: Any, words: str, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(inputs / "data", folder)
    spoil(folder)
    with pytest.raises(LoadError, match=words):
        look(inputs / "model", folder, "cloze")


def test_a_whole_task_that_was_not_asked_for_is_not_blamed(inputs: Path) -> None:
    with pytest.raises(LoadError, match=r"no train\.json to train on in ARC-Easy, which have a test\.json$"):
        look(inputs / "model", inputs / "data", "cloze", only=("ARC-Easy",))


def keep(file: Path, count: int) -> None:
    file.write_text(json.dumps(json.loads(file.read_text())[:count]))
