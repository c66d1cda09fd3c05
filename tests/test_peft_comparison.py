"""A committed run in the form of PEFT's method_comparison: the fields that its reader asks for, each true or null."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.house import RESULTS
from dora_lab.report.peft_comparison import _WHY, comparison
from dora_lab.runs import packs
from dora_lab.runs.record import read_record
from dora_lab.runs.streams import read_rows
from dora_lab.spec import SpecError, leaves

RUNS = {}
for path in packs.packed_runs(RESULTS / "runs" / "commonsense"):
    RUNS.setdefault(read_record(path)["spec"]["method"]["name"], path)

# what `preprocess` of PEFT's method_comparison/processing.py reads
ASKED = {
    "run_info": ["experiment_name", "train_config", "peft_config", "total_time", "peft_branch", "created_at"],
    "train_info": [
        "status", "metrics", "accelerator_memory_reserved_avg", "accelerator_memory_max",
        "accelerator_memory_reserved_99th", "train_time", "file_size",
    ],
    "meta_info": ["package_info", "system_info"],
}  # fmt: skip


@pytest.mark.parametrize("method", ["ft", "lora", "dora"])
def test_a_run_has_every_field_that_is_asked_for_and_a_reason_for_each_that_is_null(method: str) -> None:
    path = RUNS[method]
    found, record = comparison(path), read_record(path)
    for part, names in ASKED.items():
        assert not set(names) - set(found[part])
    last: dict[str, Any] = found["train_info"]["metrics"][-1]
    first = record["spec"]["evaluation"]["protocols"][0]
    evals = [row for row in read_rows(path, "eval") if row["protocol"] == first]
    assert found["dora_lab"]["protocol"] == first and len(evals) == len(record["spec"]["data"]["tasks"])
    assert last["test accuracy"] == pytest.approx(sum(row["value"] for row in evals) / len(evals))
    assert last["train total tokens"] == record["training"]["tokens"]
    assert last["train samples"] == record["training"]["steps"] * record["spec"]["optim"]["batch_size"]
    assert found["train_info"]["num_trainable_params"] == record["params"]["trainable"]
    assert found["run_info"]["total_time"] == pytest.approx(sum(record["seconds"].values()))
    adapter = found["run_info"]["peft_config"]
    assert (adapter is None) == (method == "ft")
    if adapter:
        assert adapter["use_dora"] == (method == "dora") and adapter["r"] == record["spec"]["method"]["rank"]
    flat = leaves({name: found[name] for name in ASKED}) | leaves(last, "train_info.metrics.0.")
    assert found["dora_lab"]["null"] == {name: _WHY[name] for name, value in flat.items() if value is None}


def test_a_base_model_has_none() -> None:
    with pytest.raises(SpecError, match="give a complete run that was trained"):
        comparison(RUNS["base"])


def test_the_command_prints_it() -> None:
    done = CliRunner().invoke(app, ["card", RUNS["dora"].name, "--peft"])
    assert json.loads(done.stdout) == comparison(RUNS["dora"])
