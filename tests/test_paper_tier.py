"""The paper tier from end to end on a tiny Llama: from folders, from the hub's cache, with real items."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import arc_items, boolq_items, save_model

from dora_lab.launch.experiments import load_experiment
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import iter_runs
from dora_lab.tasks.commonsense.released_files import KNOWN

HOUSE = Path(__file__).resolve().parents[1]
REAL = HOUSE.parent / "shared" / "data" / "llm_adapters"
MODEL = "yahma/llama-7b-hf"
COMMIT = load_experiment("commonsense").PAPER[MODEL][0]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STREAMS = ("metrics", "probe", "eval")
SMALL = {  # what a processor and a model of a few thousand parameters need; everything else is the paper tier's
    "model.dtype": "float32",
    "data.train_items": 64,
    "data.test_items": 3,
    "optim.epochs": 3,
    "optim.warmup_steps": 2,
    "optim.eval_steps": 4,
    "evaluation.max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), hidden=64, positions=4096)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a clone of LLM-Adapters: the mix and the test files, of items of our own."""
    folder = tmp_path_factory.mktemp("clone")
    files: dict[str, list[dict[str, Any]]] = {
        "ft-training_set/commonsense_170k.json": [*boolq_items(150), *arc_items(100), boolq_items(1)[0]],
        "dataset/boolq/test.json": boolq_items(6, start=1000),
        "dataset/ARC-Easy/test.json": arc_items(6),
    }
    for name, items in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(items))
    return folder


