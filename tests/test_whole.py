"""Where an adapter is put (`scope`) and what trains whole beside it (`also_train`): trained, saved, resumed, merged."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_train import KillAt, Killed, StopAt, go, rows
from tiny import make_spec, save_data, save_model, small_method
from torch import Tensor, nn

from dora_lab import attach, detach, export, inject, load_adapter, merge, save_adapter, unmerge
from dora_lab.formats.live import fingerprint
from dora_lab.io.errors import CheckpointError
from dora_lab.methods.catalog import entry_of, is_counted, methods
from dora_lab.methods.inject import adapted
from dora_lab.runs.record import run_path
from dora_lab.spec import Method, SpecError, derive
from dora_lab.training.fit import Interrupted
from tests.faults import _crash as crash

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTING = [name for name in methods() if entry_of(name).adapts]
IDS = torch.arange(3, 15).view(2, 6)
QV = ("q_proj", "v_proj")
BIASES, NORMS = r"\.bias$", "layer_?norm"
ENDS = {"stopped at 7": lambda stop: StopAt(7, stop), "killed at 17": lambda stop: KillAt(17)}


def bart(seed: int = 0) -> Any:
    """A BART of one layer each, nothing in it at its usual start: zero biases would hide that they are lost."""
    torch.manual_seed(seed)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=32, **sizes, **heads)
    return stirred(transformers.BartForConditionalGeneration(config))


@torch.no_grad()
def stirred(model: Any) -> Any:
    """Every parameter that requires a gradient moved."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def with_adapter(name: str, model: Any = None, **changes: Any) -> Any:
    model = bart() if model is None else model
    inject(model, small_method(name, QV, **changes), seed=0)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- scope


@pytest.mark.parametrize("name", ADAPTING)
def test_scope_is_found_in_full_names(name: str) -> None:
    everywhere = {module for module, _ in adapted(with_adapter(name))}
    within = {module for module, _ in adapted(with_adapter(name, scope=r"decoder\.layers\.\d+\.self_attn\."))}
    assert len(everywhere) == 6
    assert within == {f"model.decoder.layers.0.self_attn.{leaf}" for leaf in QV}


def test_a_scope_in_which_a_target_is_not_there_is_refused() -> None:
    model = bart()
    before = trained(model)
    with pytest.raises(
        ValueError, match=r"scope: 'vision' is in the full name of no module 'q_proj'; there are 3, the"
    ):
        with_adapter("dora", model, scope="vision")
    with pytest.raises(ValueError, match=r"'fc1'; there are 2, the first is 'model.encoder.layers.0.fc1'"):
        inject(model, Method(name="lora", rank=2, alpha=2.0, target_modules=("q_proj", "fc1"), scope="attn"), seed=0)
    assert not list(adapted(model)) and trained(model) == before


# --- what trains


@pytest.mark.parametrize("name", ADAPTING)
def test_what_it_names_trains_and_nothing_else_of_the_base(name: str) -> None:
    model, base = with_adapter(name, also_train=(BIASES, NORMS)), bart()
    own = {f"{module}.{part}" for module, layer in adapted(model) for part in layer.trained_state()}
    wanted = {key for key, _ in base.named_parameters() if key.endswith(".bias") or "layer_norm" in key}
    wanted |= {key for key, _ in base.named_parameters() if "layernorm" in key}
    assert trained(model) == own | wanted and any("q_proj.bias" in key for key in wanted)


@pytest.mark.parametrize("name", ADAPTING)
def test_at_the_start_its_gradient_is_that_of_the_model_without_adapter(name: str) -> None:
    """The biases of adapted layers, too, which go through the layers' own backward."""
    model, base = with_adapter(name, bart().double(), also_train=(BIASES, NORMS)), bart().double()
    for some in (model, base):
        some(input_ids=IDS, labels=IDS).loss.backward()
    seen = dict(model.named_parameters())
    for key, parameter in base.named_parameters():
        if key.endswith(".bias") or "norm" in key:
            torch.testing.assert_close(seen[key].grad, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lm_haed", r"'lm_haed' is in no parameter's name; .*choices: .*q_proj\.bias"),
        ("q_proj", r"'model\.encoder\.layers\.0\.self_attn\.q_proj\.weight' is of an adapted layer"),
        ("embed_tokens", r"'.*embed_tokens\.weight' is '.*' as well"),
    ],
)
def test_what_cannot_train_whole_is_refused(pattern: str, words: str) -> None:
    model = bart()
    before = trained(model)
    with pytest.raises(ValueError, match=f"also_train: {words}"):
        with_adapter("dora", model, also_train=(pattern,))
    assert not list(adapted(model)) and trained(model) == before
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, too coarse"):
        with_adapter("lora", bart().bfloat16(), also_train=(NORMS,))
    with pytest.raises(ValueError, match="method 'ft' does not read also_train"):
        inject(bart(), Method(name="ft", also_train=(NORMS,)), seed=0)


def test_the_fields_of_a_spec() -> None:
    spec = derive(make_spec(), {"method.scope": r"layers\.0", "method.also_train": "norm, bias"})
    assert spec.method.also_train == ("norm", "bias") and not is_counted(spec.method)
    assert is_counted(derive(spec, {"method.scope": "none", "method.also_train": ""}).method)
    for field, value in (("scope", "("), ("scope", ""), ("also_train", "a,a"), ("also_train", "(")):
        with pytest.raises(SpecError, match=rf"method\.{field} = .*regular expression"):
            derive(spec, {f"method.{field}": value})


# --- saved, taken off, merged


