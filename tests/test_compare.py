"""`compare`: every stream of a run against the committed one, in five levels; the oracle is the damage done."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_spec, times, write_run
from typer.testing import CliRunner

from dora_lab import paper
from dora_lab.__main__ import app
from dora_lab.paper.agreement import TOLERANCES, agreement
from dora_lab.runs.item_values import pack, unpack
from dora_lab.spec import SpecError, from_dict, spec_id

Row = dict[str, Any]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The run directory of a user, and a committed results folder with the same run, its likelihoods included."""
    mine = write_run(tmp_path / "mine", make_spec("dora", 8, 0))
    changed(mine, "eval", lambda rows: [with_likelihoods(row, seed) for seed, row in enumerate(rows)])
    shutil.copytree(tmp_path / "mine", tmp_path / "theirs")
    return mine, tmp_path / "theirs"


def changed(run: Path, stream: str, change: Callable[[list[Row]], Any]) -> None:
    file = run / f"{stream}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_likelihoods(row: Row, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = {"choice_nll": rng.gamma(1, 0.4, row["n"]), "answer_nll": rng.gamma(4, 2, row["n"])}
    values["margin"] = rng.normal(0.1, 3, row["n"])  # its mean all but cancels out
    row.update({name: float(found.mean()) for name, found in values.items()})
    facts = pack("fact", rng.integers(0, 2**32, row["n"]).tolist())
    row["per_item"] = {name: pack(name, found.tolist()) for name, found in values.items()} | {"fact": facts}


def blur(name: str, share: float) -> Callable[[list[Row]], Any]:
    """Add to and take from the items of each row by turns that share of their standard deviation."""

    def change(rows: list[Row]) -> None:
        for row in rows:
            found = unpack(name, row["per_item"][name])
            off = np.where(np.arange(len(found)) % 2, 1, -1) * share * found.std()
            row["per_item"][name] = pack(name, (found + off).tolist())

    return change


def score(count: int) -> Callable[[list[Row]], Any]:
    """Rows as of pictures: a score between 0 and 1 for each item and no `correct`; that many scored otherwise."""

    def change(rows: list[Row]) -> None:
        for row in rows:
            scores = np.array([0.0, 0.3, 0.6, 1.0])[np.random.default_rng(7).integers(0, 4, row["n"])]
            scores[:count] = np.where(scores[:count] == 1, 0.3, 1)
            row.pop("correct", None)
            row.update(metric="vqa", value=float(scores.mean()), n_unparsed=None)
            row["per_item"] = row["per_item"] | {"score": pack("score", scores.tolist())}

    return change


def move(name: str, by: float) -> Callable[[list[Row]], Any]:
    return lambda rows: [row.update({name: row[name] + by * row["choice_nll"]}) for row in rows]


def of_dora(found: paper.Comparison) -> Row:
    (row,) = [row for row in found.rows if row["method"].startswith("dora") and row["protocol"] == "generate"]
    return row


def later(change: Callable[[list[Row]], Any]) -> Callable[[list[Row]], Any]:
    """Not in the first steps, in which another processor's losses are as good as equal."""
    return lambda rows: change([row for row in rows if row["step"] > 8])


def answer(row: Row, correct: str) -> None:
    row.update(correct=correct, value=correct.count("1") / row["n"])


def flip(count: int) -> Callable[[list[Row]], Any]:
    def change(rows: list[Row]) -> None:
        for row in rows:
            bits = row["correct"]
            answer(row, "".join("10"[int(bit)] for bit in bits[:count]) + bits[count:])

    return change


def reverse(rows: list[Row]) -> None:
    for row in rows:
        row["correct"] = row["correct"][::-1]


