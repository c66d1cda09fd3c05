"""Files of others, read or refused: headers that look like something else, adapters that lost a part, hostile sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dora_lab.__main__ import app
from dora_lab.formats.live import load_adapter
from dora_lab.formats.read import read_adapter, read_tensors
from dora_lab.formats.shards import Shards
from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import header, metadata

Q = "lora_unet_model_layers_0_self_attn_q_proj"


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


@pytest.mark.parametrize("length", [640, 1152, 15392, 640 + 65536])
def test_a_header_whose_length_looks_like_another_file_is_read(length: int, tmp_path: Path) -> None:
    """Its first bytes are then a pickle's, a web page's: the safetensors library reads it."""
    file, plain, pad = tmp_path / "a.safetensors", {"a": torch.ones(2, 2)}, length - 200
    while not file.exists() or int.from_bytes(file.read_bytes()[:8], "little") < length:
        pad += 1
        save_file(plain, file, metadata={"note": "n" * pad})
    assert int.from_bytes(file.read_bytes()[:8], "little") == length and torch.equal(load_file(file)["a"], plain["a"])
    assert header(file) == {"a": ("F32", (2, 2))} and metadata(file) == {"note": "n" * pad}
    assert torch.equal(read_tensors(file)["a"], plain["a"])


@pytest.mark.parametrize("said", ["True", "False"])
def test_lycoris_that_lost_its_magnitudes_is_not_taken_for_lora(said: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {f"{Q}.lora_down.weight": torch.ones(2, 16), f"{Q}.lora_up.weight": torch.ones(16, 2)}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"ss_network_args": json.dumps({"algo": "lora", "dora_wd": said})})
    if said == "True":
        with pytest.raises(CheckpointError, match=rf"'{Q}': has no dora_scale, but the file's metadata says dora_wd"):
            load_adapter(llama(), file)
    else:
        W0 = llama().model.layers[0].self_attn.q_proj.weight
        layer = load_adapter(llama(), file).get_submodule("model.layers.0.self_attn.q_proj")
        assert torch.allclose(layer.effective_weight(), W0 + torch.full((16, 16), 2.0))


def peft_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(4, 16), f"{key}.lora_B.weight": torch.ones(16, 4)},
        folder / "adapter_model.safetensors",
    )
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


SLOW = ["(.+)+!", "(a|a)*b", "(.*)*(.*)*!", "((.?){9}){9}x", ".*.*.*.*.*.*!", ".?" * 40 + "!"]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_could_take_for_ever_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: rank_pattern: .* too many ways"):
        read_adapter(peft_folder(tmp_path / "a", rank_pattern={pattern: 4}))


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [
        ("q_proj", 4),
        (r"model\.layers\.0\.self_attn\.q_proj", 4), (r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k)_proj", 4),
        (r"layers\.([0-9]|1[0-9])\..*q_proj", 4), ("^model.*_proj", 4), (r"layers\.(?!1)\d\.self_attn\.q_proj", 4),
        ("k_proj", 8),
    ],
)  # fmt: skip
def test_patterns_that_people_write_are_read_as_peft_reads_them(pattern: str, rank: int, tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    name = "model.layers.0.self_attn.q_proj"
    matches = get_pattern_key([pattern], name) == pattern
    assert matches == (pattern != "k_proj")
    found = read_adapter(peft_folder(tmp_path / "a", r=4 if rank == 8 else 8, rank_pattern={pattern: rank}))
    assert found.layers[name].scaling == 8 / 4


def test_more_patterns_than_modules_could_need_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="alpha_pattern: 100000 patterns"):
        read_adapter(peft_folder(tmp_path / "a", alpha_pattern={f"m{i}": 8 for i in range(100_000)}))


def test_an_index_of_more_shards_than_files_is_refused_at_once(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model-0.safetensors")
    names = {f"t{i}.weight": f"model-{i}.safetensors" for i in range(100_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"names 100000 shards, the folder has 2 files"):
        Shards(tmp_path)


def test_a_name_in_a_file_steers_no_terminal(tmp_path: Path) -> None:
    """A tensor whose name would set the title of the window."""
    llama().save_pretrained(tmp_path / "base")
    folder = peft_folder(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {key.replace("q_proj", "\x1b]0;title\x07q_proj"): tensor for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    done = CliRunner().invoke(app, ["probe", str(tmp_path / "base"), str(folder)])
    assert done.exit_code == 2 and "self_attn.\\x1b]0;title\\x07q_proj" in done.output, done.output
    assert not set("\x1b\x07") & set(done.output)
