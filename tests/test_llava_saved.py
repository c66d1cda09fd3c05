"""LLaVA's files: the adapter that its authors' code leaves, and probe and export of models that see images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import save_image, save_llava

from dora_lab import inject, load_adapter, save_adapter
from dora_lab.forms.llava import Llava
from dora_lab.io.errors import CheckpointError
from dora_lab.models.base import hash_adapter
from dora_lab.models.llava import open_llava
from dora_lab.spec import Method

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*dora_lab.json.*"),
]
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA, a DoRA on it as it lives, and the same as the authors' code for LLaVA writes it (pickled)."""
    where = tmp_path_factory.mktemp("llava")
    save_llava(where / "model")
    save_image(where / "red.png", "red")
    model = tuned(where)
    save_adapter(model, where / "peft")
    authors = where / "authors"
    save_as_the_authors(model, where, authors)
    return where


METHOD = Method(
    name="dora", rank=4, alpha=8.0, target_modules=LEAVES, scope="language_model",
    also_train=("multi_modal_projector",),
)  # fmt: skip


def tuned(where: Path) -> Any:
    model, _ = open_llava(where / "model")
    inject(model, METHOD, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter) * parameter.abs().mean().clamp(min=0.1))
    return model.eval()


def save_as_the_authors(model: Any, where: Path, folder: Path) -> None:
    """By LLaVA's names, magnitudes as (out, 1), the projector in a file of its own."""
    folder.mkdir()
    held = load_file(where / "peft" / "adapter_model.safetensors")
    adapter, beside = {}, {}
    for key, tensor in held.items():
        if "multi_modal_projector" in key:
            place = key.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
            beside[place.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
        elif key.endswith("lora_magnitude_vector"):
            name = key.replace("lora_magnitude_vector", "weight_m_wdecomp.weight")
            adapter[name.replace(".language_model.", ".")] = tensor[:, None]
        else:
            adapter[key.replace(".language_model.", ".")] = tensor
    assert set(beside) == {
        f"base_model.model.model.mm_projector.{n}.{leaf}" for n in (0, 2) for leaf in ("weight", "bias")
    }
    assert "base_model.model.model.layers.0.self_attn.q_proj.weight_m_wdecomp.weight" in adapter
    torch.save(adapter, folder / "adapter_model.bin")
    torch.save(beside, folder / "non_lora_trainables.bin")
    config = {"peft_type": "DORA", "r": 4, "lora_alpha": 8, "target_modules": [*LEAVES], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def said(model: Any, folder: Path) -> list[tuple[float, int]]:
    """Likelihoods of a conversation about an image: they depend on adapter and projector."""
    form = Llava(open_llava(folder / "model")[1])
    item = {"turns": [("<image>\nWhat colour is it?", "red")], "image": folder / "red.png", "where": "here"}
    from dora_lab.spec import Data

    data = Data(name="mix", tasks=(), truncation="right")
    return form.nll(model, form.encode({"image": [item]}, data).examples, 1)


def test_the_authors_files_are_the_live_model(folder: Path) -> None:
    wanted, base = said(tuned(folder), folder), said(open_llava(folder / "model")[0].eval(), folder)
    assert wanted != base
    for name in ("peft", "authors"):
        model = load_adapter(open_llava(folder / "model")[0], folder / name, allow_pickle=True).eval()
        assert said(model, folder) == wanted, name


def test_the_projector_is_a_part_of_the_adapter(folder: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(folder / "authors", other)
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        load_adapter(open_llava(folder / "model")[0], other)
    beside = torch.load(other / "non_lora_trainables.bin")
    before = hash_adapter(other)
    for change, message in (
        (
            {"base_model.model.model.vision_tower.x": torch.ones(1)},
            "'base_model.model.model.vision_tower.x' is no part",
        ),
        ({"base_model.model.model.mm_projector.0.bias": torch.full((32,), torch.nan)}, "numbers that are not finite"),
        ({"base_model.model.model.mm_projector.0.bias": torch.ones(31)}, "linear_1.bias"),
    ):
        torch.save(beside | change, other / "non_lora_trainables.bin")
        assert hash_adapter(other) != before
        with pytest.raises(CheckpointError, match=message):
            load_adapter(open_llava(folder / "model")[0], other, allow_pickle=True)
    beside.popitem()
    torch.save(beside, other / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match="3 tensors, a projector has weight and bias of 0 and 2"):
        load_adapter(open_llava(folder / "model")[0], other, allow_pickle=True)