CASES: dict[str, tuple[str, Callable[[list[Row]], Any], str]] = {
    "untouched": ("eval", lambda rows: None, "same bytes"),
    "wall time": ("metrics", times(3, "seconds"), "same bytes"),
    "the last digit": ("probe", times(1 + 1e-15, "delta_m"), "same answers"),
    "ΔM, ΔD as between processors": ("probe", times(1.00029, "delta_m", "delta_d"), "same answers"),
    "ΔM beyond it": ("probe", times(1.0004, "delta_m"), "within the interval"),
    "ΔM far beyond it": ("probe", times(1.004, "delta_m"), "differs"),
    "ΔD × 3": ("probe", times(3, "delta_d"), "differs"),
    "ΔM of one row": ("probe", lambda rows: rows[7].update(delta_m=rows[7]["delta_m"] * 3), "differs"),
    "losses as between processors": ("metrics", later(times(1.0059, "loss")), "same answers"),
    "losses beyond it": ("metrics", later(times(1.007, "loss")), "within the interval"),
    "losses far beyond it": ("metrics", later(times(1.07, "loss")), "differs"),
    "a loss that rounding does not bring about so early": (
        "metrics",
        lambda rows: times(1.0003, "loss")(rows[:1]),
        "differs",
    ),
    "tokens": ("metrics", lambda rows: rows[1].update(tokens=rows[1]["tokens"] + 1), "differs"),
    "a checkpoint lost": ("probe", lambda rows: rows.__delitem__(slice(-12, None)), "differs"),
    "another module": ("probe", lambda rows: rows[0].update(module="elsewhere"), "differs"),
    "other prompts": ("eval", lambda rows: rows[0].update(prompt_sha256="0" * 64), "differs"),
    "an item a task": ("eval", flip(1), "within the interval"),
    "one more unparsed": (
        "eval",
        lambda rows: rows[0].update(n_unparsed=rows[0]["n_unparsed"] + 1),
        "within the interval",
    ),
    "answers reversed": ("eval", reverse, "differs"),
    "likelihoods as between processors": ("eval", times(1.0059, "choice_nll", "answer_nll"), "same answers"),
    "likelihoods beyond it": ("eval", times(1.007, "answer_nll"), "within the interval"),
    "likelihoods far beyond it": ("eval", times(1.07, "choice_nll"), "differs"),
    "a margin, which cancels out, by choice_nll": ("eval", move("margin", 0.0055), "same answers"),
    "a margin beyond it": ("eval", move("margin", 0.008), "within the interval"),
    "single items as between processors": ("eval", blur("choice_nll", 0.0085), "same answers"),
    "single items beyond it": ("eval", blur("margin", 0.02), "within the interval"),
    "single items far beyond it": ("eval", blur("answer_nll", 0.12), "differs"),
    "items about another fact": (
        "eval",
        lambda rows: rows[0]["per_item"].update(fact=rows[1]["per_item"]["fact"]),
        "differs",
    ),
    "likelihoods of other items": (
        "eval",
        lambda rows: rows[0]["per_item"].update(choice_nll=rows[1]["per_item"]["choice_nll"]),
        "differs",
    ),
    "a third of the items": ("eval", flip(40), "differs"),
    "the last digit of a score": ("eval", times(1 + 1e-15, "value", "stderr"), "same answers"),
    "rows in another order": ("eval", lambda rows: rows.reverse(), "same answers"),
    "layers in another order": ("probe", lambda rows: rows.reverse(), "same answers"),
    "two tasks' answers for each other's": ("eval", lambda rows: swap(rows[0], rows[1]), "differs"),
    "no loss": ("metrics", lambda rows: [row.pop("loss") for row in rows], "differs"),
    "no hash of the prompts": ("eval", lambda rows: [row.pop("prompt_sha256") for row in rows], "differs"),
    "a loss that is none": ("metrics", lambda rows: rows[1].update(loss=None), "differs"),
    "likelihoods of single items that are no numbers": ("eval", lambda rows: spoil(rows[3]), "differs"),
    "values of single items that no one can read": (
        "eval",
        lambda rows: rows[3]["per_item"].update(choice_nll="A"),
        "differs",
    ),
}


def swap(one: Row, other: Row) -> None:
    """Of items about the same prompts: all that an answer moves."""
    for field in ("value", "stderr", "correct"):
        one[field], other[field] = other[field], one[field]


