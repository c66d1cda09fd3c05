"""What each tensor is, as the model's class says: the probe of many architectures against float64 brute force.

The oracle never reads a file's layout: transformers loads the dense weights, and the type of each live module (or, of
experts, what the architecture's own code does) says which axis is the output's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from test_measure import check
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dora_lab
from dora_lab.io.errors import CheckpointError
from dora_lab.models.open import open_model
from dora_lab.probing.saved_models import probe
from dora_lab.spec import Method

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
GQA = TEXT | {"num_key_value_heads": 2}
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 4}
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
WHISPER = {name: value for name, value in BART.items() if name != "max_position_embeddings"} | {
    "num_mel_bins": 16, "max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
IMAGE = TEXT | {"image_size": 8, "patch_size": 4}


def both(encoder: Any, decoder: Any) -> Any:
    return T.EncoderDecoderModel(T.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))


MODELS: dict[str, Any] = {
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)),
    "openai-gpt": lambda: T.OpenAIGPTLMHeadModel(T.OpenAIGPTConfig(**GPT)),
    "imagegpt": lambda: T.ImageGPTForCausalImageModeling(T.ImageGPTConfig(**GPT | {"n_positions": 32})),
    "decision transformer": lambda: T.DecisionTransformerModel(
        T.DecisionTransformerConfig(state_dim=5, act_dim=3, hidden_size=16, n_layer=1, n_head=4)
    ),
    "bert and gpt2": lambda: both(T.BertConfig(**TEXT), T.GPT2Config(**GPT, add_cross_attention=True, is_decoder=True)),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=4)),
    "falcon": lambda: T.FalconForCausalLM(T.FalconConfig(**TEXT)),
    "gpt-neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**TEXT)),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4,
                    word_embed_proj_dim=8)
    ),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)),
    "whisper": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)),
    "albert": lambda: T.AlbertForMaskedLM(T.AlbertConfig(**TEXT, embedding_size=8)),
    "electra": lambda: T.ElectraForPreTraining(T.ElectraConfig(**TEXT, embedding_size=8)),
    "mamba": lambda: T.MambaForCausalLM(
        T.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=5)
    ),
    "clip's eye": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**IMAGE)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**GQA, pad_token_id=0)),
}  # fmt: skip
PRODUCTS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
HEADS = ("lm_head", "decoder.lm_head", "predictions.decoder", "proj_out")  # they turn states into tokens


def shaken(model: Any, size: float = 0.05) -> Any:
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=source))
    return model.eval()


def made(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def seen(module: Any, weight: Tensor) -> Tensor:
    """A weight as (out, in), by the type of the live module that it is of."""
    return weight.t() if isinstance(module, (Conv1D, nn.Embedding)) else weight.flatten(1)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_measured_along_the_axis_of_its_class(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path / "base")
    shaken(made(name)).save_pretrained(tmp_path / "tuned")
    kind = type(made(name))
    base, tuned = (kind.from_pretrained(tmp_path / part).double() for part in ("base", "tuned"))
    after = dict(tuned.named_modules())
    expected = {
        path: (seen(module, module.weight), seen(module, after[path].weight))
        for path, module in base.named_modules()
        if isinstance(module, PRODUCTS) and path not in HEADS
    }
    for axis in ("out", "in"):
        rows = {row["module"]: row for row in probe(tmp_path / "base", [tmp_path / "tuned"], axis=axis)}
        assert set(rows) == set(expected), "matrices, and no embedding or head"
        for path, (W0, W) in expected.items():
            check(rows[path], W0.detach(), W.detach(), axis, rel=1e-4)
    weights = {id(m.weight): path for path, m in reversed(list(base.named_modules())) if isinstance(m, nn.Embedding)}
    for path in weights.values():  # of tied ones the first
        kind = path.rpartition(".")[2]
        (row,) = (r for r in probe(tmp_path / "base", [tmp_path / "tuned"], kinds=[kind]) if r["module"] == path)
        check(row, base.get_submodule(path).weight.detach().t(), after[path].weight.detach().t(), rel=1e-4)


def granite() -> Any:
    return T.GraniteMoeForCausalLM(T.GraniteMoeConfig(**GQA, num_local_experts=3))


def gpt_oss() -> Any:  # square: 16 x 2 * 8
    return T.GptOssForCausalLM(T.GptOssConfig(**GQA | {"intermediate_size": 8}, num_local_experts=3, head_dim=4))


# the code of granitemoe multiplies by linear(x, W[e]), that of gpt-oss by x @ W[e]
PACKED = {
    "granitemoe": (granite, {"input_linear.weight": "gate_up_proj", "output_linear.weight": "down_proj"}, False),
    "gpt-oss": (gpt_oss, {"gate_up_proj": "gate_up_proj", "down_proj": "down_proj"}, True),
}


@pytest.mark.parametrize("name", PACKED)
def test_experts_have_a_row_each_and_a_magnitude_for_each_output(name: str, tmp_path: Path) -> None:
    make, leaves, turned = PACKED[name]
    for part, model in (("base", make()), ("tuned", shaken(make()))):
        model.save_pretrained(tmp_path / part)
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "tuned"))
    found = list(probe(tmp_path / "base", [tmp_path / "tuned"]))
    count = 0
    for key in before:
        if leaf := leaves.get(key.removeprefix(f"{key.removesuffix('.weight').rpartition('.')[0]}.")):
            for expert in range(3):
                W0, W = (side[key][expert].t() if turned else side[key][expert] for side in (before, after))
                # rows have the names of the class's modules, as a live model's have
                (row,) = (row for row in found if (row["kind"], row["expert"]) == (leaf, expert))
                check(row, W0, W, rel=1e-4)
                count += 1
    assert count == 6 and len(found) == 4 + 1 + 6, "attention, the router, and every expert of both tensors"


@pytest.mark.parametrize("axis", ["out", "in"])
def test_experts_across_their_axis_and_their_singular_values(axis: str, tmp_path: Path) -> None:
    for part, model in (("base", granite()), ("tuned", shaken(granite()))):
        model.save_pretrained(tmp_path / part)
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "tuned"))
    name = "model.layers.0.block_sparse_moe.output_linear"
    rows = list(probe(tmp_path / "base", [tmp_path / "tuned"], axis=axis, kinds=["down_proj"], dynamics=True))
    for row in rows:
        W0, W = (side[f"{name}.weight"][row["expert"]] for side in (before, after))
        check(row, W0, W, axis, rel=1e-4)
        largest = (torch.linalg.svdvals(W - W0)[0] / torch.linalg.svdvals(W0)[0]).item()
        assert row["sigma_1"] == pytest.approx(largest, rel=1e-4)
    assert [row["expert"] for row in rows] == [0, 1, 2]


# --- adapters


def adapted(make: Any, folder: Path, **how: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and PEFT's adapter of it in a folder; the weights before and after PEFT's own merge, float64."""
    torch.manual_seed(0)
    make().save_pretrained(folder / "base")
    kind = type(make())
    model = peft.get_peft_model(kind.from_pretrained(folder / "base"), peft.LoraConfig(r=3, lora_alpha=5, **how))
    shaken(model, 0.3).save_pretrained(folder / "tuned")
    again: Any = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "tuned")
    merged = again.double().merge_and_unload()
    before = kind.from_pretrained(folder / "base").double()
    result = []
    for one in (before, merged):
        result.append({
            path: seen(module, module.weight).detach()
            for path, module in one.named_modules() if isinstance(module, (*PRODUCTS, nn.Embedding))
        })  # fmt: skip
    return result[0], result[1]


ADAPTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "squares beside Conv1D": (lambda: made("bert and gpt2"), {"target_modules": ["query", "value", "c_attn"]}),
    "squares, marked fan-in": (lambda: made("t5"), {"target_modules": ["q", "v"]}),
    "GPT-2's squares": (lambda: made("gpt2"), {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "T5's head": (lambda: made("t5"), {"target_modules": ["lm_head"]}),
    "BART's head": (lambda: made("bart"), {"target_modules": ["lm_head"]}),
    "Whisper's head": (lambda: made("whisper"), {"target_modules": ["proj_out"]}),
    "a tied head": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**GQA, tie_word_embeddings=True)),
        {"target_modules": ["lm_head", "q_proj"]},
    ),
    "tied words": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**GQA, tie_word_embeddings=True)),
        {"target_modules": ["embed_tokens"]},
    ),
    "saved words": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**GQA, tie_word_embeddings=True)),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a patch embedding": (lambda: made("clip's eye"), {"target_modules": ["patch_embedding", "q_proj"]}),
    "ALBERT's mapping": (lambda: made("albert"), {"target_modules": ["embedding_hidden_mapping_in"]}),
    "llava, renamed": (
        lambda: T.LlavaForConditionalGeneration(
            T.LlavaConfig(text_config=T.LlamaConfig(**GQA), vision_config=T.CLIPVisionConfig(**IMAGE))
        ),
        {"target_modules": ["q_proj"]},
    ),
    "vit, renamed": (
        lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE)), {"target_modules": ["q_proj", "projection"]}
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_is_measured_as_pefts_merge_is(name: str, dora: bool, tmp_path: Path) -> None:
    make, how = ADAPTED[name]
    before, after = adapted(make, tmp_path, use_dora=dora, **how)
    if "marked" in name:
        file = tmp_path / "tuned" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))
    # PEFT merges into a tied weight in place, and so into the other module too, which its adapter leaves as it is
    names = how.get("modules_to_save", []) + how["target_modules"]
    moved = {path for path in before if path.endswith(tuple(names)) and not torch.equal(before[path], after[path])}
    for axis in ("out", "in"):
        rows = {row["module"]: row for row in probe(tmp_path / "base", [tmp_path / "tuned"], axis=axis)}
        assert set(rows) == moved
        for path, row in rows.items():
            check(row, before[path], after[path], axis, rel=1e-3 if dora else 1e-4)
            assert row["tied_with"] is None, "an adapter changes the one module alone"


