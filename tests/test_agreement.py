"""`agreement` on rows of two runs: those that part, and what is said of answers; the oracle is the damage done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import times

from dora_lab.paper.agreement import agreement
from dora_lab.runs.item_values import pack, unpack

Row = dict[str, Any]


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