def spoil(row: Row) -> None:
    row["answer_nll"] += 1e-6
    row["per_item"]["answer_nll"] = base64.b64encode(np.full(row["n"], np.nan, "<f2").tobytes()).decode()


@pytest.mark.parametrize("name", CASES)
def test_levels(name: str, two: tuple[Path, Path]) -> None:
    stream, change, level = CASES[name]
    mine, theirs = two
    changed(mine, stream, change)
    found = paper.compare(mine.parents[2], theirs)
    row = of_dora(found)
    assert row["agreement"] == level
    assert found.agrees is (level != "differs")
    assert found.agrees or row["why"]  # what keeps them apart


def test_flipped_items_are_counted(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    changed(mine, "eval", lambda rows: flip(2)(rows[:3]))
    generated = [row["protocol"] for row in map(json.loads, (mine / "eval.jsonl").open())][:3].count("generate")
    found = of_dora(paper.compare(mine.parents[2], theirs))
    assert found["flipped"] == 2 * generated > 0  # of its protocol alone


@pytest.mark.parametrize(("count", "level"), [(0, "same bytes"), (2, "within the interval"), (100, "differs")])
def test_items_scored_in_parts(count: int, level: str, two: tuple[Path, Path]) -> None:
    """Of pictures no row says right or wrong: what an item scores, says whether it is answered otherwise."""
    rows = [[json.loads(line) for line in (two[0] / "eval.jsonl").read_text().splitlines()] for _ in range(2)]
    score(0)(rows[1])
    score(count)(rows[0])
    found = agreement(*({"eval": some, "probe": [], "metrics": []} for some in rows))
    assert (found.level, sum(one.items for one in (found.moved or {}).values())) == (level, count * len(rows[0]))


def test_flips_do_not_excuse_another_magnitude(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    changed(mine, "eval", flip(1))
    changed(mine, "probe", times(1 + 9 * TOLERANCES["delta_m"], "delta_m"))
    assert paper.compare(mine.parents[2], theirs).agrees
    changed(mine, "probe", times(1.05, "delta_m"))
    found = paper.compare(mine.parents[2], theirs)
    assert not found.agrees and "delta_m is off by" in of_dora(found)["why"][0]


def test_scores_that_are_no_accuracies_are_compared(two: tuple[Path, Path]) -> None:
    """CIDEr, F1: of any value, so that items alone say little, and in a table of accuracies no number."""
    mine, theirs = two
    for run in (mine, theirs / "runs" / mine.parent.name / mine.name):
        changed(run, "eval", lambda rows: (score(0)(rows), [row.update(metric="cider_d") for row in rows]))
    row = of_dora(paper.compare(mine.parents[2], theirs))
    assert (row["agreement"], row["local"]) == ("same bytes", None)
    changed(mine, "eval", lambda rows: nothing_right(rows[0]))
    found = paper.compare(mine.parents[2], theirs)
    assert not found.agrees and "standard errors" in of_dora(found)["why"][0]


def nothing_right(row: Row) -> None:
    row["value"], row["per_item"]["score"] = 0.0, pack("score", [0.0] * row["n"])


def test_the_worst_of_many_runs_is_named(tmp_path: Path) -> None:
    for seed in range(5):
        mine = write_run(tmp_path / "mine", make_spec("dora", 8, seed))
        write_run(tmp_path / "theirs", make_spec("dora", 8, seed))
        changed(mine, "probe", times(1.004 if seed == 4 else 1.0004, "delta_m"))
    told = CliRunner().invoke(app, ["compare", "--results", f"{tmp_path}/mine", "--committed", f"{tmp_path}/theirs"])
    assert f"{mine.name}: probe" in told.output and "and 2 more" in told.output


def rewritten(run: Path, **changes: Any) -> None:
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record | changes))


def twin(mine: Path, theirs: Path) -> Path:
    return theirs / "runs" / mine.parent.name / mine.name


