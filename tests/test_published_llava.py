"""LLaVA's released adapter, as its authors' code writes it, verified on its base: read, merged, scored, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_benchmarks import save_benchmarks
from tiny_llava import save_as_the_authors, save_llava
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab import inject, save_adapter
from dora_lab.forms.llava import Llava
from dora_lab.methods.inject import merge
from dora_lab.models.base import hash_adapter
from dora_lab.models.llava import open_llava
from dora_lab.paper.released_adapter import SERVER, compare
from dora_lab.runs.record import read_record
from dora_lab.tasks import load_task
from experiments.visual_instruction import BASE, adapter

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ("evaluation.max_new_tokens=4", "evaluation.task_new_tokens=science_qa=6", "evaluation.dtype=own")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("published")
    save_llava(where / BASE)
    save_benchmarks(where / "data" / "eval")
    model = tuned(where)
    save_adapter(model, where / "peft")
    save_as_the_authors(where / "peft", where / "authors")
    return where


def tuned(where: Path) -> Any:
    model, _ = open_llava(where / BASE)
    inject(model, adapter("dora", rank=4), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1))
    return model.eval()


def go(folder: Path, results: Path, *more: str) -> Any:
    words = ["verify-published", folder / "authors", "--base", folder / BASE, "--data-dir", folder / "data"]
    changes = [part for text in FAST for part in ("--with", text)]
    return CliRunner().invoke(command.app, [*map(str, [*words, "--results", results]), *changes, *more])


def test_its_answers_are_those_of_the_live_model(folder: Path, tmp_path: Path) -> None:
    done = go(folder, tmp_path, "--allow-pickle")
    assert done.exception is None or isinstance(done.exception, SystemExit), (done.output, done.exception)
    assert "DoRA, rank 4" in done.output and SERVER in done.output
    (path,) = (tmp_path / "runs" / "published").iterdir()
    record = read_record(path)
    assert record["inputs"]["adapter"]["sha256"] == hash_adapter(folder / "authors")
    assert record["spec"]["model"]["family"] == "llava" and record["spec"]["optim"] is None
    trained = [name for name, one in tuned(folder).named_parameters() if one.requires_grad]
    sizes = dict(tuned(folder).named_parameters())
    assert record["params"]["trainable"] == sum(sizes[name].numel() for name in trained)
    assert any("multi_modal_projector" in name for name in trained)
    said = {
        task: [json.loads(line) for line in (path / "samples" / f"{task}.generate.jsonl").read_text().splitlines()]
        for task in ("gqa_testdev", "pope", "science_qa")
    }
    base, processor = open_llava(folder / BASE)
    model, form = merge(tuned(folder), keep=False), Llava(processor)
    for task, samples in said.items():
        read = load_task(task).read
        assert read is not None
        items = read(folder / "data" / "eval", "test")
        tokens = 6 if task == "science_qa" else 4
        wanted = form.answers(model, items, 8, tokens)  # type: ignore[arg-type]
        assert [sample["output"] for sample in samples] == wanted
        assert wanted != form.answers(base.eval(), items, 8, tokens)  # the adapter does something


def test_a_pickle_is_read_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    done = go(folder, tmp_path)
    assert done.exit_code != 0 and "a pickle can run code" in str(done.exception)


PAPER = {"gqa_testdev": 0.629, "science_qa": 0.699, "text_vqa": 0.570, "pope": 0.872, "mmbench": 0.661}


@pytest.mark.parametrize(("pope", "verdict"), [(0.872, "equivalent"), (0.80, "does not hold")])
def test_beside_table_12(pope: float, verdict: str, tmp_path: Path) -> None:
    rows = []
    for task, value in (PAPER | {"pope": pope, "vqav2_test_dev": None, "vizwiz_test": None}).items():
        n = load_task(task).released_items
        rows.append({"task": task, "protocol": "generate", "metric": "m", "value": value, "n": n, "chance": None,
                     "n_unparsed": None if value is None else 0})  # fmt: skip
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(tmp_path, "DoRA", 128, "LLaVA-1.5-7B", "visual_instruction").set_index("task")
    assert found.loc["POPE", "verdict"] == verdict and found.loc["GQA", "verdict"] == "equivalent"
    assert found.loc["POPE", "paper"] == 87.2 and found.loc["VQAv2", "paper"] == 78.6
    assert found.loc["VQAv2", "verdict"] == SERVER and pd.isna(found.loc["average", "verdict"])