def test_a_square_weight_of_an_unknown_model_is_refused_and_another_told_by_its_factors(tmp_path: Path) -> None:
    before, after = adapted(ADAPTED["a tied head"][0], tmp_path, target_modules=["q_proj", "k_proj"])
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"q_proj' is \(16, 16\) in the base, whether \(out, in\) or \(in, out\)"):
        list(probe(tmp_path / "base", [tmp_path / "tuned"]))
    (row,) = probe(tmp_path / "base", [tmp_path / "tuned"], kinds=["k_proj"])
    check(row, before[row["module"]], after[row["module"]], rel=1e-4)
    with pytest.raises(CheckpointError, match=r"is not known: .* has no config\.json.* put the model's there"):
        list(probe(tmp_path / "base", [tmp_path / "base"]))


def test_another_vocabulary_and_another_base_of_an_adapted_embedding(tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return T.LlamaForCausalLM(T.LlamaConfig(**GQA))

    make().save_pretrained(tmp_path / "base")
    larger = T.LlamaForCausalLM.from_pretrained(tmp_path / "base")  # PEFT looks up whether it was resized
    larger.resize_token_embeddings(44)
    model = shaken(peft.get_peft_model(larger, peft.LoraConfig(r=3, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "resized")
    with pytest.warns(UserWarning, match="has 44 rows, the base 40: another vocabulary"):
        rows = list(probe(tmp_path / "base", [tmp_path / "resized"]))
    assert [row["kind"] for row in rows] == ["q_proj"]
    with pytest.raises(CheckpointError, match=r"'lm_head' is \(44, 16\), in the base \(40, 16\)"):
        list(probe(tmp_path / "base", [tmp_path / "resized"], kinds=["lm_head"]))
    adapted(make, tmp_path / "words", target_modules=["embed_tokens"])
    assert [row["kind"] for row in probe(tmp_path / "words/base", [tmp_path / "words/tuned"])] == ["embed_tokens"]
    shaken(make()).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens' that it was trained on .* is not that of"):
        list(probe(tmp_path / "other", [tmp_path / "words/tuned"]))


# --- what is in a model beside its weights


def whose(how: str, model: Any, folder: Path) -> str:
    """Train nothing, but leave what a trainer's checkpoint of an adapted model holds; returns a key of it."""
    if how == "ours":
        dora_lab.inject(model, Method(name="dora", rank=2, alpha=4.0, target_modules=("q_proj",)), seed=0)
    shaken(model).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    extra = {
        "ours": {},
        "loralib": {f"{name}.lora_A": torch.ones(2, 16), f"{name}.lora_B": torch.ones(16, 2)},
        "bottleneck": {"model.layers.0.adapter_down.weight": torch.ones(2, 16)},
    }[how]
    save_file(tensors | extra, file, metadata={"format": "pt"})
    return next(iter(extra), f"{name}.lora_A")


@pytest.mark.parametrize("how", ["ours", "loralib", "bottleneck"])
def test_an_adapter_beside_a_frozen_base_is_no_whole_model(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**GQA))
    model.save_pretrained(tmp_path / "base")
    key = whose(how, model, tmp_path / "run" / "checkpoint-4")
    with pytest.raises(CheckpointError, match=rf"'{key.replace('.', '.')}' is no part of the base .* save the adapter"):
        list(probe(tmp_path / "base", [tmp_path / "run"]))
    if how != "bottleneck":  # as a base, too
        shutil.copytree(tmp_path / "run/checkpoint-4", tmp_path / "earlier")
        with pytest.raises(CheckpointError, match="is no part of the base"):
            list(probe(tmp_path / "earlier", [tmp_path / "run"]))


def test_a_new_head_and_a_head_that_is_no_longer_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T.LlamaConfig(**GQA, tie_word_embeddings=True)
    base = T.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    T.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).save_pretrained(tmp_path / "new")
    with pytest.warns(UserWarning, match=r"'score\.weight' \(1 such\) is not in the base: no row"):
        assert len(list(probe(tmp_path / "base", [tmp_path / "new"]))) == 7
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach() + 0.1)
    base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "apart")
    kinds = ["lm_head", "embed_tokens"]
    rows = {row["kind"]: row for row in probe(tmp_path / "base", [tmp_path / "apart"], kinds=kinds)}
    W0 = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    check(rows["lm_head"], W0, load_file(tmp_path / "apart" / "model.safetensors")["lm_head.weight"])
    assert rows["embed_tokens"]["delta_m"] == 0 and rows["embed_tokens"]["tied_with"] is None


def test_sizes_in_a_configuration_are_not_believed(tmp_path: Path) -> None:
    T.LlamaForCausalLM(T.LlamaConfig(**GQA)).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    values = json.loads(file.read_text())
    values.pop("layer_types", None)
    file.write_text(json.dumps(values | {"num_hidden_layers": 10**6}))
    for read in (lambda: list(probe(tmp_path / "base", [tmp_path / "base"])), lambda: open_model(file.parent, "auto")):
        with pytest.raises(CheckpointError, match="describes a model of more than 20600 modules"):
            read()
    file.unlink()
    file.symlink_to("/dev/zero")
    for read in (lambda: list(probe(tmp_path / "base", [tmp_path / "base"])), lambda: open_model(file.parent, "auto")):
        with pytest.raises(CheckpointError, match="a link that leaves its folder"):
            read()