def test_what_was_begun_and_what_was_made_with_others_is_said(two: tuple[Path, Path], tmp_path: Path) -> None:
    mine, theirs = two
    begun = write_run(tmp_path / "mine", make_spec("lora", 8, 0))
    write_run(theirs, make_spec("lora", 8, 0))
    rewritten(begun, status="failed")
    rewritten(mine, packages={"torch": "1.0"}, machine={"processor": "Z80"})
    notes = "\n".join(paper.compare(tmp_path / "mine", theirs).notes)
    assert f"not complete: {begun.name} (failed)" in notes
    assert f"Made with others ({mine.name}): processor Z80 (committed: –), torch 1.0 (committed: 2.13.0)" in notes


FACTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what the committed record says, and mine
    "params.trainable": ({"params": {"trainable": 5, "total": 9}}, {"params": {"trainable": 6, "total": 9}}),
    "training.tokens": ({"training": {"steps": 4, "tokens": 64}}, {"training": {"steps": 4, "tokens": 65}}),
    "inputs.data.sha256": ({"inputs": {"data": {"sha256": "e" * 64}}}, {"inputs": {"data": {"sha256": "f" * 64}}}),
    "inputs.eval_data.sha256": ({"inputs": {"eval_data": {"sha256": "e" * 64}}}, {"inputs": {"eval_data": None}}),
    "text_nll.after": ({"text_nll": {"before": 0.7, "after": 1.0}}, {"text_nll": {"before": 0.7, "after": 1.1}}),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_tables_read_of_a_record_is_compared(name: str, two: tuple[Path, Path]) -> None:
    mine, theirs = two
    said, other = FACTS[name]
    for run in (mine, twin(mine, theirs)):
        rewritten(run, **said)
    assert paper.compare(mine.parents[2], theirs).agrees
    rewritten(mine, **other)
    found = paper.compare(mine.parents[2], theirs)
    assert not found.agrees and f"record, {name}: " in of_dora(found)["why"][0]


def test_items_lost_in_every_run_are_no_rounding(tmp_path: Path) -> None:
    """Three items of each task more wrong than right: within the standard errors of one run, not of ten."""
    for seed in range(10):
        mine = write_run(tmp_path / "mine", make_spec("dora", 8, seed), skill=0.9)
        write_run(tmp_path / "theirs", make_spec("dora", 8, seed), skill=0.9)
        changed(mine, "eval", lambda rows: [lose(row, 1) for row in rows])
    found = paper.compare(tmp_path / "mine", tmp_path / "theirs")
    assert not found.agrees and "over 10 runs scores move by -80 items of 80" in " ".join(of_dora(found)["why"])
    one = paper.compare(tmp_path / "mine", tmp_path / "theirs", only={mine.name})
    assert one.agrees and of_dora(one)["agreement"] == "within the interval"
    changed(mine, "eval", lambda rows: [lose(row, 3) for row in rows])
    assert not paper.compare(tmp_path / "mine", tmp_path / "theirs", only={mine.name}).agrees


def lose(row: Row, count: int) -> None:
    answer(row, row["correct"].replace("1", "0", count))


def test_a_run_of_ones_own_that_is_like_none_is_told_in_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", make_spec("lora", 8, 35))
    write_run(tmp_path / "theirs", make_spec("lora", 8, 36))
    told = CliRunner().invoke(app, ["compare", "--results", f"{tmp_path}/mine", "--committed", f"{tmp_path}/theirs"])
    assert told.exit_code == 1 and "missing (1 of 1)" in told.output


