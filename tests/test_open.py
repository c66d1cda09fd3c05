"""What a model's folder is refused for before and while it is opened: every door, every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file
from tiny import save_data

from dora_lab import inject, save_adapter
from dora_lab.formats.shards import Shards
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.launch.given import look
from dora_lab.models import open as opening
from dora_lab.models.base import EMBEDDED, outline_and_tokenizer
from dora_lab.models.layout import Layout
from dora_lab.models.llava import open_llava
from dora_lab.models.open import open_as_saved, open_model
from dora_lab.models.vl_bart import open_vl_bart
from dora_lab.probing.saved_models import probe
from dora_lab.probing.watched import watched
from dora_lab.spec import Method

# with weights, as they are saved, and without: what `run own` looks at before it says what it will do
DOORS: dict[str, Callable[[Path], Any]] = {
    "open_model": lambda folder: open_model(folder, "float32"),
    "open_as_saved": open_as_saved,
    "outline": lambda folder: outline_and_tokenizer(folder)[0],
}
LAYERS = {"bloom": "n_layer", "gpt2": "n_layer"}  # elsewhere num_hidden_layers


def configured(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def with_layers(name: str, folder: Path, number: int) -> Path:
    """A folder of two layers whose config.json says another number, of which every list is cut or lengthened."""
    config = json.loads((folder / "config.json").read_text())
    lists = {key: (value * 3)[:number] for key, value in config.items() if key in ("layer_types", "mlp_layer_types")}
    return configured(folder, **{LAYERS.get(name, "num_hidden_layers"): number}, **lists)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_and_its_configuration_have_the_same_layers(name: str, tmp_path: Path) -> None:
    """A model of one of its two layers trains, too, and every number of it is wrong."""
    folder = save_family(name, tmp_path / name)
    assert all(DOORS[door](folder) is not None for door in DOORS)
    with_layers(name, folder, 1)
    for door in DOORS:
        with pytest.raises((CheckpointError, LoadError), match=r"\.1\..* have no place in .*correct config\.json"):
            DOORS[door](folder)
    with_layers(name, folder, 3)
    for door in DOORS:
        with pytest.raises((CheckpointError, LoadError), match=r"do not fill the model: .*'.*\.2\..*' *, are not in"):
            DOORS[door](folder)


@pytest.mark.parametrize("door", DOORS)
def test_another_shape_names_the_tensor_and_both_shapes(door: str, tmp_path: Path) -> None:
    folder = configured(save_family("qwen2", tmp_path / "model"), intermediate_size=48)
    with pytest.raises((CheckpointError, LoadError), match=r"mlp\.down_proj\.weight' is \(32, 64\) .* \(32, 48\)"):
        DOORS[door](folder)


@pytest.mark.parametrize("door", DOORS)
def test_what_transformers_ignores_on_purpose_is_ignored(door: str, tmp_path: Path) -> None:
    """Old files of GPT-2 hold masks, of others positions, and tied heads are saved twice."""
    folder = save_family("gpt2", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    DOORS[door](folder)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("max_position_embeddings", -5), ("hidden_size", 0), ("vocab_size", "many"), ("num_key_value_heads", True)],
)
def test_a_size_that_is_none_is_named(door: str, field: str, value: Any, tmp_path: Path) -> None:
    folder = configured(save_family("qwen2", tmp_path / "model"), **{field: value})
    with pytest.raises(
        (CheckpointError, LoadError), match=rf"config\.json: {field} = {value!r} is no size .*correct it"
    ):
        DOORS[door](folder)


def test_a_size_of_a_part_is_named_with_the_part(tmp_path: Path) -> None:
    folder = configured(save_family("qwen2", tmp_path / "model"), vision_config={"hidden_size": 0})
    with pytest.raises(CheckpointError, match=r"config\.json: vision_config\.hidden_size = 0"):
        open_model(folder, "float32")


def test_quantised_weights_are_refused_before_the_plan(tmp_path: Path) -> None:
    how = {"quant_method": "gptq", "bits": 4}
    folder = configured(save_family("qwen2", tmp_path / "model"), quantization_config=how)
    with pytest.raises(LoadError, match=r"its weights are quantised \(gptq\).* dequantise it"):
        outline_and_tokenizer(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_before_the_plan(number: float, tmp_path: Path) -> None:
    """But not of a mask: an old file's may be infinite."""
    folder, data = save_family("gpt2", tmp_path / "model"), save_data(tmp_path / "data")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-float("inf"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    look(folder, data, "cloze")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"model\.safetensors: 'transformer\.h\.1\.mlp\.c_fc\.weight' .* not finite"):
        look(folder, data, "cloze")


