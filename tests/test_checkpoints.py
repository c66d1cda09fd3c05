"""Adapters in and out of files: PEFT both ways, the authors' release, LyCORIS; what is refused; export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dora_lab
from dora_lab.formats.live import export, fingerprint, load_adapter, save_adapter
from dora_lab.formats.read import read_adapter
from dora_lab.io.errors import CheckpointError
from dora_lab.methods.inject import adapted
from dora_lab.spec import Method

IDS = torch.arange(14).view(2, 7)
QV = ("q_proj", "v_proj")


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, attention_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()  # type: ignore[arg-type]


class Pictures(nn.Module):
    """Two convolutions, one in two dimensions with a bias, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 12)
        self.along = nn.Conv1d(12, 8, 3, padding=1, bias=False)
        self.over = nn.Conv2d(1, 6, 3, stride=2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.over(self.along(self.table(ids).transpose(1, 2))[:, None])


def pictures() -> Any:
    torch.manual_seed(0)
    return Pictures().eval()


CASES: dict[str, tuple[Any, tuple[str, ...], Tensor]] = {
    "llama": (llama, ("q_proj", "v_proj", "down_proj"), IDS),
    "gpt2": (gpt2, ("c_attn", "c_proj"), IDS),
    "pictures": (pictures, ("table", "along", "over"), IDS % 9),
}


def stirred(model: Any) -> Any:
    """Every trained parameter moved, so that nothing is at its start."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(name: str = "dora", model: Any = None, **changes: Any) -> Any:
    model = model or llama()
    changes = {"rank": 4, "alpha": 8.0, "target_modules": QV} | changes
    dora_lab.inject(model, Method(name=name, **changes), seed=0)
    return stirred(model)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_takes_our_folder(case: str, name: str, tmp_path: Path) -> None:
    make, targets, ids = CASES[case]
    model = ours(name, make(), target_modules=targets)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    assert not torch.allclose(logits(model, ids), logits(make(), ids))
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    again = load_adapter(make(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": "first", "alpha_pattern": "second"}])
def test_we_take_pefts_folder(case: str, dora: bool, more: dict[str, Any], tmp_path: Path) -> None:
    make, targets, ids = CASES[case]
    if more:
        more = more | {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[1]: 5}}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), use_dora=dora, **more)
    theirs = stirred(peft.get_peft_model(make(), config))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="whether this is its base could not be checked"):
        model = load_adapter(make(), tmp_path).eval()
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"} | ({"magnitude"} if dora else set())


def test_modules_saved_whole_come_along(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["norm"])
    theirs = stirred(peft.get_peft_model(llama(), config))
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning):
        model = load_adapter(llama(), tmp_path)
    assert not torch.equal(model.model.norm.weight, llama().model.norm.weight)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_patterns_and_rslora_go_out_and_in(tmp_path: Path) -> None:
    model = ours(rslora=True, rank_pattern=("layers.1.self_attn.q_proj=2",), alpha_pattern=("v_proj=3",))
    assert {layer.lora_A.shape[0] for _, layer in adapted(model)} == {2, 4}  # type: ignore[union-attr]
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(model))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_the_authors_format_both_ways(tmp_path: Path) -> None:
    model = ours(magnitude_modules=("o_proj", "up_proj"))  # as in table 6
    save_adapter(model, tmp_path, format="authors")
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert keys["base_model.model.model.layers.0.self_attn.q_proj.weight_m_wdecomp.weight"].shape == (16, 1)
    assert "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight" not in keys
    adapter = read_adapter(tmp_path)
    assert adapter.format == "authors" and all(layer.magnitude is not None for layer in adapter.layers.values())
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model))
    # the release is pickled
    torch.save(keys, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "dora_lab.json").unlink()
    with pytest.raises(CheckpointError, match="a pickle can run code"), pytest.warns(UserWarning):
        load_adapter(llama(), tmp_path)
    with pytest.warns(UserWarning):
        assert torch.equal(logits(load_adapter(llama(), tmp_path, allow_pickle=True)), logits(model))
    with pytest.raises(CheckpointError, match=r"cannot hold a magnitude without factors .*authors"):
        save_adapter(model, tmp_path / "peft", format="peft")


def lycoris(model: Any, *, axis: str = "out") -> dict[str, Tensor]:
    found = {}
    for name, layer in adapted(model):
        flat = "lora_unet_" + name.replace(".", "_")
        found[f"{flat}.lora_down.weight"], found[f"{flat}.lora_up.weight"] = layer.lora_A.data, layer.lora_B.data
        found[f"{flat}.alpha"] = torch.tensor(layer.scaling * 4)  # type: ignore[operator]
        m = layer.magnitude.data
        found[f"{flat}.dora_scale"] = {"out": m[:, None], "in": m[None], "unsaid": m}[axis].contiguous()  # type: ignore[index]
    return found  # type: ignore[return-value]


def test_lycoris_with_its_axis_recognised_or_refused(tmp_path: Path) -> None:
    model, file = ours(), tmp_path / "some.safetensors"
    save_file(lycoris(model), file)
    with pytest.warns(UserWarning):
        torch.testing.assert_close(logits(load_adapter(llama(), file)), logits(model))
    for axis, words in (("in", "one magnitude per input feature"), ("unsaid", "does not say its axis")):
        save_file(lycoris(model, axis=axis), file)
        with pytest.raises(CheckpointError, match=words), pytest.warns(UserWarning):
            load_adapter(llama(), file)
    save_file(lycoris(model), file)
    with pytest.raises(CheckpointError, match="give the base's module names"):
        read_adapter(file)
    with pytest.raises(CheckpointError, match=r"names several modules of the base: could be a_b, a\.b"):
        save_file({k.replace(k.split(".")[0], "lora_unet_a_b"): v for k, v in list(lycoris(model).items())[:4]}, file)
        read_adapter(file, ["a_b", "a.b"])


# --- the base and the file are checked


def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    save_adapter(ours(), tmp_path, base_name="some/base")
    other = llama(seed=1)
    with pytest.raises(CheckpointError, match=r"made for the base some/base \(\w{12}\), this model's is \w{12}"):
        load_adapter(other, tmp_path)
    assert all(parameter.requires_grad for parameter in other.parameters()) and not list(adapted(other))
    assert fingerprint(ours()) == fingerprint(llama()) == fingerprint(llama().bfloat16()) != fingerprint(other)
    load_adapter(llama().bfloat16(), tmp_path)


@pytest.mark.parametrize("at", [10, 2000, -3])
def test_a_flipped_bit_is_seen(at: int, tmp_path: Path) -> None:
    save_adapter(ours(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: missing or changed"):
        load_adapter(llama(), tmp_path)


def test_two_adapters_on_one_base(tmp_path: Path) -> None:
    base, expected = llama(), []
    for seed in (1, 2):
        model = ours()
        with torch.no_grad():
            next(layer for _, layer in adapted(model)).magnitude.add_(seed)  # type: ignore[operator]
        save_adapter(model, tmp_path / str(seed))
        expected.append(logits(model))
    before = logits(base)
    load_adapter(base, tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"the sum of two DoRAs is no DoRA .* detach\(model\) first"):
        load_adapter(base, tmp_path / "2")
    first = dora_lab.detach(base)
    assert torch.equal(logits(base), before)
    load_adapter(base, tmp_path / "2")
    assert torch.equal(logits(base), expected[1])
    with pytest.raises(ValueError, match="is adapted already"):
        dora_lab.attach(base, first)
    second = dora_lab.detach(base)
    assert torch.equal(logits(dora_lab.attach(base, first)), expected[0])
    weights = [next(iter(layers.values())).weight.data_ptr() for layers in (first, second)]
    assert weights[0] == weights[1], "two adapters hold two copies of the base"
    with pytest.raises(ValueError, match="does not hold the base weight"):
        dora_lab.attach(llama(), first)


def test_merging_is_undone_bit_for_bit() -> None:
    for make, targets, ids in CASES.values():
        model = ours("dora", make(), target_modules=targets)
        before, state = logits(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
        plain = make()
        dora_lab.merge(model)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)
        dora_lab.unmerge(model)
        assert torch.equal(logits(model, ids), before)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        dora_lab.detach(model)
        assert torch.equal(logits(model, ids), logits(plain, ids)), "the base is not what it was"
    with pytest.raises(ValueError, match="nothing to unmerge"):
        dora_lab.unmerge(llama())


def test_merging_out_of_a_types_range_is_refused() -> None:
    model = ours("dora", llama().half())
    with torch.no_grad():
        next(layer for _, layer in adapted(model)).magnitude.fill_(1e7)  # type: ignore[operator]
    with pytest.raises(
        ValueError, match=r"q_proj: the merged weight is not finite in torch.float16; merge into a wider"
    ):
        dora_lab.merge(model)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_export_is_a_plain_folder(case: str, tmp_path: Path) -> None:
    make, targets, ids = CASES[case]
    model = ours("dora", make(), target_modules=targets)
    before = logits(model, ids)
    export(model, tmp_path / "merged")
    assert torch.equal(logits(model, ids), before) and list(adapted(model)), "the live model was disturbed"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain, ids), before, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    with pytest.raises(CheckpointError, match="is not empty"):
        export(model, tmp_path / "merged")


# --- files that cannot be used


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retensor(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
WRONG: dict[str, tuple[Any, str]] = {
    "no magnitudes": (
        lambda f: retensor(f, lambda t: t.pop(Q + "lora_magnitude_vector")),
        "use_dora is true but 'model.layers.0.self_attn.q_proj' has no lora_magnitude_vector",
    ),
    "magnitudes unasked": (lambda f: edit(f, use_dora=False), "has a magnitude but use_dora is not true"),
    "no B": (lambda f: retensor(f, lambda t: t.pop(Q + "lora_B.weight")), "q_proj': lora_B is missing"),
    "nan": (lambda f: retensor(f, lambda t: t[Q + "lora_A.weight"].fill_(float("nan"))), "A holds numbers that are"),
    "rank": (lambda f: edit(f, r=3), "has rank 4, its configuration says 3"),
    "no rank": (lambda f: edit(f, r=None), "r = None must be a positive number"),
    "a flag in words": (lambda f: edit(f, use_rslora="false"), "use_rslora = 'false' must be true or false"),
    "another tuner": (lambda f: edit(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "replicated layers": (lambda f: edit(f, layer_replication=[[0, 2]]), "layer_replication = "),
    "from the future": (lambda f: edit(f, use_whatever=True), "use_whatever = True: changes what the adapter computes"),
    "trained bias": (lambda f: edit(f, bias="all"), "bias = 'all'"),
    "base changed": (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "bad pattern": (lambda f: edit(f, rank_pattern={"(": 4}), "'\\(' is not a regular expression"),
    "odd key": (lambda f: retensor(f, lambda t: t.update(odd=torch.zeros(1))), "key 'odd' does not begin with"),
    "other module": (
        lambda f: retensor(f, lambda t: t.update({k.replace("q_proj", "qq_proj"): t.pop(k) for k in list(t)})),
        "the base has no module 'model.layers.0.self_attn.qq_proj': is it the right base\\? did you mean",
    ),
    "other shape": (
        lambda f: retensor(f, lambda t: t.update({Q + "lora_A.weight": torch.zeros(4, 17)})),
        "lora_A is \\(4, 17\\) in the file, the base needs \\(4, 16\\)",
    ),
    "pointer": (
        lambda f: (f / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a git-LFS pointer, not the weights",
    ),
    "web page": (lambda f: (f / "adapter_model.safetensors").write_text("<!doctype html>"), "a web page, not weights"),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:999]),
        "not a whole safetensors file",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors in it"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(ours(), folder)
    (folder / "dora_lab.json").unlink()
    return folder


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_files_that_cannot_be_used_say_why(name: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    change, words = WRONG[name]
    change(folder)
    model = llama()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(adapted(model)) and all(p.requires_grad for p in model.parameters()), "the model was changed"


@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_a_manifest_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    save_adapter(ours(), tmp_path)
    manifest = json.loads((tmp_path / "dora_lab.json").read_text())
    for name in ("../adapter_config.json", "/etc/passwd"):
        (tmp_path / "dora_lab.json").write_text(json.dumps(manifest | {"files": {name: "0"}}))
        with pytest.raises(CheckpointError, match="names a file outside its folder"):
            load_adapter(llama(), tmp_path)
    (tmp_path / "dora_lab.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a manifest"):
        load_adapter(llama(), tmp_path)
    with pytest.raises(CheckpointError, match="no adapter to save"):
        save_adapter(llama(), tmp_path / "none")
    with pytest.raises(CheckpointError, match="format 'gguf' cannot be written; choices: authors, peft"):
        save_adapter(ours(), tmp_path / "none", format="gguf")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "peft_type", "bias", "new")
QUIET = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@QUIET
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3) | JSON)
def test_any_configuration_is_read_or_refused(changes: Any, saved: Path, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(saved / "adapter_model.safetensors", folder)
    whole = json.loads((saved / "adapter_config.json").read_text())
    values = whole | changes if isinstance(changes, dict) else changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    try:
        adapter = read_adapter(folder)
    except CheckpointError:
        return
    assert len(adapter.layers) == 4 and all(layer.scaling > 0 for layer in adapter.layers.values())


@QUIET
@given(at=st.integers(0, 700), new=st.binary(min_size=1, max_size=4), cut=st.integers(0, 40))
def test_any_bytes_are_read_or_refused(at: int, new: bytes, cut: int, saved: Path, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(saved / "adapter_config.json", folder)
    content = bytearray((saved / "adapter_model.safetensors").read_bytes())
    content[at : at + len(new)] = new
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) - cut])
    try:
        adapter = read_adapter(folder)
    except CheckpointError:
        return
    assert all(layer.magnitude is not None for layer in adapter.layers.values())
