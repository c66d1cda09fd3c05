"""Fixtures: one thread of torch, and a synthetic results tree with plausible numbers for the reading side."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_data, save_model

from dora_lab import spec as specs

TASKS = {
    "boolq": 0.5,
    "piqa": 0.5,
    "social_i_qa": 1 / 3,
    "hellaswag": 0.25,
    "winogrande": 0.5,
    "ARC-Easy": 0.25,
    "ARC-Challenge": 0.25,
    "openbookqa": 0.25,
}
HIDE = """import importlib.machinery
_find = importlib.machinery.PathFinder.find_spec
def _without(name, path=None, target=None):
    return None if name.partition(".")[0] in {packages} else _find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(_without)
"""
METHODS: dict[
    str, tuple[str, int | None, float, float]
] = {  # label: name, rank, skill above chance, trainable fraction
    "Base": ("base", None, 0.0, 0.0),
    "FT": ("ft", None, 0.62, 1.0),
    "LoRA": ("lora", 8, 0.55, 0.041),
    "DoRA": ("dora", 8, 0.64, 0.043),
    "DoRA†": ("dora", 4, 0.60, 0.022),
}
TOTAL = 1_300_000
ITEMS = 120


def make_spec(name: str, rank: int | None, seed: int, **changes: Any) -> dict[str, Any]:
    """A spec as record.json holds it; `changes` are dotted paths with __ for the dot."""
    spec: dict[str, Any] = {
        "experiment": "commonsense",
        "tier": "mini",
        "seed": seed,
        "model": {"name": "mini", "revision": None, "dtype": "float32"},
        "data": {
            "name": "mini",
            "tasks": list(TASKS),
            "sha256": None,
            "revision": None,
            "train_items": 6400,
            "validation_items": 0,
            "test_items": ITEMS,
            "template": "clean",
            "cutoff": 256,
            "train_on_prompt": False,
            "eval_name": None,
        },
        "method": {
            "name": name,
            "rank": rank,
            "alpha": None if rank is None else 2.0 * rank,
            "dropout": 0.0,
            "dropout_form": "published",
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "detach_norm": True,
        },
        "optim": None
        if name == "base"
        else {
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_steps": 20,
            "batch_size": 32,
            "micro_batch_size": 32,
            "epochs": 1.0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "keep": "last",
            "eval_steps": None,
        },
        "probe": None if name == "base" else {"fractions": [0.25, 0.5, 0.75, 1.0]},
        "evaluation": {
            "protocols": ["generate", "loglikelihood"],
            "split": "test",
            "num_beams": 1,
            "max_new_tokens": 32,
            "batch_size": 32,
        },
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = spec
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return spec


def write_run(
    results: Path,
    spec: dict[str, Any],
    skill: float = 0.5,
    trainable: float = 0.04,
    status: str = "complete",
    correct: bool = True,
    commit: str = "0123456789abcdef",
    flip: int = 0,
) -> Path:
    """One run directory of schema 1; `flip` inverts that many answers of the first task."""
    spec_id = specs.spec_id(specs.from_dict(spec))
    folder = results / "runs" / spec["experiment"] / spec_id
    folder.mkdir(parents=True)
    record = {
        "schema": 1,
        "spec": spec,
        "spec_id": spec_id,
        "status": status,
        "error": None,
        "code": {"commit": commit, "diff": None},
        "machine": {"cpu": "synthetic"},
        "packages": {"torch": "2.13.0"},
        "inputs": {},
        "peak_memory_bytes": 1,
        "params": {"trainable": int(trainable * TOTAL), "total": TOTAL},
        "seconds": {"train": 41.5},
    }
    (folder / "record.json").write_text(json.dumps(record))
    name, seed = spec["method"]["name"], spec["seed"]
    rng = np.random.default_rng([seed, *name.encode(), spec["method"]["rank"] or 0])
    streams: dict[str, list[dict[str, Any]]] = {
        "eval": _eval_rows(spec, skill, correct, flip),
        "metrics": [],
        "probe": [],
    }
    if name != "base":
        streams["metrics"] = [
            {
                "step": s,
                "tokens": s * 3200,
                "loss": 2.0 / s,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "seconds": 0.2 * s,
            }
            for s in (1, 100, 200)
        ]
        streams["probe"] = _probe_rows(spec, rng) if spec["probe"] else []
    for stream, rows in streams.items():
        (folder / f"{stream}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _eval_rows(spec: dict[str, Any], skill: float, correct: bool, flip: int) -> list[dict[str, Any]]:
    rows = []
    for k, task in enumerate(spec["data"]["tasks"]):
        chance = TASKS[task]
        hardness = np.random.default_rng(k).random(ITEMS)  # the items are the same for all runs
        for protocol in spec["evaluation"]["protocols"]:
            rng = np.random.default_rng([spec["seed"], k, int(1000 * skill), protocol == "generate"])
            p = np.clip(chance + skill * (1 - chance) + 0.5 * (0.5 - hardness), 0.02, 0.98)
            bits = rng.random(ITEMS) < p
            if task == "boolq":
                bits[:flip] = ~bits[:flip]
            value = float(bits.mean())
            row = {
                "task": task,
                "protocol": protocol,
                "metric": "accuracy",
                "value": value,
                "stderr": float(np.sqrt(value * (1 - value) / ITEMS)),
                "n": ITEMS,
                "n_unparsed": int(rng.integers(0, 4)) if protocol == "generate" else None,
                "chance": chance,
                "majority": chance + 0.01,
                "prompt_sha256": hashlib.sha256(task.encode()).hexdigest(),
            }
            rows.append(row | ({"correct": "".join("01"[int(b)] for b in bits)} if correct else {}))
    return rows


def _probe_rows(spec: dict[str, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
    slope = {"ft": -0.4, "lora": 1.0, "dora": -0.5}[spec["method"]["name"]]
    size = {"ft": 0.02, "lora": 0.12, "dora": 0.09}[spec["method"]["name"]]
    rows = []
    for fraction in spec["probe"]["fractions"]:
        for layer in range(4):
            for kind in ("q_proj", "k_proj", "v_proj"):
                d = size * (0.5 + 0.5 * fraction) * (1 + 0.2 * layer + 0.15 * rng.normal())
                m = 2 * size * (1 + slope * (d / size - 1) + 0.1 * rng.normal())
                rows.append(
                    {
                        "step": int(200 * fraction),
                        "fraction": fraction,
                        "layer": layer,
                        "kind": kind,
                        "module": f"model.layers.{layer}.self_attn.{kind}",
                        "delta_m": float(abs(m)),
                        "delta_d": float(abs(d)),
                        "relative_change": float(d),
                    }
                )
    return rows


def write_tree(results: Path, seeds: tuple[int, ...] = (0, 1, 2), **options: Any) -> Path:
    """All methods and seeds of the mini experiment below results/runs; base once. Returns `results`."""
    for name, rank, skill, trainable in METHODS.values():
        for seed in seeds if name != "base" else seeds[:1]:
            write_run(results, make_spec(name, rank, seed), skill=skill, trainable=trainable, **options)
    return results


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch adds up in one order, and leaves the other core to the other tests."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and data/ of a tiny run, as `tiny` writes them."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    save_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def synthetic_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/ with runs/ of base, FT, LoRA, DoRA, DoRA half rank, three seeds, plus one failed and one interrupted."""
    results = write_tree(tmp_path_factory.mktemp("synthetic") / "results")
    write_run(results, make_spec("lora", 8, 3), status="failed")
    write_run(results, make_spec("dora", 8, 3), status="interrupted")
    return results


def times(factor: float, *fields: str) -> Callable[[list[dict[str, Any]]], Any]:
    """What multiplies fields of every row of a stream."""
    return lambda rows: [row.update({field: row[field] * factor}) for row in rows for field in fields]


@pytest.fixture
def run_writer() -> Callable[..., Path]:
    """The function that writes one synthetic run directory."""
    return write_run


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _no_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts the tests may say how wide its terminal is; tables are as wide as in a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _processes_without_bitsandbytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests start is installed as a user's, without it: peft imports it where it is, two seconds of a core."""
    hiding = tmp_path_factory.mktemp("site")
    (hiding / "sitecustomize.py").write_text(HIDE.format(packages=("bitsandbytes",)))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(hiding), os.environ.get("PYTHONPATH"))))
