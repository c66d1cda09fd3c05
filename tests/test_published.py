"""Released adapters: read in each format, evaluated as they were trained, and compared with the right cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_spec, save_data, save_model
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab.evaluation.evaluate import evaluate
from dora_lab.formats.live import save_adapter
from dora_lab.io.errors import LoadError
from dora_lab.launch import released_adapter
from dora_lab.methods.inject import inject
from dora_lab.models.base import adapter_folder, hash_adapter, model_and_tokenizer
from dora_lab.paper import released_adapter as comparison
from dora_lab.runs.directory import RunDir
from dora_lab.runs.record import read_record, run_path
from dora_lab.runs.streams import read_stream
from dora_lab.tasks import sources

FAST = ["--with", "model.dtype=float32", "--with", "evaluation.max_new_tokens=8", "--with", "evaluation.num_beams=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its data, and one DoRA of rank 16 on it in PEFT's format, the authors', and the authors' pickled."""
    folder = tmp_path_factory.mktemp("published")
    save_model(folder / "base", hidden=64, positions=1024)
    save_data(folder / "data", test=6)
    spec = make_spec(method__rank=16, method__alpha=32.0)
    model, _ = model_and_tokenizer(spec, folder / "base")
    inject(model, spec.method, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1))
                assert "lora" in name or "magnitude" in name
    for format in ("peft", "authors"):
        save_adapter(model, folder / format, format=format)
        (folder / format / "dora_lab.json").unlink()  # files of others have no manifest
    pickled = folder / "pickled"
    pickled.mkdir()
    from safetensors.torch import load_file

    torch.save(load_file(folder / "authors" / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_config.json").write_text((folder / "authors" / "adapter_config.json").read_text())
    return folder


def go(folder: Path, adapter: str, results: Path, *more: str) -> Any:
    return CliRunner().invoke(
        command.app,
        ["verify-published", str(folder / adapter), "--base", str(folder / "base"), "--data-dir", str(folder / "data"),
         "--results", str(results), *FAST, *more],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*dora_lab.json.*")
def test_every_format_gives_what_the_live_model_gives(folder: Path, tmp_path: Path) -> None:
    found = {}
    for adapter in ("peft", "authors", "pickled"):
        done = go(folder, adapter, tmp_path / adapter, "--allow-pickle")
        assert done.exit_code == 0, (done.output, done.exception)
        assert "DoRA, rank 16" in done.output and "no number in the paper" in done.output
        (path,) = (tmp_path / adapter / "runs" / "published").iterdir()
        found[adapter] = [
            (row["task"], row["value"], row["n_unparsed"], row["correct"]) for row in read_stream(path, "eval")
        ]
        record = read_record(path)
        assert record["inputs"]["adapter"]["sha256"] == hash_adapter(folder / adapter)
        assert record["params"]["trainable"] == 2 * 2 * (2 * 16 * 64 + 64)
        samples = [json.loads(line) for line in (path / "samples" / "boolq.generate.jsonl").read_text().splitlines()]
        found[f"{adapter} texts"] = [sample["output"] for sample in samples]
    assert found["peft"] == found["authors"] == found["pickled"]
    assert found["peft texts"] == found["authors texts"] == found["pickled texts"] == live(folder, tmp_path, True)
    assert found["peft texts"] != live(folder, tmp_path, False)  # the adapter does something
    (scores,) = (tmp_path / "peft").glob("runs/published/*/eval.jsonl")
    scores.write_text(scores.read_text().replace('"n_unparsed": ', '"n_unparsed":  ', 1))
    again = go(folder, "peft", tmp_path / "peft")
    assert again.exit_code != 0 and "is not what it was when the run was finished" in str(again.exception)


def live(folder: Path, tmp_path: Path, with_adapter: bool) -> list[str]:
    """Texts of the model with its adapter on, not merged, by the same protocol."""
    from dora_lab.formats.live import load_adapter

    spec = make_spec(
        data__template="published", evaluation__protocols="generate", evaluation__max_new_tokens=8,
        evaluation__num_beams=2, seed=int(with_adapter),
    )  # fmt: skip
    model, tokenizer = model_and_tokenizer(spec, folder / "base")
    if with_adapter:
        load_adapter(model, folder / "peft")
    with RunDir.open(tmp_path, spec) as run:
        evaluate(spec, model, tokenizer, sources.items(spec, folder / "data").test, run)
    file = run_path(tmp_path, spec) / "samples" / "boolq.generate.jsonl"
    return [json.loads(line)["output"] for line in file.read_text().splitlines()]


def test_a_pickle_is_read_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    done = go(folder, "pickled", tmp_path)
    assert done.exit_code != 0 and "a pickle can run code" in str(done.exception)


def test_an_adapter_that_changed_is_not_the_specs(folder: Path) -> None:
    spec = make_spec(method__name="lora").model
    from dataclasses import replace

    with pytest.raises(LoadError, match=r"has the fingerprint .* the spec asks for 000000000000"):
        adapter_folder(replace(spec, adapter="peft", adapter_revision="0" * 12), folder / "peft")


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no adapter_config\.json"):
        hash_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(LoadError, match="no adapter configuration with a rank"):
        released_adapter.describe(tmp_path)


PAPER = {
    "boolq": (70.0, 3270), "piqa": (82.6, 1838), "social_i_qa": (79.7, 1954), "hellaswag": (83.2, 10042),
    "winogrande": (80.6, 1267), "ARC-Easy": (80.6, 2376), "ARC-Challenge": (65.4, 1172), "openbookqa": (77.6, 500),
}  # fmt: skip


def run_with(tmp_path: Path, changed: dict[str, dict[str, Any]]) -> Path:
    """A run whose rows are table 1's LLaMA-7B DoRA of rank 16, but for what is changed."""
    lines = []
    for task, (percent, n) in PAPER.items():
        row = {"task": task, "protocol": "generate", "value": round(percent / 100 * n) / n, "n": n, "n_unparsed": 0}
        lines.append(json.dumps(row | {"chance": 0.25} | changed.get(task, {})))
    (tmp_path / "eval.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "verdict", "words"),
    [
        ({}, "equivalent", "give the paper's numbers to within 0.0 points"),
        ({"boolq": {"value": 0.704}}, "equivalent", "to within 0.4 points"),
        ({"boolq": {"value": 0.60}}, "does not hold", "Differs from the paper: BoolQ"),
        ({"boolq": {"value": 0.66, "n": 100}}, "undecided", "not all released items were asked"),
        ({"boolq": {"value": 0.40, "n": 100}}, "does not hold", "Differs from the paper: BoolQ"),
    ],
)
def test_verdicts(changed: dict[str, Any], verdict: str, words: str, tmp_path: Path) -> None:
    rows = comparison.compare(run_with(tmp_path, changed), "DoRA", 16, "LLaMA-7B")
    assert list(rows["paper"][:8]) == [percent for percent, _ in PAPER.values()] and rows["paper"][8] == 77.5
    assert rows["verdict"][0] == verdict
    assert words in comparison.summary(rows)


def test_flags_and_unknown_cells(tmp_path: Path) -> None:
    changed = {"boolq": {"value": 0.023, "n_unparsed": 3000}}
    rows = comparison.compare(run_with(tmp_path, changed), "LoRA", 4, "LLaMA-7B")
    assert rows["paper"][0] == 2.3 and rows["flags"][0] == "unparsed above 1 %, below chance"
    nowhere = comparison.compare(run_with(tmp_path, {}), "DoRA", 7, "LLaMA-7B")
    assert set(nowhere["verdict"]) == {"no number in the paper"} and nowhere["paper"].isna().all()
    assert "nothing is verified" in comparison.summary(nowhere)
    again = comparison.compare(run_with(tmp_path, {}), "DoRA", 64, "LLaMA-7B")
    assert again["elsewhere"][8] == [76.8] and again["paper"][8] == 72.1


def test_a_hub_adapter_has_to_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from dataclasses import replace

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = replace(make_spec().model, adapter="org/weights:llama/r32")
    with pytest.raises(LoadError, match=r"'org/weights': revision None is no commit.*then --revision COMMIT"):
        adapter_folder(model)
    snapshot = tmp_path / "models--org--weights" / "snapshots" / ("d" * 40)
    below = snapshot / "llama" / "r32"
    below.mkdir(parents=True)
    pinned = replace(model, adapter_revision="d" * 40)
    with pytest.raises(LoadError, match=r"no adapter_config\.json"):
        adapter_folder(pinned)
    (below / "adapter_config.json").write_text("{}")
    (below / "adapter_model.bin").write_bytes(b"")
    assert adapter_folder(pinned) == below
    shutil.rmtree(snapshot)
    with pytest.raises(LoadError, match=r"could not be fetched.*--include 'llama/r32/adapter_config\.json'"):
        adapter_folder(pinned)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--paper-model", "LLaMA-7b"], "no model of the paper's; did you mean 'LLaMA-7B'"),
        (["--with", "evaluation.protocols=loglikelihood"], "the paper's numbers are of generated answers"),
        (
            ["--base", "/nowhere/base"],
            "--base /nowhere/base: no such folder; of a hub id give the commit, too",
        ),
        (["--with", "data.name=mini"], "--with data.name: what is asked is what --data-dir holds"),
        (["--data-dir", "/nowhere/data"], "/nowhere/data: no such folder"),
        (["--data-dir", __file__], "test_published.py is a file; give the folder that it is in"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_evaluated(
    more: list[str], words: str, folder: Path, tmp_path: Path
) -> None:
    done = go(folder, "peft", tmp_path, *more)
    assert words in str(done.exception) and not [*tmp_path.glob("runs/published/*/record.json")]
    gone = go(folder, "nowhere/peft", tmp_path)
    assert "peft: no such folder; of a hub id give the commit, too: --revision COMMIT" in str(gone.exception)


def test_an_adapter_of_several_ranks_is_no_cell_of_the_papers(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 32, "rank_pattern": {"q_proj": 2}}
    for pattern, rank in (({"q_proj": 2}, None), ({"q_proj": 32}, 32), ({}, 32), ({"q_proj": [2]}, None)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": pattern}))
        assert released_adapter.describe(tmp_path) == released_adapter.Adapter("LoRA", rank)
    rows = comparison.compare(run_with(tmp_path, {}), "LoRA", None, "LLaMA-7B")
    assert set(rows["verdict"]) == {"no number in the paper"} and rows["paper"].isna().all()
