"""Models, tokenizers and items: pinned, checked, and refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import arc_items, boolq_items, make_spec, save_data, save_model

from dora_lab.io.errors import LoadError
from dora_lab.launch import inputs
from dora_lab.launch.runtime import Paths
from dora_lab.models.base import hash_model, model_and_tokenizer, model_folder
from dora_lab.tasks import ItemError, sources
from dora_lab.tasks.sources import _shares


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return save_data(tmp_path / "data")


def test_items_of_a_folder(data_dir: Path) -> None:
    items = sources.items(make_spec(), data_dir)
    assert items.counts() == {"train": {"boolq": 40}, "validation": {}, "test": {"boolq": 12, "ARC-Easy": 12}}
    assert items.test["boolq"] == boolq_items(12, start=1000)


def test_validation_items_are_held_out_and_the_same_for_every_seed(data_dir: Path) -> None:
    one = sources.items(make_spec(data__validation_items=10, data__train_items=20), data_dir)
    two = sources.items(make_spec(data__validation_items=10, data__train_items=20, seed=1), data_dir)
    assert one == two
    questions = {item["instruction"] for item in one.validation["boolq"]}
    assert len(questions) == 10
    assert not questions & {item["instruction"] for item in one.train["boolq"]}
    assert len(one.train["boolq"]) == 20


def test_more_items_than_there_are(data_dir: Path) -> None:
    with pytest.raises(LoadError, match=r"41 items wanted, 40 there"):
        sources.items(make_spec(data__train_items=41), data_dir)


def test_subsets_are_even_over_tasks() -> None:
    pools = {name: [{}] * size for name, size in {"a": 100, "b": 3, "c": 100}.items()}
    assert _shares(pools, 31) == {"a": 14, "b": 3, "c": 14}


@pytest.mark.parametrize("held", [0, 20])
def test_fewer_items_of_all_together_are_of_all_tasks(held: int, tmp_path: Path) -> None:
    for name in ("boolq", "ARC-Easy"):
        for split in ("train", "test"):
            file = tmp_path / name / f"{split}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(boolq_items(200) if name == "boolq" else arc_items(200)))
    spec = make_spec(data__holdout="mixed", data__train_items=100, data__validation_items=held)
    items = sources.items(spec, tmp_path)
    counts = items.counts()["train"]
    assert sum(counts.values()) == 100 and min(counts.get(name, 0) for name in ("boolq", "ARC-Easy")) > 30
    every = make_spec(data__holdout="mixed", data__train_items=400 - held, data__validation_items=held)
    whole = sources.items(every, tmp_path)
    if not held:  # all there are stay in file order
        assert whole.train == {"boolq": boolq_items(200), "ARC-Easy": arc_items(200)}
    for name, pool in items.train.items():
        assert all(item in whole.train[name] for item in pool)


def test_items_of_the_embedded_world() -> None:
    from dora_lab.launch.experiments import load_experiment

    for name in ("commonsense", "commonsense_sweep"):
        spec = load_experiment(name).specs("mini")[-1]
        items = sources.items(spec)
        counts = items.counts()
        assert sum(counts["train"].values()) == spec.data.train_items
        assert max(counts["train"].values()) - min(counts["train"].values()) <= 1
        assert set(counts["test"].values()) == {spec.data.test_items}
        assert sum(counts["validation"].values()) == spec.data.validation_items
        for task in spec.data.tasks:
            asked = {item["instruction"] for item in items.train[task]}
            assert not asked & {item["instruction"] for item in items.test[task] + items.validation.get(task, [])}


def test_data_hash_is_of_content_and_is_checked(data_dir: Path, tmp_path: Path) -> None:
    found = sources.hash_data(data_dir)
    shutil.copytree(data_dir, tmp_path / "copy")
    assert sources.hash_data(tmp_path / "copy") == found
    sources.items(make_spec(data__sha256=found), data_dir)
    file = data_dir / "boolq" / "test.json"
    file.write_text(json.dumps(boolq_items(11)))
    assert sources.hash_data(data_dir) != found
    with pytest.raises(LoadError, match=r"content hash .* the spec asks for"):
        sources.items(make_spec(data__sha256=found), data_dir)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"give it with --data-dir"):
        sources.items(make_spec())
    with pytest.raises(LoadError, match=r"has no <task>/train.json"):
        sources.hash_data(tmp_path)
    with pytest.raises(LoadError, match=r"unknown data source 'mimi'.*did you mean 'mini'"):
        sources.items(make_spec(data__name="mimi"))


def mix_spec(**changes: Any) -> Any:
    return make_spec(data__name="commonsense_170k", data__eval_name="llm_adapters", **changes)


@pytest.mark.parametrize("place", ["commonsense_170k.json", "ft-training_set/commonsense_170k.json"])
@pytest.mark.parametrize("tests", ["", "dataset"])
def test_layouts_of_llm_adapters(place: str, tests: str, tmp_path: Path) -> None:
    save_data(tmp_path / tests)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    bare = sources.hash_data(tmp_path)
    (tmp_path / place).write_text(json.dumps([*boolq_items(30), boolq_items(1)[0] | {"answer": ""}]))
    assert sources.tasks_in(tmp_path) == ["boolq", "ARC-Easy"]
    assert sources.hash_data(tmp_path) != bare
    items = sources.items(mix_spec(), tmp_path)
    assert items.counts()["train"] == {"commonsense_170k": 31} and items.counts()["test"] == {
        "boolq": 12,
        "ARC-Easy": 12,
    }
    found = inputs.fingerprints(mix_spec(), Paths(tmp_path, tmp_path))
    assert found["data"]["sha256"] == found["eval_data"]["sha256"] == sources.hash_data(tmp_path)
    with pytest.raises(LoadError, match="content hash"):
        sources.items(mix_spec(data__sha256=bare), tmp_path)


def test_sources_say_what_was_read(data_dir: Path) -> None:
    items = [*boolq_items(12, start=1000), *boolq_items(3), boolq_items(1)[0], boolq_items(1, start=1000)[0]]
    (data_dir / "boolq" / "train.json").write_text(json.dumps(items))
    found = sources.items(make_spec(data__train_items=10, data__test_items=5), data_dir).sources
    rows = {(row["task"], row["split"]): row for row in found}
    train, test = rows["boolq", "train"], rows["boolq", "test"]
    assert (train["items"], train["duplicates"], train["used"]) == (17, 2, 10)
    assert (test["items"], test["duplicates"], test["used"], test["asked_in_training"]) == (12, 0, 5, 12)
    assert (test["published"], test["published_verified"], test["agrees"]) == (3270, True, False)
    assert rows["ARC-Easy", "test"]["asked_in_training"] == 0
    assert sources.items(make_spec(data__name="mini", data__train_items=10, data__test_items=1)).sources == ()


def test_what_is_known_of_the_published_files_fits_together() -> None:
    from dora_lab.tasks.commonsense.released_files import ANSWER_KINDS, KNOWN, MIX, content_sha256

    parts = {task: known.items for (task, split), known in KNOWN.items() if split == "train" and task != MIX}
    assert sum(parts.values()) == sum(ANSWER_KINDS.values()) == KNOWN[MIX, "train"].items == 170_420
    assert not KNOWN[MIX, "train"].verified and all(known.verified for known in KNOWN.values() if known.sha256)
    items = boolq_items(3)
    reordered = [dict(reversed(item.items())) for item in items]
    assert content_sha256(items) == content_sha256(reordered) != content_sha256(items[::-1])


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_the_mix_from_the_hubs_cache(
    form: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants
    import pandas as pd

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "b" * 40
    folder = tmp_path / "datasets--zwhe99--commonsense_170k" / "snapshots" / commit
    folder.mkdir(parents=True)
    if form == "json":
        (folder / "data.json").write_text(json.dumps(boolq_items(30)))
    else:
        pd.DataFrame(boolq_items(30)).to_parquet(folder / "train.parquet")
    spec = mix_spec(data__revision=commit)
    found = sources.items(spec, data_dir).train["commonsense_170k"]
    assert sorted(found, key=str) == sorted(boolq_items(30), key=str)
    assert inputs.fingerprints(spec, Paths(tmp_path, data_dir))["data"] == {
        "name": "commonsense_170k", "revision": commit, "sha256": None,
    }  # fmt: skip
    for revision in ("none", "main", "b" * 39):
        with pytest.raises(
            LoadError, match=r"revision .* is no commit \(40 hex digits\).*dataset_info.*--with data\.revision="
        ):
            sources.items(mix_spec(data__revision=revision), data_dir)
    with pytest.raises(LoadError) as caught:
        sources.items(mix_spec(data__revision="c" * 40), data_dir)
    for words in ("hf download zwhe99/commonsense_170k", "c" * 40, "datasets--zwhe99--commonsense_170k", "--data-dir"):
        assert words in str(caught.value)


def test_hub_model_of_pickles_says_how_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--old" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"no \*\.safetensors.*convert them.*--model-dir"):
        model_folder(make_spec(model__name="org/old", model__revision="a" * 40).model)


def test_a_task_without_its_test_file_is_named(data_dir: Path) -> None:
    with pytest.raises(ItemError, match=r"piqa.test\.json does not exist"):
        sources.items(make_spec(data__tasks="boolq,piqa"), data_dir)


def test_model_in_the_asked_type_with_an_explicit_padding_policy(model_dir: Path) -> None:
    import torch

    model, tokenizer = model_and_tokenizer(make_spec(model__dtype="bfloat16"), model_dir)
    assert model.dtype == torch.bfloat16
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_tokenizer_without_padding_token(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("pad_token")
    file.write_text(json.dumps(settings))
    _, tokenizer = model_and_tokenizer(make_spec(), folder)
    assert tokenizer.pad_token == "</s>"


def test_model_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    found = hash_model(model_dir)
    spec = make_spec()
    model_folder(replace(spec.model, revision=found[:12]), model_dir)
    with pytest.raises(LoadError, match=r"has the fingerprint .* the spec asks for 000000000000"):
        model_folder(replace(spec.model, revision="0" * 12), model_dir)
    with pytest.raises(LoadError, match=r"no config.json"):
        hash_model(tmp_path)


def test_pickled_weights_are_not_loaded(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"no \*\.safetensors; pickled weights"):
        model_and_tokenizer(make_spec(), folder)


def test_weights_that_do_not_fill_the_model(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"do not fill the model.*model.norm.weight"):
        model_and_tokenizer(make_spec(), folder)


def test_hub_cache_is_used_without_network(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    commit = "a" * 40
    snapshot = tmp_path / "models--org--small" / "snapshots" / commit
    shutil.copytree(model_dir, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    spec = make_spec(model__name="org/small", model__revision=commit)
    assert model_folder(spec.model) == snapshot
    model_and_tokenizer(spec)
    with pytest.raises(LoadError, match=r"model 'org/other' at revision a{40} is not in .* could not be fetched"):
        model_folder(replace(spec.model, name="org/other"))


def test_a_folder_whose_name_no_record_can_hold_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"udcff.*: no Unicode name"):
        Paths(tmp_path, tmp_path / os.fsdecode(b"data\xff"))
