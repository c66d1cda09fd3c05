"""What the callback watches: other architectures, all that PEFT puts on a layer; against float64 and PEFT's merge."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from peft.tuners.lora.config import CordaConfig, KasaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from test_layout import made, shaken
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dora_lab
from dora_lab.decompose import delta_d, delta_m
from dora_lab.probing.callback import DecompositionCallback
from dora_lab.probing.saved_models import probe
from dora_lab.spec import Method

Q = "model.layers.0.self_attn.q_proj"
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def llama() -> Any:
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()


def measured(model: Any, change: Any = shaken, **how: Any) -> dict[str, dict[str, Any]]:
    """Rows by module after every trained number was moved."""
    callback = DecompositionCallback(lambda row: None, **how)
    callback.begin(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback.measure(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "it changes nothing"
    change(model)
    rows = callback.measure(model)
    assert len({row["module"] for row in rows}) == len(rows)
    return {row["module"]: row for row in rows}


def check(row: dict[str, Any], W0: Tensor, W: Tensor, rel: float = 1e-4) -> None:
    W0, W = W0.detach().double(), W.detach().double()
    assert row["delta_m"] == pytest.approx(delta_m(W0, W), rel=rel), row["module"]
    assert row["delta_d"] == pytest.approx(delta_d(W0, W), rel=rel), row["module"]


def lora(model: Any, **how: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} | how))


def corda(model: Any) -> Any:
    """Its factors come from the covariance of inputs."""
    how = CordaConfig(corda_method="kpm")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="corda", corda_config=how)
    preprocess_corda(model, config, run_model=lambda: model(torch.arange(12)[None]))
    return peft.get_peft_model(model, config)


VARIANTS: dict[str, Any] = {
    "LoRA": lora,
    "DoRA": lambda m: lora(m, use_dora=True),
    "rsLoRA": lambda m: lora(m, use_rslora=True),
    "PiSSA": lambda m: lora(m, init_lora_weights="pissa"),
    "PiSSA, DoRA": lambda m: lora(m, init_lora_weights="pissa", use_dora=True),
    "OLoRA": lambda m: lora(m, init_lora_weights="olora"),
    "CorDA": corda,
    "MiCA": lambda m: lora(m, init_lora_weights="mica"),
    "AdaLoRA": lambda m: peft.get_peft_model(
        m, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2, target_modules=["q_proj"])
    ),
    "LoHa": lambda m: peft.get_peft_model(m, peft.LoHaConfig(r=3, target_modules=["q_proj"])),
    "LoKr": lambda m: peft.get_peft_model(m, peft.LoKrConfig(r=3, target_modules=["q_proj"])),
    "IA3": lambda m: peft.get_peft_model(m, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
    "OFT": lambda m: peft.get_peft_model(m, peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"])),
    "VeRA": lambda m: peft.get_peft_model(m, peft.VeraConfig(r=3, target_modules=["q_proj"])),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_of_peft_is_measured_against_the_true_base(name: str) -> None:
    """PEFT's own merge against the weights that the model had before PEFT touched it."""
    W0 = llama().get_submodule(Q).weight
    model = VARIANTS[name](llama())
    callback = DecompositionCallback(lambda row: None)
    callback.begin(model)
    (row,) = callback.measure(model)
    assert row["delta_d"] == pytest.approx(0, abs=1e-9) and row["delta_m"] < 1e-6, "nothing has moved before a step"
    shaken(model, 0.3)
    (row,) = callback.measure(model)
    assert row["module"] == Q
    merged: Any = copy.deepcopy(model).double().merge_and_unload()
    assert row["delta_d"] > 1e-3 or (name == "IA3" and row["delta_m"] > 1e-3), "IA3 scales outputs"
    check(row, W0, merged.get_submodule(Q).weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_took_out_of_the_base_is_asked_for(tmp_path: Path) -> None:
    W0 = llama().state_dict()
    kasa = lora(llama(), kasa_config=KasaConfig())
    with pytest.raises(ValueError, match=rf"'{Q}': KaSA cuts the base weight .*give DecompositionCallback\(initial"):
        DecompositionCallback(lambda row: None).begin(kasa)
    (row,) = measured(kasa, lambda model: shaken(model, 0.3), initial=W0.__getitem__).values()
    check(row, W0[f"{Q}.weight"], copy.deepcopy(kasa).double().merge_and_unload().get_submodule(Q).weight)
    for start in ("pissa", "olora"):
        model = shaken(lora(llama(), init_lora_weights=start), 0.3)
        with pytest.raises(ValueError, match=rf"factors of '{Q}' have been trained already"):
            DecompositionCallback(lambda row: None).begin(model)
        with pytest.raises(ValueError, match="training resumes at step 3"):
            DecompositionCallback(lambda row: None).begin(lora(llama(), init_lora_weights=start), 3)
        callback = DecompositionCallback(lambda row: None, initial=W0.__getitem__)
        callback.begin(model, 3)
        merged = copy.deepcopy(model).double().merge_and_unload()
        check(callback.measure(model)[0], W0[f"{Q}.weight"], merged.get_submodule(Q).weight)
    with pytest.raises(ValueError, match=r"cannot be measured by merging a copy"):
        alora = lora(llama(), alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
        DecompositionCallback(lambda row: None).begin(alora)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-neox", "phi3", "bloom", "falcon", "mamba", "t5", "bart"])
def test_full_fine_tuning_of_any_model_is_watched_whole(name: str) -> None:
    before, model = made(name), made(name)
    rows = measured(model)
    heads = ("lm_head", "embed_out")
    expected = {
        path: module
        for path, module in before.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv1d)) and path not in heads
    }
    assert set(rows) == set(expected)
    for path, module in expected.items():
        W0, W = module.weight, model.get_submodule(path).weight
        check(rows[path], *((w.t() for w in (W0, W)) if isinstance(module, Conv1D) else (W0.flatten(1), W.flatten(1))))


