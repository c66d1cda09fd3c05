"""What stands between saved models and their rows: pickles, ties, changed bytes, headers of any kind, memory."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_measure import check, dense, gpt2, llama, moved, weights
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import dora_lab
from dora_lab import __main__ as command
from dora_lab.formats.live import save_adapter
from dora_lab.formats.shards import FLOATS, Shards
from dora_lab.io.errors import CheckpointError
from dora_lab.probing.saved_models import probe
from dora_lab.spec import Method


def test_pickled_models_only_if_asked(tmp_path: Path) -> None:
    before, after = llama(), moved(llama(), 1e-3)
    for name, model in (("base", before), ("tuned", after)):
        (tmp_path / name).mkdir()
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
        model.config.save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"only pickled weights .* or allow it with --allow-pickle"):
        list(probe(tmp_path / "base", [tmp_path / "tuned"]))
    rows = list(probe(tmp_path / "base", [tmp_path / "tuned"], kinds=("q_proj",), allow_pickle=True))
    for row in rows:
        check(row, weights(before)[row["module"]], weights(after)[row["module"]])
    (tmp_path / "tuned" / "pytorch_model.bin").write_bytes(pickle.dumps({"a.weight": print}))
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        list(probe(tmp_path / "base", [tmp_path / "tuned"], allow_pickle=True))


@pytest.mark.parametrize("twice", [False, True])
def test_tied_weights_are_counted_once(twice: bool, tmp_path: Path) -> None:
    for name, model in (
        ("base", llama(tie_word_embeddings=True)),
        ("tuned", moved(llama(tie_word_embeddings=True), 1e-3)),
    ):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        if twice:
            save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    (row,) = probe(tmp_path / "base", [tmp_path / "tuned"], kinds=("embed_tokens",))
    assert (row["module"], row["tied_with"]) == ("model.embed_tokens", "lm_head")
    with pytest.raises(CheckpointError, match=r"'lm_head' is tied to 'model\.embed_tokens' and counted as that"):
        list(probe(tmp_path / "base", [tmp_path / "tuned"], kinds=("lm_head",)))


def test_weights_that_differ_are_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    """Transformers loads what is stored twice and differs as two weights: so they are here."""
    for name, model in (("base", llama()), ("tuned", moved(llama(), 1e-3))):
        model.config.tie_word_embeddings = True
        model.save_pretrained(tmp_path / name)
    kinds = ("embed_tokens", "lm_head")
    rows = {row["kind"]: row for row in probe(tmp_path / "base", [tmp_path / "tuned"], kinds=kinds)}
    before, after = (dense(LlamaForCausalLM, tmp_path / name) for name in ("base", "tuned"))
    check(rows["lm_head"], before["lm_head"], after["lm_head"])
    check(rows["embed_tokens"], before["model.embed_tokens"].t(), after["model.embed_tokens"].t())
    assert [row["tied_with"] for row in rows.values()] == [None, None]


def hub(folder: Path, name: str, source: Path) -> Path:
    """The hub's cache as it is after `source` was fetched: files are links to blobs that are named by their hash."""
    place = folder / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    for part in ("blobs", "refs"):
        (place / part).mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    for file in source.iterdir():
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_hub_ids_and_changed_bytes(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub(tmp_path, "some/base", saved / "base")
    snapshot = hub(tmp_path, "some/tuned", saved / "tuned")
    rows = list(probe("some/base", ["some/tuned"], kinds=("q_proj",), verify=True))
    assert [row["delta_d"] for row in rows] == [
        row["delta_d"] for row in probe(saved / "base", [saved / "tuned"], kinds=("q_proj",))
    ]
    blob = next(iter(sorted(snapshot.glob("*.safetensors")))).resolve()
    blob.write_bytes(blob.read_bytes()[:-40] + bytes(40))  # in the last numbers
    with pytest.raises(CheckpointError, match="changed since it was saved"):
        list(probe("some/base", ["some/tuned"], kinds=("q_proj",), verify=True))
    with pytest.raises(CheckpointError, match="cannot be verified"):
        list(probe("some/base", [saved / "tuned"], verify=True))
    with pytest.raises(CheckpointError, match="model 'some/other' at revision main is not in the hub's cache"):
        list(probe("some/other", ["some/tuned"]))


def test_an_adapter_that_changed_since_its_manifest(saved: Path, tmp_path: Path) -> None:
    model = llama()
    dora_lab.inject(model, Method(name="lora", rank=2, alpha=4.0, target_modules=("q_proj",)), seed=0)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\x40")  # one number, finite
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: missing or changed since"):
        list(probe(saved / "base", [tmp_path]))


LIMITED = """
import resource, sys
import transformers.models.llama.modeling_llama, transformers.models.auto.modeling_auto
import transformers.conversion_mapping
from dora_lab.probing.saved_models import probe
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20,) * 2)
try:
    bytearray(32 * 2**20)
    sys.exit("there is no limit")
except MemoryError:
    pass
print(len(list(probe(sys.argv[1], sys.argv[2:]))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
def test_a_model_larger_than_the_memory_limit(tmp_path: Path) -> None:
    """48 MB twice, and an adapter, with 24 MB to be had: no file is held, mapped or read whole."""
    source = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(24)]
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, num_hidden_layers=24, intermediate_size=8)
    base = {f"{name}.weight": torch.randn(1024, 1024, generator=source).bfloat16() for name in names}
    for folder, scale in (("base", 1.0), ("tuned", 1.01)):
        (tmp_path / folder).mkdir()
        save_file({name: W * scale for name, W in base.items()}, tmp_path / folder / "model.safetensors")
        config.save_pretrained(tmp_path / folder)
    environment = {"PYTHONPATH": str(Path(dora_lab.__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": ""}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "base"), str(tmp_path / "tuned")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.split()[-1] == "24", done.stderr[-800:]


FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "a"])
HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner),
)
PLACES = st.sampled_from(["model.safetensors", "../x", "", ".", "no", "a\0b"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.binary(max_size=80) | st.dictionaries(st.text(max_size=4), HEADERS, max_size=3)
    | st.fixed_dictionaries({"a": st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16", "I8", "Q9"]), "shape": st.lists(st.integers(-1, 5), max_size=3),
        "data_offsets": st.tuples(st.integers(-1, 50), st.integers(-1, 50))})}),
    length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=40),
)  # fmt: skip
def test_headers_of_any_kind(header: Any, length: int | None, data: bytes, tmp_path: Path) -> None:
    """A file is read as what the library reads, or refused in one line: never a traceback, never other numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    try:
        shards = Shards(tmp_path)
    except CheckpointError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    try:
        expected = load_file(file)
    except Exception:
        assert all(shards.dtype(name) not in FLOATS for name in shards)  # types that this version does not know
        return
    assert set(shards) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(shards.tensor(name).view(torch.uint8), tensor.view(torch.uint8)) or not tensor.numel()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.binary(max_size=40) | HEADERS | st.fixed_dictionaries(
        {"weight_map": HEADERS | st.dictionaries(st.sampled_from(["a.weight", "b", ""]), PLACES | HEADERS)}
    ),
)  # fmt: skip
def test_indices_of_any_kind(index: Any, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    try:
        assert set(Shards(tmp_path)) <= {"a.weight"}
    except CheckpointError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)