def paper(
    results: Path,
    *arguments: str,
    small: dict[str, Any] | None = None,
    launch: Sequence[str] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The command that a user types, made small; `launch`: what starts its processes."""
    changes = [text for name, value in (SMALL | (small or {})).items() for text in ("--with", f"{name}={value}")]
    command = [sys.executable, *launch, "-m", "dora_lab", "run", "commonsense", "--tier", "paper"]
    return subprocess.run(
        [*command, "--results", str(results), *arguments, *changes], capture_output=True, text=True, check=False,
        cwd=HOUSE, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment, timeout=400,
    )  # fmt: skip


def test_from_folders_whole(clone: Path, model_dir: Path, tmp_path: Path) -> None:
    """LoRA and DoRA at both ranks, as a user types it; the record says what was read and what it was."""
    only = ["--only", f"model={MODEL}", "--only", "seed=0"]
    done = paper(tmp_path, "--data-dir", str(clone), "--model-dir", str(model_dir), *only)
    assert done.returncode == 0, done.stderr
    assert "3 runs: 3 complete" in done.stdout
    runs = list(iter_runs(tmp_path))
    assert sorted((record["spec"]["method"]["name"], record["spec"]["method"]["rank"]) for _, record in runs) == [
        ("dora", 16), ("dora", 32), ("lora", 32),
    ]  # fmt: skip
    for path, record in runs:
        assert record["inputs"]["items"] == {
            "train": {"commonsense_170k": 64},
            "validation": {"commonsense_170k": 120},
            "test": {"boolq": 3, "ARC-Easy": 3},
        }
        mix = next(source for source in record["inputs"]["sources"] if source["split"] == "train")
        assert (mix["items"], mix["duplicates"], mix["used"]) == (251, 1, 184)
        assert (mix["published"], mix["published_verified"], mix["agrees"]) == (170_420, False, False)
        assert mix["answer_kinds"] == {"answer": 100, "true/false": 151}
        tokens = record["inputs"]["tokens"]
        assert tokens["pad"]["id"] == 0 and tokens["adds_bos"] and tokens["padding_side"] == "left"
        assert record["training"]["kept_step"] in (4, 8, 12)
        assert {row["task"]: row["n"] for row in read_stream(path, "eval")} == {"boolq": 3, "ARC-Easy": 3}


def test_over_two_processes_as_over_one(clone: Path, model_dir: Path, tmp_path: Path) -> None:
    """torchrun with whole weights, and with shares of them: the same losses and answers; everything is written once."""
    chosen = ["--data-dir", str(clone), "--model-dir", str(model_dir), "--only", f"model={MODEL}", "--only", "seed=0"]
    small = {"optim.micro_batch_size": 8, "method.dropout": 0.0}
    for name, launch, more in (("one", (), []), ("two", TWO, []), ("shares", TWO, ["--shard"])):
        done = paper(tmp_path / name, *chosen, "--only", "rank=16", *more, small=small, launch=launch)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("1 runs: 1 complete") == 1
    runs = {name: next(iter_runs(tmp_path / name)) for name in ("one", "two", "shares")}
    told = {name: (record["processes"], record["sharded"]) for name, (_, record) in runs.items()}
    assert told == {"one": (1, False), "two": (2, False), "shares": (2, True)}
    assert len({record["spec_id"] for _, record in runs.values()}) == 1
    rows = {name: {stream: read_stream(path, stream) for stream in STREAMS} for name, (path, _) in runs.items()}
    for name in ("two", "shares"):
        for stream in STREAMS:
            assert len(rows[name][stream]) == len(rows["one"][stream]) > 0, stream
        for column in ("loss", "eval_loss"):
            one, other = ([row[column] for row in rows[n]["metrics"] if column in row] for n in ("one", name))
            assert one == pytest.approx(other, rel=1e-3)
        assert [row["prompt_sha256"] for row in rows[name]["eval"]] == [
            row["prompt_sha256"] for row in rows["one"]["eval"]
        ]
        assert sorted(file.name for file in (runs[name][0] / "adapter").iterdir()) == sorted(
            file.name for file in (runs["one"][0] / "adapter").iterdir()
        )


def test_from_the_hubs_cache(clone: Path, model_dir: Path, tmp_path: Path) -> None:
    """The same command with the model and the training mix where the hub's client keeps them, at their commits."""
    cache = tmp_path / "cache"
    shutil.copytree(model_dir, cache / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT)
    commit = "b" * 40
    mix = cache / "datasets--zwhe99--commonsense_170k" / "snapshots" / commit
    mix.mkdir(parents=True)
    shutil.copy(clone / "ft-training_set" / "commonsense_170k.json", mix / "train.json")
    tests = shutil.copytree(clone / "dataset", tmp_path / "tests")
    one = ["--data-dir", str(tests), "--only", f"model={MODEL}", "--only", "seed=0", "--only", "rank=16"]
    offline = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = paper(tmp_path, *one, small={"data.revision": commit}, **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (record for _, record in iter_runs(tmp_path) if record["status"] == "complete")
    assert record["inputs"]["model"] == {"name": MODEL, "revision": COMMIT, "sha256": None}
    assert record["inputs"]["data"] == {"name": "commonsense_170k", "revision": commit, "sha256": None}
    assert len(record["inputs"]["eval_data"]["sha256"]) == 64


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real LLM-Adapters files are not at {REAL}")
@pytest.mark.parametrize("processes", [1, 2])
def test_with_real_files(model_dir: Path, tmp_path: Path, processes: int) -> None:
    done = paper(
        tmp_path, "--data-dir", str(REAL), "--model-dir", str(model_dir), "--only", f"model={MODEL}",
        "--only", "seed=0", "--only", "rank=16",
        small={"data.name": "llm_adapters", "data.eval_name": "none", "data.cutoff": 512, "optim.micro_batch_size": 8},
        launch=TWO if processes == 2 else (),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((_, record),) = iter_runs(tmp_path)
    assert record["processes"] == processes
    sources = {(source["task"], source["split"]): source for source in record["inputs"]["sources"]}
    there = {(file.parent.name, file.stem) for file in REAL.glob("*/*.json")}
    assert {pair: (source["items"], source["agrees"]) for pair, source in sources.items()} == {
        pair: (KNOWN[pair].items, True) for pair in there
    }
    assert sources["social_i_qa", "test"]["duplicates"] == 19
    assert record["training"]["answers_cut"] <= record["training"]["shortened"]