def test_the_callback_and_the_command_see_saved_words_alike(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = lora(T.LlamaForCausalLM.from_pretrained(tmp_path / "base"), modules_to_save=["embed_tokens", "lm_head"])
    rows = measured(model)
    model.save_pretrained(tmp_path / "tuned")
    files = {row["module"]: row for row in probe(tmp_path / "base", [tmp_path / "tuned"])}
    assert set(rows) == set(files) == {Q, "model.embed_tokens", "lm_head"}
    for name, row in rows.items():
        for key in ("delta_m", "delta_d", "relative_change", "delta_m_sd"):
            assert row[key] == pytest.approx(files[name][key], rel=1e-5), (name, key)
    E0 = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    E: Any = model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    check(rows["model.embed_tokens"], E0.t(), E.t())


def test_only_what_is_trained_is_watched_and_copied() -> None:
    adapted = lora(llama(), target_modules=["q_proj", "v_proj"])
    assert {row["kind"] for row in measured(adapted).values()} == {"q_proj", "v_proj"}
    ours = llama()
    dora_lab.inject(ours, Method(name="dora", rank=2, alpha=4.0, target_modules=("q_proj",)), seed=0)
    callback = DecompositionCallback(lambda row: None, kinds=("q_proj", "o_proj"))
    callback.begin(ours, step=5)  # resumed: o_proj is frozen, and needs no copy
    assert not callback._copies
    rows = {row["kind"]: row for row in callback.measure(ours)}
    assert rows["o_proj"]["relative_change"] == 0
    with pytest.raises(ValueError, match="no matrix of the model is trained; name what to watch"):
        DecompositionCallback(lambda row: None).begin(llama().requires_grad_(False))
    late = llama().requires_grad_(False)
    callback = DecompositionCallback(lambda row: None, kinds=("q_proj",))
    callback.begin(late)
    late.requires_grad_(True)  # thawed in the midst of training
    with pytest.raises(ValueError, match="has no initial weight"):
        callback.measure(late)


def test_blocks_that_are_saved_whole_and_compiled_models() -> None:
    model = lora(llama(), modules_to_save=["mlp"])
    before = llama()
    rows = measured(model)
    merged: Any = copy.deepcopy(model).double().merge_and_unload()
    assert set(rows) == {Q, *(f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down"))}
    for path, row in rows.items():
        check(row, before.get_submodule(path).weight, merged.get_submodule(path).weight)
    compiled = torch.compile(llama(), backend="eager")
    assert Q in measured(compiled)


def test_trained_experts_in_one_tensor_are_named() -> None:
    config = T.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    with pytest.warns(UserWarning, match=r"'model\.layers\.0\.mlp\.experts\.\w+_proj' \(2 such\) is trained, but no"):
        DecompositionCallback(lambda row: None).begin(T.MixtralForCausalLM(config))


def test_an_initial_weight_is_read_as_the_model_stores_it(tmp_path: Path) -> None:
    made("gpt2").save_pretrained(tmp_path)
    model = made("gpt2")
    files = load_file(tmp_path / "model.safetensors")
    rows = measured(model, initial=files.__getitem__)
    for path, row in rows.items():  # of GPT-2: (in, out)
        check(row, files[f"{path}.weight"].t(), model.get_submodule(path).weight.t())
    assert json.dumps(rows["transformer.h.0.attn.c_proj"])
    with pytest.raises(KeyError):
        DecompositionCallback(lambda row: None, initial={}.__getitem__).begin(model)