# --- what is refused, and what is not lost


def test_one_bad_model_does_not_lose_the_others(tmp_path: Path) -> None:
    base, good, bad = (tmp_path / name for name in ("base", "good", "bad"))
    llama().save_pretrained(base)
    moved(llama(), 0.01).save_pretrained(good)
    shutil.copytree(good, bad)
    (bad / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    run = CliRunner().invoke(
        command.app,
        ["probe", *map(str, (base, bad, good)), "--kinds", "q_proj,v_proj", "--out", str(tmp_path / "rows.csv"),
         "--plot", str(tmp_path / "scatter.png")],
    )  # fmt: skip
    assert run.exit_code == 2 and "bad/model.safetensors: a git-LFS pointer" in run.output
    frame = pd.read_csv(tmp_path / "rows.csv")
    assert len(frame) == 6 and set(frame["tuned"]) == {str(good)}
    assert (tmp_path / "scatter.png").stat().st_size > 5000
    for ending in ("jsonl", "parquet"):
        assert CliRunner().invoke(command.app, ["probe", str(base), str(good), "--out", f"{tmp_path}/rows.{ending}"])
        read = pd.read_json if ending == "jsonl" else pd.read_parquet
        kept = read(f"{tmp_path}/rows.{ending}", **({"lines": True} if ending == "jsonl" else {}))
        both = kept[kept["kind"].isin(["q_proj", "v_proj"])].reset_index(drop=True)
        assert both["delta_d"].tolist() == pytest.approx(frame["delta_d"].tolist(), rel=1e-9)


def change_index(folder: Path, **values: str) -> None:
    file = folder / "model.safetensors.index.json"
    table = json.loads(file.read_text())
    table["weight_map"] |= values
    file.write_text(json.dumps(table))


def retensor(folder: Path, name: str, new: Tensor | None) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors.pop(name) if new is None else tensors.update({name: new})
            save_file(tensors, file)


Q = "model.layers.0.self_attn.q_proj.weight"
WRONG: dict[str, tuple[Any, str]] = {
    "no model": (lambda f: shutil.rmtree(f) or f.mkdir(), "no model, adapter, checkpoint-N or run in it"),
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "outside": (lambda f: change_index(f, odd="../other.safetensors"), "names a file outside its folder"),
    "lost shard": (lambda f: change_index(f, odd="model-9.safetensors"), "model-9.safetensors: no such file"),
    "lost tensor": (lambda f: retensor(f, Q, None), f"'{Q}' should be in it and is not"),
    "not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "cannot be read as JSON"),
    "no table": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "not an index of shards"),
    "shape": (lambda f: retensor(f, Q, torch.zeros(3, 32)), r"is \(3, 32\), in the base \(32, 32\): another base"),
    "nan": (lambda f: retensor(f, Q, torch.full((32, 32), torch.nan)), "holds numbers that are not finite"),
    "quantised": (lambda f: retensor(f, Q, torch.ones(32, 32, dtype=torch.int8)), "is I8, not floating point"),
    "cut": (
        lambda f: [s.write_bytes(s.read_bytes()[:-9]) for s in f.glob("*.safetensors")],
        "not a whole safetensors file",
    ),
    "page": (lambda f: [s.write_text("<html>") for s in f.glob("*.safetensors")], "a web page, not weights"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    llama().save_pretrained(folder / "base", max_shard_size="8KB")
    moved(llama(), 0.01).save_pretrained(folder / "tuned", max_shard_size="8KB")
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_models_that_cannot_be_used_say_why(name: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(saved / "tuned", folder)
    spoil, words = WRONG[name]
    spoil(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        list(probe(saved / "base", [folder]))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_requests_are_refused_at_once(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no matrix is named 'q_prj'; did you mean 'q_proj'"):
        list(probe(saved / "base", [saved / "tuned"], kinds=("q_prj",)))
    for option, words in (
        (("--out", "rows.xlsx"), "must end in .csv"),
        (("--plot", "no/such/a.png"), "does not exist"),
    ):
        run = CliRunner().invoke(command.app, ["probe", str(saved / "base"), str(saved / "tuned"), *option])
        assert words in str(run.exception)
    model = llama()
    dora_lab.inject(model, Method(name="lora", rank=2, alpha=4.0, target_modules=("q_proj",)), seed=0)
    save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no 'model.layers.0.self_attn.q_proj.weight': is it the right base"):
        gpt2().save_pretrained(tmp_path / "other")
        list(probe(tmp_path / "other", [tmp_path]))
