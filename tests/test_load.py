"""Models, tokenizers and items: pinned, checked, and refused with a reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import boolq_items, make_spec, save_data, save_model

from dora_lab import load
from dora_lab.load import LoadError
from dora_lab.load.data import _shares
from dora_lab.tasks import ItemError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return save_data(tmp_path / "data")


def test_items_of_a_folder(data_dir: Path) -> None:
    items = load.items(make_spec(), data_dir)
    assert items.counts() == {"train": {"boolq": 40}, "validation": {}, "test": {"boolq": 12, "ARC-Easy": 12}}
    assert items.test["boolq"] == boolq_items(12, start=1000)


def test_validation_items_are_held_out_and_the_same_for_every_seed(data_dir: Path) -> None:
    one = load.items(make_spec(data__validation_items=10, data__train_items=20), data_dir)
    two = load.items(make_spec(data__validation_items=10, data__train_items=20, seed=1), data_dir)
    assert one == two
    questions = {item["instruction"] for item in one.validation["boolq"]}
    assert len(questions) == 10
    assert not questions & {item["instruction"] for item in one.train["boolq"]}
    assert len(one.train["boolq"]) == 20


def test_more_items_than_there_are(data_dir: Path) -> None:
    with pytest.raises(LoadError, match=r"41 items wanted, 40 there"):
        load.items(make_spec(data__train_items=41), data_dir)


def test_subsets_are_even_over_tasks() -> None:
    pools = {name: [{}] * size for name, size in {"a": 100, "b": 3, "c": 100}.items()}
    assert _shares(pools, 31) == {"a": 14, "b": 3, "c": 14}


def test_items_of_the_embedded_world() -> None:
    from dora_lab.__main__ import load_experiment

    for name in ("commonsense", "commonsense_sweep"):
        spec = load_experiment(name).specs("mini")[-1]
        items = load.items(spec)
        counts = items.counts()
        assert sum(counts["train"].values()) == spec.data.train_items
        assert max(counts["train"].values()) - min(counts["train"].values()) <= 1
        assert set(counts["test"].values()) == {spec.data.test_items}
        assert sum(counts["validation"].values()) == spec.data.validation_items
        for task in spec.data.tasks:
            asked = {item["instruction"] for item in items.train[task]}
            assert not asked & {item["instruction"] for item in items.test[task] + items.validation.get(task, [])}


def test_data_hash_is_of_content_and_is_checked(data_dir: Path, tmp_path: Path) -> None:
    found = load.hash_data(data_dir)
    shutil.copytree(data_dir, tmp_path / "copy")
    assert load.hash_data(tmp_path / "copy") == found
    load.items(make_spec(data__sha256=found), data_dir)
    file = data_dir / "boolq" / "test.json"
    file.write_text(json.dumps(boolq_items(11)))
    assert load.hash_data(data_dir) != found
    with pytest.raises(LoadError, match=r"content hash .* the spec asks for"):
        load.items(make_spec(data__sha256=found), data_dir)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"give it with --data-dir"):
        load.items(make_spec())
    with pytest.raises(LoadError, match=r"has no <task>/train.json"):
        load.hash_data(tmp_path)
    with pytest.raises(LoadError, match=r"unknown data source 'mimi'.*did you mean 'mini'"):
        load.items(make_spec(data__name="mimi"))


def test_a_task_without_its_test_file_is_named(data_dir: Path) -> None:
    with pytest.raises(ItemError, match=r"piqa.test\.json does not exist"):
        load.items(make_spec(data__tasks="boolq,piqa"), data_dir)


def test_model_in_the_asked_type_with_an_explicit_padding_policy(model_dir: Path) -> None:
    import torch

    model, tokenizer = load.model_and_tokenizer(make_spec(model__dtype="bfloat16"), model_dir)
    assert model.dtype == torch.bfloat16
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_tokenizer_without_padding_token(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("pad_token")
    file.write_text(json.dumps(settings))
    _, tokenizer = load.model_and_tokenizer(make_spec(), folder)
    assert tokenizer.pad_token == "</s>"


def test_model_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    found = load.hash_model(model_dir)
    spec = make_spec()
    load.model_folder(replace(spec.model, revision=found[:12]), model_dir)
    with pytest.raises(LoadError, match=r"has the fingerprint .* the spec asks for 000000000000"):
        load.model_folder(replace(spec.model, revision="0" * 12), model_dir)
    with pytest.raises(LoadError, match=r"no config.json"):
        load.hash_model(tmp_path)


def test_pickled_weights_are_not_loaded(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"no \*\.safetensors; pickled weights"):
        load.model_and_tokenizer(make_spec(), folder)


def test_weights_that_do_not_fill_the_model(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"do not fill the model.*model.norm.weight"):
        load.model_and_tokenizer(make_spec(), folder)


def test_hub_cache_is_used_without_network(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "a" * 40
    snapshot = tmp_path / "models--org--small" / "snapshots" / commit
    shutil.copytree(model_dir, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    spec = make_spec(model__name="org/small", model__revision=commit)
    assert load.model_folder(spec.model) == snapshot
    load.model_and_tokenizer(spec)
    with pytest.raises(LoadError, match=r"model 'org/other' at revision a{40} is not in .* could not be fetched"):
        load.model_folder(replace(spec.model, name="org/other"))
