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
from conftest import make_spec, write_run
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


def times(factor: float, *fields: str) -> Callable[[list[Row]], Any]:
    return lambda rows: [row.update({field: row[field] * factor}) for row in rows for field in fields]


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


def parting(seed: int, steps: int = 60) -> dict[str, list[Row]]:
    """A run whose rounding is amplified until nothing single is as in a run of another `seed`, but every mean is."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(100)
    unlike = np.minimum(1e-7 * 1.6 ** np.arange(steps), 0.1)  # 0.6 % at step 25, 6 % at step 30
    losses, gradients = common.gamma(9, 0.1, (2, steps)) * (1 + unlike * rng.normal(0, 1, (2, steps)))
    found = {"metrics": [], "probe": [], "eval": []}
    for step, (loss, gradient) in enumerate(zip(losses, gradients, strict=True), start=1):
        row = {"step": step, "loss": float(loss), "grad_norm": float(gradient), "learning_rate": 1e-3, "tokens": 64}
        found["metrics"].append(row | ({"eval_loss": float(loss)} if step % 10 == 0 else {}))
    for step, noise in ((10, 1e-5), (60, 0.25)):
        for layer, common_m in enumerate(common.gamma(9, 0.1, 36)):
            module = f"layers.{layer // 2}.{'qv'[layer % 2]}_proj"
            of_layer = {"step": step, "fraction": step / 60, "module": module, "axis": "out"}
            m, d, share = (common_m * np.exp(noise * rng.normal(0, 1, 3))).tolist()
            found["probe"].append(
                of_layer | {"delta_m": m, "delta_d": d, "delta_m_signed": 0.3 * share, "undirected": 0}
            )
    for task in ("vqa", "gqa"):
        nll = common.gamma(1, 0.4, 200) * np.exp(0.2 * rng.normal(0, 1, 200))
        of_task = {
            "task": task,
            "protocol": "generate",
            "metric": "accuracy",
            "n": 200,
            "answer_nll": float(nll.mean()),
        }
        found["eval"].append(of_task | {"per_item": {"answer_nll": pack("answer_nll", nll.tolist())}})
    return found


PARTED: dict[str, tuple[str, Callable[[list[Row]], Any], str]] = {
    "rounding alone": ("metrics", lambda rows: None, "means alone"),
    "a magnitude times three": ("probe", lambda rows: times(3, "delta_m")(rows[36:]), "differs"),
    "a magnitude times 1.6": ("probe", lambda rows: times(1.6, "delta_m")(rows[36:]), "differs"),
    "a direction by half": ("probe", lambda rows: times(0.5, "delta_d")(rows[36:]), "differs"),
    "a sign, all layers together": ("probe", lambda rows: move_signed(rows[36:]), "differs"),
    "a magnitude before they part": ("probe", lambda rows: times(1.05, "delta_m")(rows[:36]), "differs"),
    "losses that stay higher": ("metrics", lambda rows: times(1.15, "loss")(rows[25:]), "differs"),
    "gradients of twice the size": ("metrics", lambda rows: times(2, "grad_norm")(rows[25:]), "differs"),
    "likelihoods twice as far": ("eval", times(2, "answer_nll"), "differs"),
    "apart from the start": ("metrics", lambda rows: times(1.007, "loss")(rows[:1]), "differs"),
    "another rate": ("metrics", lambda rows: times(1.001, "learning_rate")(rows[50:]), "differs"),
    "another batch": ("metrics", lambda rows: times(2, "tokens")(rows[50:]), "differs"),
    "losses that rise, of the same mean": ("metrics", lambda rows: tilt(rows[24:], "loss"), "differs"),
    "losses of the last quarter": ("metrics", lambda rows: times(1.5, "loss")(rows[51:]), "differs"),
    "likelihoods of all tasks, a third higher": ("eval", times(1.35, "answer_nll"), "differs"),
    "layers in another order": ("probe", lambda rows: oppose(rows[36:]), "differs"),
    "all of a layer in another's place": ("probe", lambda rows: exchange(rows[36:]), "differs"),
    "likelihoods of items in another order": ("eval", lambda rows: unrelated(rows), "differs"),
    "a layer that has not moved": ("probe", lambda rows: rows[40].update(delta_m=0.0), "differs"),
    "rows without direction": ("probe", lambda rows: rows[40].update(undirected=1), "means alone"),
    "a validation loss times five": ("metrics", lambda rows: times(5, "eval_loss")(rows[39::10]), "differs"),
    "a loss that is none": ("metrics", lambda rows: rows[40].update(loss=None), "differs"),
}


def exchange(rows: list[Row]) -> None:
    """Magnitude and direction of one layer together in the place of another: every mean and r stays."""
    fields = ("delta_m", "delta_d", "delta_m_signed")
    values = [[row[field] for field in fields] for row in rows]
    order = np.random.default_rng(0).permutation(len(rows) // 2)
    for index, row in enumerate(rows):
        row.update(zip(fields, values[2 * order[index // 2] + index % 2], strict=True))


def unrelated(rows: list[Row]) -> None:
    for row in rows:
        found = unpack("answer_nll", row["per_item"]["answer_nll"])
        row["per_item"] = {"answer_nll": pack("answer_nll", np.random.default_rng(0).permutation(found).tolist())}


def tilt(rows: list[Row], field: str) -> None:
    half = len(rows) // 2
    times(0.6, field)(rows[:half])
    times(1.4, field)(rows[half:])


def oppose(rows: list[Row]) -> None:
    """The layers that turned least get the largest magnitudes: every mean stays, r becomes negative."""
    for kind in "qv":
        some = sorted((row for row in rows if f".{kind}_" in row["module"]), key=lambda row: row["delta_d"])
        for row, value in zip(some, sorted((row["delta_m"] for row in some), reverse=True), strict=True):
            row["delta_m"] = value


def move_signed(rows: list[Row]) -> None:
    for row in rows:
        row["delta_m_signed"] = -row["delta_m"]


@pytest.mark.parametrize("name", PARTED)
def test_runs_that_part(name: str) -> None:
    """Another processor, training that amplifies rounding: the beginning alike, then the means."""
    stream, change, level = PARTED[name]
    ours, theirs = parting(1), parting(2)
    change(ours[stream])
    found = agreement(ours, theirs)
    assert found.level == level, found.why
    assert found.why and (level == "differs" or "part at step" in found.why)


def test_one_step_that_is_off_is_no_parting() -> None:
    ours, theirs = parting(1), parting(1)
    times(1.07, "loss")(ours["metrics"][30:31])
    assert agreement(ours, theirs).level == "differs"
    times(1.4, "delta_m")(ours["probe"][36:])
    assert agreement(ours, theirs).level == "differs"


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


def pictures() -> dict[str, list[Row]]:
    """Rows of four tasks, as of pictures: right or wrong, parts, a score of any size, one that is no mean."""
    rng = np.random.default_rng(3)
    scored = {
        "gqa": ("accuracy", (rng.random(400) < 0.8).astype(float)),
        "vqa": ("accuracy", np.array([0.0, 0.3, 0.6, 1.0])[rng.integers(0, 4, 400)]),
        "coco": ("cider_d", rng.gamma(9, 0.3, 400)),
        "pope": ("f1", (rng.random(400) < 0.9).astype(float)),
    }
    rows = []
    for task, (metric, scores) in scored.items():
        row: Row = {"task": task, "protocol": "generate", "metric": metric, "n": 400, "n_unparsed": 5}
        value = scores.mean() if metric != "f1" else 0.93
        row |= {"value": float(value), "rules": {"own": {metric: float(value)}}}
        row["stderr"] = None if metric == "f1" else float(scores.std() / 399**0.5)
        row["correct"] = "".join(str(int(one)) for one in scores) if task == "gqa" else None
        rows.append(row | {"per_item": {"score": pack("score", scores.tolist())}})
    return {"metrics": [], "probe": [], "eval": rows}


def scored(row: Row, scores: np.ndarray) -> None:
    """As the lab would write it, of a score that is a mean."""
    row["per_item"] = {"score": pack("score", scores.tolist())}
    row.update(value=float(scores.mean()), stderr=float(scores.std() / 399**0.5))
    row["rules"] = {"own": {row["metric"]: row["value"]}}
    row.pop("correct", None)
    if set(scores) <= {0.0, 1.0}:
        row["correct"] = "".join(str(int(one)) for one in scores)


def items(row: Row) -> np.ndarray:
    return unpack("score", row["per_item"]["score"]).copy()


def one_other(row: Row, to: float = 0.0) -> None:
    found = items(row)
    found[int(np.flatnonzero(found != to)[0])] = to
    scored(row, found)


def one_lost_one_gained(row: Row) -> None:
    found = items(row)
    found[[int(np.flatnonzero(found == 1)[0]), int(np.flatnonzero(found == 0)[0])]] = 0, 1
    scored(row, found)


def shuffled(row: Row) -> None:
    scored(row, np.random.default_rng(1).permutation(items(row)))


PICTURES: dict[str, tuple[Callable[[list[Row]], Any], str]] = {  # rows: gqa, vqa, coco, pope
    "nothing": (lambda rows: None, "same bytes"),
    "an item": (lambda rows: one_other(rows[0]), "within the interval"),
    "an item lost, one gained": (lambda rows: one_lost_one_gained(rows[0]), "within the interval"),
    "an item that is right in parts": (lambda rows: one_other(rows[0], 0.3), "within the interval"),
    "a caption": (lambda rows: one_other(rows[2], 1.5), "within the interval"),
    "one that no one can read": (lambda rows: rows[3].update(n_unparsed=6), "within the interval"),
    "a score set to 0": (lambda rows: rows[2].update(value=0.0, stderr=0.0), "differs"),
    "a score ten times as high": (lambda rows: rows[2].update(value=10 * rows[2]["value"]), "differs"),
    "such a score beside an item": (
        lambda rows: (one_other(rows[2], 1.5), rows[2].update(value=10 * rows[2]["value"])),
        "differs",
    ),
    "captions of other items beside an item": (lambda rows: (one_other(rows[0]), shuffled(rows[2])), "differs"),
    "captions worse by a twentieth": (lambda rows: scored(rows[2], 0.95 * items(rows[2])), "differs"),
    "a score that is no mean": (lambda rows: rows[3].update(value=0.5, rules={"own": {"f1": 0.5}}), "differs"),
    "the same beside an item": (lambda rows: (one_other(rows[0]), rows[3].update(value=0.5)), "differs"),
    "no one can read any": (lambda rows: rows[3].update(n_unparsed=400), "differs"),
    "by no rule": (lambda rows: (one_other(rows[0]), rows[1].update(rules=None)), "differs"),
    "by another rule": (lambda rows: (one_other(rows[1]), rows[1].update(rules={"own": {"f1": 0.2}})), "differs"),
    "another error": (lambda rows: (one_other(rows[1]), rows[1].update(stderr=0.0)), "differs"),
    "right and wrong the other way round": (
        lambda rows: rows[0].update(correct="".join("10"[int(one)] for one in rows[0]["correct"])),
        "differs",
    ),
    "an item in twenty lost": (
        lambda rows: scored(rows[0], np.where(np.arange(400) < 20, 0, items(rows[0]))),
        "differs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_printed_of_answers(name: str) -> None:
    change, level = PICTURES[name]
    ours, theirs = pictures(), pictures()
    change(ours["eval"])
    found = agreement(ours, theirs)
    assert found.level == level, found.why


def test_without_items_a_score_lies_within_its_errors() -> None:
    """Of the items of a sweep no row says how each scored."""
    ours, theirs = pictures(), pictures()
    for row in (*ours["eval"], *theirs["eval"]):
        row.update(per_item=None, correct=None)
    ours["eval"][1]["value"] += 0.01
    assert agreement(ours, theirs).level == "within the interval"
    ours["eval"][1]["value"] += 0.2
    assert agreement(ours, theirs).level == "differs"


def test_losses_that_are_all_higher_are_no_rounding() -> None:
    ours, theirs = parting(1), parting(1)
    times(1.04, "loss")(ours["metrics"][40:50])
    assert agreement(ours, theirs).level == "within the interval"
    times(1.04, "loss")(ours["metrics"][8:40] + ours["metrics"][50:])
    found = agreement(ours, theirs)
    assert found.level == "differs" and "mean of 60 rows" in str(found.why)


def late(rows: dict[str, list[Row]]) -> None:
    """The last loss alone is off, and with it all of the last checkpoint."""
    times(1.08, "loss")(rows["metrics"][-1:])
    times(1.25, "delta_m")(rows["probe"][36:])


def spliced(rows: dict[str, list[Row]]) -> None:
    """Alike to the last digit, and from one step to the next as another run."""
    other = parting(2)
    for name, begin in (("metrics", 24), ("probe", 36), ("eval", 0)):
        rows[name][begin:] = other[name][begin:]


def short(rows: dict[str, list[Row]]) -> None:
    """Rounding that grows, and no steps after it."""
    rows["metrics"][:] = parting(2)["metrics"][:36]


WHYS = [(late, "more at once than by rounding"), (spliced, "more at once than by rounding"), (short, "too late to say")]


@pytest.mark.parametrize(("change", "why"), WHYS)
def test_what_is_no_rounding_is_no_parting(change: Callable[[dict[str, list[Row]]], None], why: str) -> None:
    ours, theirs = parting(1), parting(1)
    change(ours)
    theirs["metrics"] = theirs["metrics"][: len(ours["metrics"])]
    found = agreement(ours, theirs)
    assert found.level == "differs" and why in str(found.why)


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


def test_a_likelihood_that_rows_have_not_is_no_number_to_compare() -> None:
    """Rows of LLaVA have choice_nll, None where an item offers no options."""
    ours, theirs = parting(1), parting(2)
    for row in (*ours["eval"], *theirs["eval"]):
        row["choice_nll"] = None
    assert agreement(ours, theirs).level == "means alone"
    ours["eval"][0]["choice_nll"] = 0.5
    found = agreement(ours, theirs)
    assert found.level == "differs" and "choice_nll 0.5" in str(found.why)


def test_runs_that_part_before_they_could_are_no_runs_of_one_spec() -> None:
    ours, theirs = ({**parting(seed), "metrics": parting(seed)["metrics"][12:]} for seed in (1, 2))
    assert agreement(ours, theirs).level == "differs"


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
