"""What is saved of a live model, seen by PEFT, by transformers and by us: names, wrappers, tied matrices, classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from typer.testing import CliRunner

from dora_lab import export, inject, load_adapter, save_adapter
from dora_lab.__main__ import app
from dora_lab.io.errors import CheckpointError
from dora_lab.methods.inject import adapted
from dora_lab.spec import Method

IDS = torch.arange(3, 11)[None]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip


def stirred(model: Any, name: str, *targets: str, **more: Any) -> Any:
    inject(model, Method(name=name, rank=2, alpha=4.0, target_modules=targets, **more), seed=0)
    with torch.no_grad():
        for _, layer in adapted(model):
            some: Any = layer
            some.lora_A.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.5)
            some.lora_B.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.5)
    return model.eval()


def tiny(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    t: Any = transformers
    model = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "wide": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128})),
        "reward": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**BART)),
        "mbart": lambda: t.MBartForConditionalGeneration(t.MBartConfig(**BART)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES)),
        "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(**SIZES, embedding_size=8)),
    }[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases begin at zero, and a lost one would too
                parameter.add_(torch.randn(parameter.shape))
    return model


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


# --- names


class Towers(nn.Module):
    """As in open_clip: the names of one tower end those of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in "abc"])})
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in "ab"])

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.visual["blocks"], *self.blocks]:  # type: ignore[misc]
            x = x + torch.tanh(block["fc"](x))
        return x


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_patterns_mean_the_module_they_name_and_no_other(field: str, name: str, tmp_path: Path) -> None:
    patterns: Any = {field: (r"visual\.blocks\.\d\.fc=8",)}
    model, x = stirred(Towers(), name, "fc", **patterns), torch.randn(3, 8)
    save_adapter(model, tmp_path)
    for other in (load_adapter(Towers(), tmp_path), PeftModel.from_pretrained(Towers(), tmp_path).eval()):  # type: ignore[arg-type]
        torch.testing.assert_close(other(x), model(x))


def test_targets_whose_names_end_others_are_not_those(tmp_path: Path) -> None:
    model = Towers()
    model.visual.requires_grad_(False)
    inner = model.visual
    del model.visual  # so that the outer tower alone is adapted
    stirred(model, "dora", "fc")
    model.visual = inner
    save_adapter(model, tmp_path)
    twin: Any = PeftModel.from_pretrained(Towers(), tmp_path)  # type: ignore[arg-type]
    assert sum("lora_A.default" in key for key in twin.state_dict()) == 2
    torch.testing.assert_close(twin(torch.ones(1, 8)), model(torch.ones(1, 8)))


@pytest.mark.parametrize("where", ["whole", "part"])
def test_a_compiled_model_is_saved_by_its_own_names(where: str, tmp_path: Path) -> None:
    model = stirred(tiny("llama"), "dora", "q_proj")
    expected = outputs(model)
    seen: Any = model
    if where == "whole":
        seen = torch.compile(model, backend="eager")
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    save_adapter(seen, tmp_path / "a")
    for other in (
        load_adapter(tiny("llama"), tmp_path / "a"),
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "a"),
    ):
        torch.testing.assert_close(outputs(other.eval()), expected, rtol=1e-5, atol=1e-6)
    fresh: Any = torch.compile(tiny("llama"), backend="eager")
    torch.testing.assert_close(outputs(load_adapter(fresh, tmp_path / "a")), expected, rtol=1e-5, atol=1e-6)
    export(seen, tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(plain), expected, rtol=1e-5, atol=1e-5)


TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("made", TYPES)
@pytest.mark.parametrize("loaded", TYPES)
def test_a_base_is_known_in_whatever_type_it_is_loaded(made: Any, loaded: Any, tmp_path: Path) -> None:
    if {made, loaded} == {torch.bfloat16, torch.float16}:
        pytest.skip("two roundings, neither of which can be told from the other")
    save_adapter(stirred(tiny("llama").to(made), "dora", "q_proj"), tmp_path / "a")
    load_adapter(tiny("llama").to(loaded), tmp_path / "a")
    with pytest.raises(CheckpointError, match="made for the base"):
        load_adapter(tiny("llama", seed=1).to(loaded), tmp_path / "a")


# --- export


TIED = [
    ("llama", "lm_head"), ("llama", "embed_tokens"), ("bart", "lm_head"), ("mbart", "lm_head"), ("t5", "lm_head"),
    ("t5", "shared"), ("bert", "word_embeddings"), ("bert", "decoder"), ("albert", "word_embeddings"), ("bart", "fc1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "target"), TIED)
def test_one_of_tied_matrices_is_exported_as_it_acts(kind: str, target: str, tmp_path: Path) -> None:
    model = stirred(tiny(kind), "dora", target)
    expected, was = outputs(model), model.config.to_dict()
    export(model, tmp_path / "merged")
    found = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(found), expected, rtol=1e-4, atol=1e-5)
    assert model.config.tie_word_embeddings == was.get("tie_word_embeddings", True)
    if kind != "t5":  # whose configuration cannot say it: transformers sees that the two differ
        assert found.config.tie_word_embeddings == (target == "fc1")
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(("kind", "target"), [("reward", "q_proj"), ("bart", "q_proj"), ("t5", "q"), ("bert", "query")])
def test_the_command_exports_what_the_base_is(kind: str, target: str, tmp_path: Path) -> None:
    """The oracle is PEFT's own merge."""
    base = tiny(kind)
    base.save_pretrained(tmp_path / "base")
    tuned: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=[target], use_dora=True))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    done = CliRunner().invoke(app, ["export", *(str(tmp_path / part) for part in ("base", "adapter", "out"))])
    assert done.exit_code == 0, done.output
    found = type(base).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(outputs(found), outputs(tuned.merge_and_unload().eval()), rtol=1e-4, atol=1e-5)
    assert found.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize(
    ("classes", "words"),
    [(None, "names no class"), (["Nonsense"], "no model that transformers"), (["LlamaForCausalLM"], "'score.weight'")],
)
def test_a_base_of_no_class_or_of_too_small_a_class_is_refused(classes: Any, words: str, tmp_path: Path) -> None:
    tiny("reward").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    config = {**json.loads(file.read_text()), "architectures": classes, "tie_word_embeddings": True}
    file.write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "base"), "adapter", str(tmp_path / "out")])
    assert isinstance(done.exception, CheckpointError) and words in str(done.exception)


def test_a_quantised_base_is_not_exported(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny("wide").save_pretrained(tmp_path / "base")
    how: Any = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **how)
    model.save_pretrained(tmp_path / "small")
    save_adapter(stirred(model, "dora", "q_proj"), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="the base is quantised"):
        export(model, tmp_path / "out")
    done = CliRunner().invoke(app, ["export", *(str(tmp_path / part) for part in ("small", "adapter", "out"))])
    assert isinstance(done.exception, CheckpointError) and "the base is quantised" in str(done.exception)
    assert not (tmp_path / "out").exists()
