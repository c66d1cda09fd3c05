"""Protocol cards and their differences, from records alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from conftest import make_spec
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab import spec as specs
from dora_lab.commands.app import find_run
from dora_lab.commands.run import summary
from dora_lab.launch.experiments import published_specs
from dora_lab.launch.pool import Outcome
from dora_lab.report import card
from dora_lab.runs.record import read_record
from dora_lab.runs.survey import iter_runs
from dora_lab.tasks import TEMPLATES, load_task

COMMITTED = Path(__file__).resolve().parents[1] / "results"
Writer = Callable[..., Path]


def a_run(**wanted: object) -> Path:
    """A committed run, by fields of its spec."""
    for folder, _ in iter_runs(COMMITTED, "commonsense"):
        spec = specs.to_dict(specs.from_dict(read_record(folder)["spec"]))
        flat = specs.leaves(spec)
        if all(flat[name.replace("__", ".")] == value for name, value in wanted.items()):
            return folder
    raise AssertionError(f"no committed run with {wanted}")


def test_a_card_says_everything_that_a_score_depends_on() -> None:
    folder = a_run(method__name="dora", method__rank=8, seed=1, data__name="mini")
    text, record = card.card(folder), read_record(folder)
    for part in (record["spec_id"], record["code"]["commit"], "DoRA rank 8 on mini, seed 1", "loss on the answer alone",
                 "decoding: greedy, never sampled", "`optim.learning_rate`", "peak learning rate: 0.01",
                 "padding: <unk>, on the left, masked", "the last weights are evaluated", "torch 2.13.0",
                 "type of the frozen weights: float32", "trainable parameters: ", "| boolq | generate |"):  # fmt: skip
        assert part in text, part
    for task in map(load_task, record["spec"]["data"]["tasks"]):
        assert f"{task.name} `{task.pattern}`" in text
    flat = specs.leaves(record["spec"])
    unsaid = {field for field, value in flat.items() if value not in (None, []) and f"`{field}`" not in text}
    assert unsaid == {"experiment", "tier", "probe.fractions", "method.dropout_form"}  # nothing is dropped


def test_the_prompt_is_there_byte_for_byte(tmp_path: Path, run_writer: Writer) -> None:
    for template, (train, asked) in TEMPLATES.items():
        text = card.card(run_writer(tmp_path, make_spec("lora", 8, 0, data__template=template)))
        shown = [block.replace("\n", "").replace("⏎", "\n").replace("·", " ") for block in text.split("```")[1:4:2]]
        assert shown == [train, asked]
        assert card._hash(train) in text and card._hash(asked) in text


def test_a_base_model_and_a_failed_run_have_cards(tmp_path: Path, run_writer: Writer) -> None:
    base = card.card(run_writer(tmp_path, make_spec("base", None, 0)))
    assert "base model on mini" in base and "## Training" not in base and "rank" not in base.split("## Method")[1]
    failed = card.card(run_writer(tmp_path, make_spec("lora", 8, 0), status="failed"))
    assert "failed" in failed


def test_every_field_and_every_choice_has_its_words() -> None:
    said = specs.words()
    assert {path for path, text in said.items() if isinstance(text, str | dict)} == (
        set(specs._paths()) - {"optim", "probe"}
    )
    for path, (kind, _) in specs._fields().items():
        choices = {True, False} if kind is bool else set(get_args(kind)) if get_origin(kind) is Literal else None
        # the values of these are words already
        if choices and path not in ("tier", "optim.schedule", "evaluation.split"):
            assert set(said[path]) == choices, path


def test_the_difference_of_two_runs_is_told_in_words(tmp_path: Path, run_writer: Writer) -> None:
    one = run_writer(tmp_path, make_spec("lora", 8, 0))
    two = run_writer(
        tmp_path, make_spec("lora", 8, 0, data__train_on_prompt=True, optim__learning_rate=0.5), commit="f" * 40
    )
    lines = card.diff(one, two).splitlines()
    told = [line for line in lines if line.startswith("- ")]
    assert told[0].startswith(
        "- loss on the answer alone in A; loss on prompt and answer in B (`data.train_on_prompt`)"
    )
    assert "86.5" in told[0]
    assert told[1].startswith("- peak learning rate: 0.001 in A, 0.5 in B")
    assert told[2] == "- code commit: 0123456789abcdef in A, ffffffffffff in B" and len(told) == 3
    assert any(line.startswith("boolq           generate") and "+0.0" in line for line in lines)
    same = card.diff(one, one)
    assert "The protocols are the same." in same and "- " not in same.split("\n\n")[1]


def test_a_run_beside_the_published_protocol(tmp_path: Path, run_writer: Writer) -> None:
    published = published_specs()
    wanted = next(s for s in published if s.method.rank == 16 and s.method.name == "dora" and s.seed == 2)
    changed = specs.derive(wanted, {"evaluation.num_beams": 1, "seed": 7, "data.sha256": "a" * 64})
    folder = run_writer(tmp_path, specs.to_dict(changed))
    text = card.diff(folder, card.nearest(changed, published))
    told = [line for line in text.splitlines() if line.startswith("- ") and "(`" in line]
    assert len(told) == 1 and told[0].startswith("- beams: 1 in A, 4 in B (`evaluation.num_beams`)")
    assert "no attention mask" in text
    nearest = card.nearest(specs.from_dict(make_spec("dora", 8, 0, model__name="yahma/llama-13b-hf")), published)
    assert (nearest.model.name, nearest.method.name) == ("yahma/llama-13b-hf", "dora")
    with pytest.raises(ValueError, match="no experiment has a tier 'paper'"):
        card.nearest(changed, [])


def test_the_commands(tmp_path: Path) -> None:
    folder = a_run(method__name="dora", method__rank=8, seed=1, data__name="mini")
    out = tmp_path / "card.md"
    done = CliRunner().invoke(command.app, ["card", folder.name[:8], "--out", str(out)])
    assert done.exit_code == 0 and out.read_text(encoding="utf-8") == card.card(folder)
    done = CliRunner().invoke(command.app, ["diff", str(folder), "published"])
    assert done.exit_code == 0 and "beams: 1 in A, 4 in B" in done.output
    with pytest.raises(specs.SpecError, match=r"run 'nothing'.*none is that"):
        find_run("nothing", tmp_path)
    with pytest.raises(specs.SpecError, match="give more digits"):
        find_run("6", COMMITTED)


def test_leakage_and_cut_answers_are_said_with_the_scores(tmp_path: Path, run_writer: Writer) -> None:
    from analysis.tables import commonsense

    folder = run_writer(tmp_path, make_spec("lora", 8, 0))
    file = folder / "record.json"
    record = json.loads(file.read_text())
    assert "To be known" not in card.card(folder)
    assert commonsense.caveats_of(tmp_path) == {}
    sources = [{"task": "boolq", "split": "test", "items": 120, "used": 120, "asked_in_training": 7}]
    record |= {"inputs": {"sources": sources}, "training": {"answers_cut": 3}, "notes": ["it was a full moon"]}
    file.write_text(json.dumps(record))
    said = (
        "boolq: 7 of its 120 test items are asked in the training items, too",
        "3 training items lost the end of their answer to data.cutoff",
    )
    (table,) = (path for path in commonsense.build(tmp_path) if path.suffix == ".md")
    told = summary([Outcome(specs.from_dict(record["spec"]), "complete")], tmp_path)
    for text in said:
        assert f"- {text}\n" in card.card(folder) and text in told and f"{text} (LoRA)." in table.read_text()
    assert "- it was a full moon\n" in card.card(folder) and "full moon" in told and "moon" not in table.read_text()
