"""LLaVA's files: the adapter that its authors' code leaves, and probe and export of models that see images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from tiny_llava import save_as_the_authors, save_image, save_llava
from typer.testing import CliRunner

from dora_lab import __main__ as command
from dora_lab import inject, load_adapter, save_adapter
from dora_lab.forms.llava import Llava
from dora_lab.io.errors import CheckpointError
from dora_lab.methods.inject import adapted
from dora_lab.models.base import hash_adapter
from dora_lab.models.llava import open_llava
from dora_lab.models.open import open_as_saved
from dora_lab.spec import Data, Method

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
    save_as_the_authors(where / "peft", authors)
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


def said(model: Any, folder: Path) -> list[tuple[float, int]]:
    """Likelihoods of a conversation about an image: they depend on adapter and projector."""
    form = Llava(open_llava(folder / "model")[1])
    item = {"turns": [("<image>\nWhat colour is it?", "red")], "image": folder / "red.png", "where": "here"}
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


# --- probe and export, of models that see


WORDS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SIGHT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip


def qwen() -> Any:
    words = WORDS | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    sight = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 7, "mlp_ratio": 2}
    config = T.Qwen2VLConfig(text_config=words, vision_config=sight)
    return T.Qwen2VLForConditionalGeneration(config)


def gemma() -> Any:
    words = T.Gemma3TextConfig(**WORDS, head_dim=16)
    config = T.Gemma3Config(text_config=words, vision_config=T.SiglipVisionConfig(**SIGHT), mm_tokens_per_image=4)
    return T.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    tower = T.CLIPVisionConfig(**SIGHT)
    config = T.LlavaConfig(text_config=T.LlamaConfig(**WORDS), vision_config=tower, image_token_id=5)
    return T.LlavaForConditionalGeneration(config)


def run(*words: Any) -> Any:
    done = CliRunner().invoke(command.app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.mark.parametrize("make", [llava, qwen, gemma], ids=lambda make: make.__name__)
def test_probe_and_export_of_a_model_that_sees(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    model: Any = open_as_saved(tmp_path / "base")
    method = Method(name="dora", rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"), scope="language_model")
    inject(model, method, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter")
    run("export", tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    ids = torch.tensor([[1, 7, 9, 11]])
    whole: Any = type(model).from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        torch.testing.assert_close(whole.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    kept, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "whole"))
    assert kept.keys() == merged.keys()
    touched = {name for name in kept if not torch.equal(kept[name], merged[name])}
    assert len(touched) == 4 and all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in touched)
    run("probe", tmp_path / "base", tmp_path / "adapter", tmp_path / "whole", "--out", tmp_path / "rows.csv")
    rows = pd.read_csv(tmp_path / "rows.csv")
    changed = rows[rows["delta_d"] > 1e-6]
    named = [{*part["module"]} for _, part in changed.groupby("tuned")]
    assert named[0] == named[1] == {name for name, _ in adapted(model)}  # whatever the file calls them
    merger = rows[rows["module"].str.contains("merger.mlp")]  # of Qwen2-VL: a place in a Sequential is no layer
    assert merger["layer"].isna().all() and len(merger) == 2 * (make is qwen)
    written = pd.read_csv(tmp_path / "rows.csv", dtype=str)["layer"].dropna()
    assert {*written} == {"0", "1"}
    assert sorted(changed.groupby("tuned").size()) == [4, 4]  # the tower's rows say 0
    measured = {
        (name.split(".")[-3], name.rpartition(".")[2]): deltas(layer.weight.detach(), layer.effective_weight().detach())
        for name, layer in adapted(model)
    }
    for row in changed.to_dict("records"):
        wanted = measured[f"{row['layer']:.0f}", row["kind"]]
        assert (row["delta_m"], row["delta_d"]) == pytest.approx(wanted, rel=1e-4)


def deltas(W0_OI: torch.Tensor, W_OI: torch.Tensor) -> tuple[float, float]:
    """By the definition, in float64."""
    m0_O, m_O = W0_OI.double().norm(dim=1), W_OI.double().norm(dim=1)
    cosine_O = (W0_OI.double() * W_OI.double()).sum(1) / (m0_O * m_O)
    return float((m_O - m0_O).abs().mean()), float((1 - cosine_O).mean())
