"""Modules that an adapter brings whole (PEFT's `modules_to_save`), on tied bases too: against PEFT's own logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from test_layout import shaken

from dora_lab.formats.live import export, fingerprint, load_adapter, save_adapter
from dora_lab.io.errors import CheckpointError
from dora_lab.methods.inject import attach, detach, merge, unmerge

IDS = torch.arange(14).view(2, 7)
WHICH: dict[str, list[str]] = {
    "words": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"], "a block": ["mlp"],
    "a block and a norm": ["mlp", "norm"],
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def llama(tie: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return T.LlamaForCausalLM(T.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tie)).eval()


def theirs(folder: Path, which: list[str], tie: bool = True, seed: float = 0.3, **how: Any) -> torch.Tensor:
    """PEFT's adapter in a folder; its logits, read again by PEFT."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], use_dora=True, modules_to_save=which, **how)
    shaken(peft.get_peft_model(llama(tie), config), seed).save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(llama(tie), folder).eval())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("which", WHICH)
def test_load_export_detach_and_save_again(which: str, tie: bool, tmp_path: Path) -> None:
    expected = theirs(tmp_path / "a", WHICH[which], tie)
    before = llama(tie)
    model = load_adapter(llama(tie), tmp_path / "a")
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(logits(before), expected, atol=0.1)

    export(model, tmp_path / "whole")
    torch.testing.assert_close(logits(T.LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()), expected)
    torch.testing.assert_close(logits(merge(model)), expected)
    torch.testing.assert_close(logits(unmerge(model)), expected)

    assert fingerprint(model) == fingerprint(before), "the base is what it was"
    save_adapter(model, tmp_path / "again")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key].view(-1), other[key].view(-1)) for key in one)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(llama(tie), tmp_path / "again").eval()), expected)
    torch.testing.assert_close(logits(load_adapter(llama(tie), tmp_path / "again")), expected)

    layers = detach(model)
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), f"{name} is not the base's, bit for bit"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie, "tied as it was"
    plain = theirs(tmp_path / "b", [], tie, 0.2)
    torch.testing.assert_close(logits(load_adapter(model, tmp_path / "b")), plain)
    detach(model)
    torch.testing.assert_close(logits(attach(model, layers)), expected)
    torch.testing.assert_close(logits(copy.deepcopy(model)), expected)


def test_words_that_peft_keeps_tied_are_the_same_in_both(tmp_path: Path) -> None:
    expected = theirs(tmp_path / "a", ["embed_tokens"], ensure_weight_tying=True)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "a")), expected)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapted_words_come_with_their_frozen_weight(target: str, dora: bool, tie: bool, tmp_path: Path) -> None:
    """PEFT writes that beside the factors, by itself."""
    config = peft.LoraConfig(r=3, target_modules=[target], use_dora=dora)
    shaken(peft.get_peft_model(llama(tie), config), 0.3).save_pretrained(tmp_path / "a")
    assert any("base_layer.weight" in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    expected = logits(peft.PeftModel.from_pretrained(llama(tie), tmp_path / "a").eval())
    assert not torch.allclose(logits(llama(tie)), expected, atol=0.1)
    torch.testing.assert_close(logits(load_adapter(llama(tie), tmp_path / "a")), expected)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    theirs(tmp_path / "a", ["lm_head"])
    torch.manual_seed(0)
    larger = llama()
    larger.resize_token_embeddings(44)
    state = {name: tensor.clone() for name, tensor in larger.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is \(40, 16\), the base's is \(44, 16\); of another"):
        load_adapter(larger, tmp_path / "a")
    assert all(torch.equal(larger.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(parameter.requires_grad for parameter in larger.parameters())
    with pytest.raises(CheckpointError, match="is saved whole, which format 'authors' cannot hold"):
        save_adapter(load_adapter(llama(), tmp_path / "a"), tmp_path / "b", format="authors")
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens"])
    shaken(peft.get_peft_model(llama(), config)).save_pretrained(tmp_path / "words", save_embedding_layers=True)
    load_adapter(llama(), tmp_path / "words")
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' that it was trained on .* is not this"):
        load_adapter(shaken(llama()), tmp_path / "words")


def test_corda_that_peft_has_converted_to_lora_is_read(tmp_path: Path) -> None:
    """PEFT writes what it started with beside the plain factors; it is only read where it says that it starts so."""
    how = CordaConfig(corda_method="kpm")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="corda", corda_config=how)
    base = llama()
    preprocess_corda(base, config, run_model=lambda: base(IDS[:1]))
    model: Any = peft.get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "corda"
    shaken(model, 0.3).save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected = logits(model)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "a")), expected)
    with pytest.raises(CheckpointError, match="init_lora_weights = 'corda': changes what the adapter computes"):
        model.save_pretrained(tmp_path / "b")
        load_adapter(llama(), tmp_path / "b")