def test_a_task_that_is_lost_is_said(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    changed(mine, "eval", lambda rows: rows.pop())
    told = CliRunner().invoke(app, ["compare", "--results", str(mine.parents[2]), "--committed", str(theirs)])
    assert told.exit_code == 1 and "other tasks are scored" in told.output


def test_an_accuracy_in_percent_is_refused(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    changed(mine, "eval", lambda rows: [row.update(value=100 * row["value"], correct=None) for row in rows])
    found = paper.compare(mine.parents[2], theirs)
    assert not found.agrees and "is no share of 1" in found.left_out[0]


def test_committed_runs_that_cannot_be_read_are_no_agreement(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    lost = write_run(theirs, make_spec("dora", 8, 1))
    (lost / "record.json").write_text("{")
    found = paper.compare(mine.parents[2], theirs)
    assert not found.agrees and found.notes[-1].startswith("What can be read of the committed records agrees")


def test_the_verdict_is_told_beside_rows_for_programs(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    given = ["compare", "--results", str(mine.parents[2]), "--committed", str(theirs), "--format", "json"]
    told = CliRunner().invoke(app, given)
    assert json.loads(told.stdout) and told.stderr.strip().endswith("same bytes.")


def test_a_task_of_somebody_elses_is_a_column(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    for run in (mine, theirs / "runs" / mine.parent.name / mine.name):
        changed(run, "eval", lambda rows: rows[0].update(task="my_own"))
    assert any("my_own" in line for line in paper.compare(mine.parents[2], theirs).beside)


def test_a_part_of_the_runs_agrees_and_is_said_to_be_a_part(tmp_path: Path) -> None:
    for root, seeds in (("mine", (0,)), ("theirs", (0, 1, 2))):
        for seed in seeds:
            write_run(tmp_path / root, make_spec("lora", 8, seed))
    found = paper.compare(tmp_path / "mine", tmp_path / "theirs")
    assert not found.agrees
    for row in found.rows:
        assert [row[name] for name in ("agreement", "runs", "of", "others")] == ["missing", 1, 3, "same bytes"]
    assert found.notes[-1].startswith("What is there agrees with the committed records, but runs are missing")
    found = paper.compare(tmp_path / "mine", tmp_path / "theirs", only={spec_id(from_dict(make_spec("lora", 8, 0)))})
    assert found.agrees and all(row["runs"] == row["of"] == 1 for row in found.rows)


def test_what_is_missing_is_told_in_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "mine", make_spec("lora", 8, 0))
    for method, seed in (("lora", 0), ("lora", 1), ("dora", 0)):
        write_run(tmp_path / "theirs", make_spec(method, 8, seed))
    told = CliRunner().invoke(app, ["compare", "--results", f"{tmp_path}/mine", "--committed", f"{tmp_path}/theirs"])
    assert "nan" not in told.output and told.exit_code == 1
    assert "missing (1 of 1)" in told.output and "missing (1 of 2; the others:" in told.output


def test_what_is_no_results_folder_or_experiment_is_said(two: tuple[Path, Path], tmp_path: Path) -> None:
    mine, theirs = two
    with pytest.raises(SpecError, match="typo is no results folder"):
        paper.compare(tmp_path / "typo", theirs)
    with pytest.raises(SpecError, match="has a run of an experiment 'nonsense'"):
        paper.compare(mine.parents[2], theirs, "nonsense")
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    found = paper.compare(tmp_path / "empty", theirs)
    assert not found.agrees and f"No complete runs in {tmp_path / 'empty'}" in found.notes[0]
    assert "In the other folder: commonsense" in found.notes[0]


@pytest.mark.parametrize("experiment", ["detach", "stability", "visual_instruction"])
def test_committed_records_agree_with_themselves(experiment: str) -> None:
    committed = Path(__file__).resolve().parents[1] / "results"
    found = paper.compare(committed, committed, experiment)
    assert found.agrees and {row["agreement"] for row in found.rows} == {"same bytes"}


def test_a_copy_of_a_run_is_left_out(two: tuple[Path, Path]) -> None:
    mine, theirs = two
    shutil.copytree(mine, mine.with_name(mine.name + ".bak"))
    found = paper.compare(mine.parents[2], theirs)
    assert found.agrees and found.left_out[0].startswith(f"{mine}.bak is no run")
    assert {(row["runs"], row["of"]) for row in found.rows} == {(1, 1)}