@pytest.mark.parametrize("name", ADAPTING)
def test_the_base_stays_what_it_was(name: str) -> None:
    plain = bart()
    model = stirred(with_adapter(name, also_train=(BIASES, NORMS)))
    after, before = logits(model), logits(plain)
    assert fingerprint(model) == fingerprint(plain) and not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(logits(merge(model)), after, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(unmerge(model)), after)
    layers = detach(model)
    assert torch.equal(logits(model), before) and fingerprint(model) == fingerprint(plain)
    assert torch.equal(logits(attach(model, layers)), after)


# also_train, format, bias and whole modules as PEFT's configuration has them
FORMS = {
    "biases and norms": ((BIASES, NORMS), "peft", "all", 7),
    "norms": ((NORMS,), "peft", "none", 7),
    "biases of the layers": ((r"[qv]_proj\.bias$",), "peft", "lora_only", 0),
    "biases of the layers, norms": ((r"[qv]_proj\.bias$", NORMS), "peft", "lora_only", 7),
    "one bias": ((r"encoder\.layers\.0\.fc1\.bias$",), "tensors", None, 0),
    "some biases of the layers": ((r"q_proj\.bias$",), "tensors", None, 0),
}


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_loads_as_itself_and_in_peft(form: str, name: str, tmp_path: Path) -> None:
    patterns, format, bias, modules = FORMS[form]
    model = stirred(with_adapter(name, also_train=patterns))
    save_adapter(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "dora_lab.json").read_text())["format"] == format
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config.get("bias"), len(config.get("modules_to_save", ()))) == (bias, modules)
    again = load_adapter(bart(), tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()
    if format == "peft":
        theirs: Any = PeftModel.from_pretrained(bart(), tmp_path / "saved").eval()
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    else:
        with pytest.raises(
            CheckpointError, match="is saved whole; PEFT takes all of a module's parameters, or all bia"
        ):
            save_adapter(model, tmp_path / "peft", "peft")
    with pytest.raises(CheckpointError, match="is saved whole, which format 'authors' cannot hold"):
        save_adapter(model, tmp_path / "authors", "authors")
    export(model, tmp_path / "whole")
    merged = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_of_a_method_that_peft_has_not(tmp_path: Path) -> None:
    model = stirred(with_adapter("ft_modules", also_train=(BIASES, NORMS), scope="encoder"))
    save_adapter(model, tmp_path)
    again = load_adapter(bart(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model)) and trained(again) == trained(model)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_peft_trained_are_read(bias: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"], bias=bias, use_dora=True)
    theirs: Any = stirred(get_peft_model(bart(), config))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no dora_lab.json"):
        again = load_adapter(bart(), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-6)
    file = tmp_path / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if "fc1.base_layer" not in key}
    save_file(kept, file)
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match=rf"bias = '{bias}' in .*the trained bias of '.*fc1' is not in"),
    ):
        load_adapter(bart(), tmp_path)


class Marked(nn.Module):
    """A parameter of its own beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.mark = nn.Linear(6, 6, bias=False), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.mark


def test_a_parameter_beside_modules_is_held_by_our_own_form_alone(tmp_path: Path) -> None:
    model = Marked()
    inject(model, Method(name="lora", rank=2, alpha=2.0, target_modules=("q_proj",), also_train=("mark",)), seed=0)
    stirred(model)
    with pytest.raises(CheckpointError, match=r"'' is saved whole but for the modules in it"):
        save_adapter(model, tmp_path / "peft", "peft")
    save_adapter(model, tmp_path / "own")
    again, x = load_adapter(Marked(), tmp_path / "own"), torch.randn(3, 6)
    assert torch.equal(again(x), model(x)) and not torch.equal(again(x), Marked()(x))


# --- runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_model(tmp_path_factory.mktemp("model")), save_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("end", ENDS)
def test_resume_is_the_same_as_one_go(end: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    spec = make_spec(method__also_train="norm", method__scope=r"layers\.1\.", optim__groups="norm=0.5:0.1")
    whole = go(spec, tmp_path / "whole", *inputs)
    assert {name.rpartition(".")[0] for name in whole if "norm" in name} == {
        "model.norm", *(f"model.layers.{n}.{where}_layernorm" for n in (0, 1) for where in ("input", "post_attention"))
    }  # fmt: skip
    assert len(whole) == 5 + 2 * 3
    stop = threading.Event()
    ended: Callable[[threading.Event], Any] = ENDS[end]
    with pytest.raises((Interrupted, Killed)):
        go(spec, tmp_path / "cut", *inputs, callbacks=[ended(stop)], stop=stop)
    cut = go(spec, tmp_path / "cut", *inputs)
    assert cut.keys() == whole.keys() and all(torch.equal(cut[name], whole[name]) for name in whole)
    assert rows(tmp_path / "cut", spec, "metrics") == rows(tmp_path / "whole", spec, "metrics")
    other = go(derive(spec, {"optim.groups": ""}), tmp_path / "other", *inputs)
    assert not torch.equal(other["model.norm.weight"], whole["model.norm.weight"])


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_leave_what_one_does(shard: bool, tmp_path: Path) -> None:
    changes: Any = {"method__also_train": "norm", "method__dropout": 0.0, "optim__micro_batch_size": 2}
    spec = crash.small_spec("dora", **changes)
    crash.finish(tmp_path / "one", spec)
    crash.finish(tmp_path / "two", spec, processes=2, shard=shard)
    files = [next((run_path(tmp_path / name, spec) / "adapter").glob("*.safetensors")) for name in ("one", "two")]
    one, two = map(load_file, files)
    base = load_file(crash.paths(tmp_path).model_dir / "model.safetensors")
    assert one.keys() == two.keys() and sum("norm.weight" in name for name in one) == 5
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
        if "norm.weight" in name:
            assert not torch.equal(tensor, base[name.removeprefix("base_model.model.")])
