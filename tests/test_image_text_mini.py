"""The mini tier of image_text: its folder of data, what can be reached on it, verdicts on it, runs from end to end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dora_lab.evaluation.bounds import bounds
from dora_lab.io.errors import LoadError
from dora_lab.launch.experiments import load_experiment
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.mini import vl
from dora_lab.paper.judged import judge
from dora_lab.paper.registered import registered
from dora_lab.report.items import item_values
from dora_lab.runs import doctor
from dora_lab.runs.item_values import pack
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_rows
from dora_lab.spec import Spec, derive
from dora_lab.tasks import load_task, mini_pictures, sources
from experiments import image_text
from experiments.image_text import CELLS, TASKS

NOVEL = tuple(f"{task}_novel" for task in TASKS)


def spec(cell: str = "DoRA", **changes: str) -> Spec:
    made = image_text.mini(CELLS[cell], 1e-3, 0)
    return derive(made, {name.replace("__", "."): value for name, value in changes.items()})


def test_the_world_is_written_once_and_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bool] = []

    def write(root: Path, tested: str = "test", blind: bool = False) -> Path:  # the real one takes seconds
        written.append(blind)
        (root / "annotations" / "vqa").mkdir(parents=True)
        (root / "annotations" / "vqa" / "karpathy_test.json").write_text("[]")
        return root

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vl, "write", write)
    monkeypatch.setattr(vl, "add", lambda root, tested, blind: (root / tested).mkdir())
    place = mini_pictures.folder("mini_vl")
    assert place.is_relative_to(tmp_path) and mini_pictures.folder("mini_vl") == place and written == [False]
    (place / "annotations" / "vqa" / "karpathy_test.json").write_text("[1]")
    assert mini_pictures.folder("mini_vl") == place and written == [False] * 2
    assert (place / "annotations" / "vqa" / "karpathy_test.json").read_text() == "[]"
    assert mini_pictures.folder("mini_vl_blind") != place and written[-1]
    assert [file.name for file in place.parent.iterdir() if file.name.startswith("tmp")] == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LoadError, match=r"cannot be written there .*; set XDG_CACHE_HOME to a folder with 50 MB"):
        mini_pictures.folder("mini_vl")


def test_items_of_every_split_and_those_about_unseen_combinations() -> None:
    found = sources.items(spec(data__validation_items="512"))
    assert found.counts() == {
        "train": {"vqa": 4800, "gqa": 4800, "nlvr2": 2400, "coco_caption": 4800},
        "validation": dict.fromkeys(TASKS, 128),
        "test": dict(zip((*TASKS, *NOVEL), (512, 512, 256, 256, 256, 256, 128, 128), strict=True)),
    }
    assert found.pictures is not None
    shown = {item["text"] + str(item["pictures"]) for item in found.test["vqa_novel"]}
    assert not shown & {item["text"] + str(item["pictures"]) for item in found.test["vqa"]}
    for task in TASKS:
        assert all(found.pictures.of(item["pictures"]).any() for item in found.test[f"{task}_novel"][:5])


def test_steps_are_those_that_the_decay_is_reckoned_with() -> None:
    counts = {"vqa": 4800, "gqa": 4800, "nlvr2": 2400, "coco_caption": 4800}
    steps = sum(-(-counts[task] * image_text.EPOCHS // size) for task, size in image_text.MINI_BATCH.items())
    assert steps == image_text.MINI_STEPS


@pytest.mark.parametrize("task", [*TASKS, *NOVEL])
def test_floor_and_ceiling_are_what_the_metric_says(task: str) -> None:
    items = load_task(task).read(mini_pictures.folder("mini_vl"), "test")  # type: ignore[misc]
    found = bounds("mini_vl", load_task(task), "test", items)
    if "coco" in task:
        assert 0.1 < found["floor"] < 0.6 < 3 < found["ceiling"] < 5
    else:
        assert 0.2 < found["floor"] < 0.55 and found["ceiling"] == 1
    # of fewer items, in any order, their own
    some = items[::-1][:40]
    again = bounds("mini_vl_blind", load_task(task), "test", some)
    if "nlvr2" in task or "gqa" in task:
        wanted = np.mean([item["answer"] == said for item, said in zip(some, _floor(task)[::-1], strict=False)])
        assert again["floor"] == wanted
    assert bounds("vl_adapter", load_task(task), "test", items) == {}


def _floor(task: str) -> list[str]:
    return vl.floor(task.removesuffix("_novel"), "novel" if task.endswith("_novel") else "test")


def test_normalised_values_are_shares_of_what_can_be_reached() -> None:
    row: dict[str, Any] = {"spec_id": "x", "task": "vqa", "n": 3, "per_item": {"score": pack("score", [0.3, 0.65, 1])}}
    np.testing.assert_allclose(item_values(row | {"floor": 0.3, "ceiling": 1.0}, "normalised"), [0, 0.5, 1], atol=1e-6)
    with pytest.raises(ValueError, match="run x, task vqa: floor None and ceiling None"):
        item_values(row, "normalised")


def _evals(seeds: int = 3) -> pd.DataFrame:
    """DoRA's scores a tenth above LoRA's, of two tasks with other scales, its NLL a fifth below."""
    rng, rows = np.random.default_rng(0), []
    for task, scale, floor in (("vqa", 0.5, 0.2), ("coco_caption", 2.0, 0.4)):
        base = rng.random(50)
        for seed in range(seeds):
            for method, better in (("lora", 0.0), ("dora", 0.1)):
                scores = scale * (base * 0.5 + better) + floor + rng.normal(0, 0.001)
                nlls = (1 + base) * (1 - 2 * better)
                per_item = {"score": pack("score", scores), "answer_nll": pack("answer_nll", nlls)}
                about = {"experiment": "image_text", "tier": "mini", "data": "mini_vl", "split": "test", "seed": seed}
                about |= {"method": method, "rank": 16, "label": method, "spec_id": f"{method} {seed}"}
                rows.append(about | {
                    "protocol": "generate", "task": task, "n": 50, "prompt_sha256": task, "value": scores.mean(),
                    "floor": floor, "ceiling": floor + scale, "per_item": per_item,
                })  # fmt: skip
    return pd.DataFrame(rows)


def test_a_claim_is_judged_by_both_metrics_and_captions_outweigh_nothing(tmp_path: Path) -> None:
    plan = {
        "experiment": "image_text", "tier": "mini", "data": "mini_vl", "metric": "normalised", "also": ["answer_nll"],
        "margin": 1, "seeds": 3, "tasks": ["vqa", "coco_caption"],
        "claims": [{"name": "above", "statement": "DoRA beats LoRA", "hypothesis": "superior", "primary": True,
                    "terms": [[1, "dora", 16], [-1, "lora", 16]]}],
    }  # fmt: skip
    (tmp_path / "image_text.md").write_text(f"```json\n{json.dumps(plan)}\n```\n")
    read = registered("image_text", tmp_path)
    assert read is not None and read.carrying == ("normalised", "answer_nll")
    rows = judge(read, _evals()).set_index("metric")
    assert rows["family"].to_dict() == {"normalised": "primary", "answer_nll": "primary"}
    assert rows["verdict"].tolist() == ["holds", "holds"] and rows["unit"].tolist() == ["points", "%"]
    # a tenth of each task's own range, whatever its scale
    assert rows.loc["normalised", "effect"] == pytest.approx(10, abs=0.3)
    assert rows.loc["answer_nll", "effect"] == pytest.approx(-100 * np.log(0.8), abs=0.1)
    assert judge(read, _evals(2))["verdict"].tolist() == ["2 of 3", "2 of 3"]
    assert rows["margin"].tolist() == [1, 5]  # the usual one, or its own
    (tmp_path / "image_text.md").write_text(f"```json\n{json.dumps(plan | {'also': {'answer_nll': 2.5}})}\n```\n")
    own = registered("image_text", tmp_path)
    assert own is not None and own.carrying == read.carrying and judge(own, _evals())["margin"].tolist() == [1, 2.5]
    (tmp_path / "image_text.md").write_text(f"```json\n{json.dumps(plan | {'also': ['f1']})}\n```\n")
    with pytest.raises(ValueError, match="metric 'f1' is not one of"):
        registered("image_text", tmp_path)


def test_every_cell_is_swept_alike_and_looks_at_no_test_item() -> None:
    specs = load_experiment("image_text").sweep()
    tries = Counter((one.method.name, one.method.alpha) for one in specs)
    assert set(tries.values()) == {12} and len(tries) == len(image_text.SWEPT)
    assert {one.evaluation.split for one in specs} == {"validation"}
    for cell in tries:
        for seed in image_text.SWEEP_SEEDS:
            mine = [one for one in specs if (one.method.name, one.method.alpha, one.seed) == (*cell, seed)]
            grid = sorted(one.optim.learning_rate for one in mine)  # type: ignore[union-attr]
            assert [after / before for before, after in pairwise(grid)] == pytest.approx([3.0] * 3, rel=1e-3)
    assert not {*image_text.SWEEP_SEEDS} & {one.seed for one in image_text.confirmation()}


FEW = {"optim.epochs": "0.02", "data.test_items": "6", "evaluation.batch_size": "8"}


@pytest.mark.parametrize("cell", [*CELLS, "blind"])
def test_a_row_from_start_to_end(cell: str, tmp_path: Path) -> None:
    made = derive(spec("FT" if cell == "blind" else cell), FEW)
    if cell == "blind":
        made = replace(made, data=replace(made.data, name="mini_vl_blind"), probe=None)
    assert run_spec(made, Paths(tmp_path)) == "complete"
    folder = run_path(tmp_path, made)
    record = read_record(folder)
    assert record["inputs"]["model"]["name"] == "mini_vl" and len(record["inputs"]["data"]["sha256"]) == 64
    assert record["training"]["steps"] == 8 and not record["training"]["unanswered"]
    rows = read_rows(folder, "eval")
    assert [row["task"] for row in rows] == [*TASKS, *NOVEL]
    assert all(row["n"] == 6 and row["floor"] < row["ceiling"] for row in rows)
    probed = read_rows(folder, "probe")
    if cell != "blind":
        own = {row["module"] for row in probed if "encoder_attn" not in row["module"]}
        assert len(own) == 2 * 12  # query and value of six and six layers
    assert list(doctor.examine(tmp_path)) == []
    assert run_spec(made, Paths(tmp_path)) == "skipped"


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [("cider_d", 3.6, []), ("cider_d", 10.5, ["value = 10.5 is outside 0 .. 10"]),
     ("accuracy", 1.2, ["value = 1.2 is outside 0 .. 1"])],
)  # fmt: skip
def test_a_cider_above_one_is_nothing_wrong_and_an_accuracy_is(metric: str, value: float, said: list[str]) -> None:
    row = {"task": "x", "protocol": "generate", "metric": metric, "value": value}
    assert list(doctor._disorder("eval", [row])) == said