def test_the_reason_is_said_where_it_stands_in_the_second_line(tmp_path: Path) -> None:
    folder = save_family("qwen2", tmp_path / "model")

    def two_lines(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error(s) in loading state_dict:\n\tsize mismatch for lm_head")

    with pytest.raises(
        CheckpointError, match=r"RuntimeError: Error\(s\) in loading state_dict: size mismatch for lm_head"
    ):
        opening._call(folder, two_lines)


@pytest.mark.parametrize("name", [*FAMILIES, "mini_llava", "mini_vl"])
def test_initial_weights_are_found_by_the_models_names(name: str, tmp_path: Path) -> None:
    """What full fine-tuning's change is measured from is what was loaded, under whatever name the file has it."""
    if name in FAMILIES:
        folder = save_family(name, tmp_path / name)
        model: Any = open_model(folder, "float32")
    else:
        folder = EMBEDDED[name]()
        model = open_llava(folder)[0] if name == "mini_llava" else open_vl_bart(folder, 64, 0)[0]
    tensors = load_file(folder / "model.safetensors")
    stored = Layout(model).whole(tensors)
    layers = watched(model.requires_grad_(True), None)
    live = dict(model.named_parameters())
    drawn = {layer.name for layer in layers if "visual_embedding" in layer.name}  # not in a text base's files
    assert len(layers) > 4 and bool(drawn) == (name == "mini_vl")
    for layer in layers:
        if layer.name not in drawn:
            found = tensors[stored[f"{layer.name}.weight"]]
            assert torch.equal(found.float(), live[f"{layer.name}.weight"].float()), layer.name


def test_weights_are_of_the_files_that_transformers_reads(tmp_path: Path) -> None:
    """The single file before an index, which may be left of an earlier saving, and no other program's copy."""
    old, new, base = (save_family("qwen2", tmp_path / name) for name in ("old", "new", "base"))
    for folder, shift in ((old, 0.01), (new, 0.05)):
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {name: part + shift for name, part in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    open_model(old, "float32").save_pretrained(new, max_shard_size="20KB")  # removes the single file
    single = load_file(base / "model.safetensors")
    save_file({name: part + 0.05 for name, part in single.items()}, new / "model.safetensors", {"format": "pt"})
    assert (new / "model.safetensors.index.json").is_file() and len([*new.glob("model-*.safetensors")]) > 1
    save_file({"tok_embeddings.weight": torch.zeros(4, 4)}, new / "consolidated.safetensors")
    name, W0 = next((name, part) for name, part in single.items() if name.endswith("layers.0.mlp.up_proj.weight"))
    for loaded in (open_model(new, "float32"), open_as_saved(new)):
        assert torch.equal(loaded.state_dict()[name], W0 + 0.05)
    assert outline_and_tokenizer(new)[0] is not None
    (row,) = (row for row in probe(base, [new], kinds=["up_proj"]) if row["layer"] == 0)
    wanted = ((W0 + 0.05).double().norm(dim=1) - W0.double().norm(dim=1)).abs().mean().item()
    assert row["delta_m"] == pytest.approx(wanted, rel=1e-5)
    for shard in new.glob("model-*.safetensors"):
        shard.unlink()  # what the index names is not there: nobody asks
    assert open_model(new, "float32") is not None and [*probe(base, [new])]


@pytest.mark.parametrize("door", [*DOORS, "shards", "tuned"])
def test_an_adapter_beside_a_model_is_put_on_by_nobody(door: str, tmp_path: Path) -> None:
    """transformers' from_pretrained would, in silence; which of the two is meant, a probe could not know."""
    doors = DOORS | {"shards": Shards, "tuned": lambda folder: [*probe(tmp_path / "base", [folder])]}
    save_family("qwen2", tmp_path / "base")
    folder = save_family("qwen2", tmp_path / "model")
    model = peft.get_peft_model(open_model(folder, "float32"), peft.LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    model.save_pretrained(str(folder))
    with pytest.raises((CheckpointError, LoadError), match=r"adapter_config\.json lies beside the model"):
        doors[door](folder)


@pytest.mark.parametrize("door", [*DOORS, "shards"])
def test_weights_of_another_name_are_refused(door: str, tmp_path: Path) -> None:
    folder = configured(save_family("qwen2", tmp_path / "model"), transformers_weights="other.safetensors")
    with pytest.raises((CheckpointError, LoadError), match=r"asks for other weights .*'other\.safetensors'"):
        (DOORS | {"shards": Shards})[door](folder)


def test_weights_named_by_the_configuration_are_those_that_transformers_reads(tmp_path: Path) -> None:
    folder = configured(save_family("qwen2", tmp_path / "model"), transformers_weights="model.safetensors")
    assert open_model(folder, "float32") is not None and [*Shards(folder)]
    shards = tmp_path / "shards"
    open_model(folder, "float32").save_pretrained(shards, max_shard_size="20KB")
    configured(shards, transformers_weights="model.safetensors.index.json")
    save_file({"lm_head.weight": torch.zeros(1)}, shards / "model.safetensors")  # not read
    assert open_model(shards, "float32") is not None and {*Shards(shards)} == {*Shards(folder)}


def test_shards_are_read_whole_and_a_tensor_lies_in_one(tmp_path: Path) -> None:
    base, folder = save_family("qwen2", tmp_path / "base"), tmp_path / "model"
    open_model(base, "float32").save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    lost = next(name for name in table["weight_map"] if name.endswith("up_proj.weight"))
    file = table["weight_map"].pop(lost)
    index.write_text(json.dumps(table))  # transformers reads what it does not name
    assert lost in Shards(folder) and lost in open_model(folder, "float32").state_dict()
    other = next(name for name in table["weight_map"].values() if name != file)
    save_file(load_file(folder / other) | {lost: load_file(folder / file)[lost]}, folder / other, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{lost}' is in .*, too; save the model again"):
        Shards(folder)


def test_an_adapter_made_for_another_base_is_refused_by_whatever_names_its_modules_have(tmp_path: Path) -> None:
    """A model saved without its head has its modules' names without the first part."""
    base, other = (save_family("qwen2", tmp_path / name) for name in ("base", "other"))
    tensors = {name: part * 1.5 for name, part in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    model: Any = open_model(base, "float32")
    inject(model, Method(name="lora", rank=2, alpha=4.0, target_modules=("q_proj",)), 0)
    save_adapter(model, tmp_path / "adapter")
    for folder, right in ((base, True), (other, False)):
        headless = tmp_path / f"{folder.name} without a head"
        open_model(folder, "float32").model.save_pretrained(headless)
        for place in (folder, headless):
            if right:
                assert [*probe(place, [tmp_path / "adapter"])]
                continue
            with pytest.raises(CheckpointError, match="was made for another base"):
                [*probe(place, [tmp_path / "adapter"])]


def test_an_adapter_beside_a_pickled_model_is_ambiguous_too(tmp_path: Path) -> None:
    base, folder = (save_family("qwen2", tmp_path / name) for name in ("base", "model"))
    model: Any = peft.get_peft_model(open_model(folder, "float32"), peft.LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(str(folder))
    with pytest.raises(CheckpointError, match="lies beside the model"):
        [*probe(base, [folder], allow_pickle=True)]
