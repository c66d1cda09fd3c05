"""Faults of saved weights: 1, 2, 3, 11, 12, 13, 14, 22 and the quantised base."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import torch

from dora_lab import mini
from dora_lab.formats.live import export, load_adapter
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.models.base import hash_model, model_folder
from dora_lab.models.open import open_model
from dora_lab.probing import saved_models
from tests.faults import fault
from tests.faults._models import adapted, copy, flip, header_of, llama, logits, refused, write_header
from tests.tiny import make_spec

WEIGHTS = "adapter_model.safetensors"


@fault(1, "weights cut off, or something else: garbage, git-LFS pointer, web page, pickle")
def something_else(folder: Path, rng: random.Random) -> str:
    whole = rng.choice(["adapter", "base"])
    saved = copy(whole, folder)
    file = saved / (WEIGHTS if whole == "adapter" else "model.safetensors")
    (saved / "dora_lab.json").unlink(missing_ok=True)
    content = file.read_bytes()
    offers = {
        "cut": content[: rng.randrange(1, len(content))],
        "empty": b"",
        "garbage": rng.randbytes(rng.randrange(1, 4000)),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "page": b"<!doctype html><html>404</html>",
        "pickle": pickle.dumps({"a": 1}, protocol=rng.choice([2, 4])),
    }
    kind = rng.choice(sorted(offers))
    file.write_bytes(offers[kind])
    words = {"pointer": "git-LFS pointer", "page": "web page", "pickle": "pickle"}.get(kind, "fetch it again")
    if whole == "adapter":
        return refused(CheckpointError, lambda: load_adapter(llama(), saved), str(file), words)
    return refused(CheckpointError, lambda: open_model(saved, "float32"), str(file), words)


@fault(2, "a bit flipped in a saved adapter")
def flipped_adapter(folder: Path, rng: random.Random) -> str:
    saved, base = copy("adapter", folder), copy("base", folder)
    flip(saved / rng.choice([WEIGHTS, "adapter_config.json"]), rng)
    model = llama()
    before = logits(model)
    text = refused(CheckpointError, lambda: load_adapter(model, saved), "changed since it was saved")
    assert torch.equal(logits(model), before), "the model was changed"
    refused(CheckpointError, lambda: list(saved_models.probe(base, [saved])))
    return text


@fault(2, "a bit flipped in an exported model or in the embedded base")
def flipped_model(folder: Path, rng: random.Random) -> str:
    if rng.random() < 0.5:
        saved = export(adapted(), folder / "merged")
        flip(saved / rng.choice(["model.safetensors", "config.json"]), rng)
        return refused(CheckpointError, lambda: open_model(saved, "float32"), "changed since it was saved")
    base = folder / "base"
    base.mkdir()
    for file in mini.folder().iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    found = hash_model(base)
    flip(base / "model.safetensors", rng, start=8)
    spec = make_spec(model__revision=found[:12])
    return refused(LoadError, lambda: model_folder(spec.model, base), "the spec asks for")


@fault(3, "a name twice in a safetensors header, or another shape for the same bytes")
def twisted_header(folder: Path, rng: random.Random) -> str:
    saved = copy("adapter", folder)
    (saved / "dora_lab.json").unlink()
    table, payload = header_of(saved / WEIGHTS)
    name = rng.choice([key for key in table if key != "__metadata__"])
    if rng.random() < 0.5:
        one, other = json.dumps({name: table[name]})[1:-1], json.dumps(table)[1:-1]
        write_header(saved / WEIGHTS, "{" + one + ", " + other + "}", payload)
        return refused(CheckpointError, lambda: load_adapter(llama(), saved), "is there twice")
    count = 1
    for size in table[name]["shape"]:
        count *= size
    old = tuple(table[name]["shape"])
    shapes = [(2, count // 2), (count // 4, 4), *([(count,), (count // 2, 2), (1, count, 1)] if len(old) > 1 else [])]
    new = rng.choice([shape for shape in shapes if shape != old])
    table[name]["shape"] = list(new)
    write_header(saved / WEIGHTS, json.dumps(table), payload)
    return refused(CheckpointError, lambda: load_adapter(llama(), saved))


@fault(11, "an adapter on another base of the same shapes")
def another_base(folder: Path, rng: random.Random) -> str:
    saved = copy("adapter", folder)
    other = llama(seed=rng.randrange(1, 10**6))
    other.save_pretrained(folder / "other")
    refused(CheckpointError, lambda: list(saved_models.probe(folder / "other", [saved])), "another base")
    return refused(CheckpointError, lambda: load_adapter(other, saved), "made for the base")


@fault(12, "an adapter on a base of another width")
def another_width(folder: Path, rng: random.Random) -> str:
    saved = copy("adapter", folder)
    (saved / "dora_lab.json").unlink()
    return refused(
        CheckpointError, lambda: load_adapter(llama(hidden=rng.choice([8, 24, 32])), saved), "the base needs"
    )


@fault(13, "a DoRA adapter without some of its magnitudes")
def without_magnitude(folder: Path, rng: random.Random) -> str:
    from safetensors.torch import load_file, save_file

    saved = copy("adapter", folder)
    (saved / "dora_lab.json").unlink()
    tensors = load_file(saved / WEIGHTS)
    magnitudes = [key for key in tensors if "magnitude" in key]
    for key in rng.sample(magnitudes, rng.randrange(1, len(magnitudes) + 1)):
        del tensors[key]
    save_file(tensors, saved / WEIGHTS)
    return refused(CheckpointError, lambda: load_adapter(llama(), saved), "has no lora_magnitude_vector")


@fault(14, "a tied lm_head adapted, merged and saved")
def tied_head(folder: Path, rng: random.Random) -> str:
    end = rng.choice(["lm_head", "embed_tokens"])
    model = adapted(rng.choice(["lora", "dora"]), target_modules=("q_proj", end))
    before = logits(model)
    export(model, folder / "merged")
    assert torch.equal(logits(model), before) and model.config.tie_word_embeddings, "the live model was changed"
    plain = open_model(folder / "merged", "float32")
    assert torch.allclose(logits(plain), before, atol=1e-4), "the saved model is another function"
    plain.tie_weights()
    assert torch.allclose(logits(plain), before, atol=1e-4), "the saved model would be tied again"
    llama().save_pretrained(folder / "base")
    rows = list(saved_models.probe(folder / "base", [folder / "base"], kinds=["embed_tokens"]))
    assert len(rows) == 1, "a tied tensor was counted twice"
    return f"the merged model is saved with two matrices, tie_word_embeddings = false ({end} was adapted)"


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


@fault(22, "pickled weights, or a model that brings its own code")
def foreign_code(folder: Path, rng: random.Random) -> str:
    trace = folder / "ran"
    kind = rng.choice(["adapter", "model", "renamed", "code"])
    if kind == "adapter":
        saved = copy("adapter", folder)
        (saved / WEIGHTS).unlink()
        (saved / "dora_lab.json").unlink()
        (saved / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb(trace)))
        text = refused(CheckpointError, lambda: load_adapter(llama(), saved), "a pickle can run code")
        refused(CheckpointError, lambda: load_adapter(llama(), saved, allow_pickle=True), "not a file of plain tensors")
    else:
        saved = copy("base", folder)
        if kind == "code":
            config = json.loads((saved / "config.json").read_text())
            config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Mine"}}
            (saved / "config.json").write_text(json.dumps(config))
            (saved / "code.py").write_text(f"open({str(trace)!r}, 'w')")
        else:
            (saved / "model.safetensors").unlink()
            name = "model.safetensors" if kind == "renamed" else "pytorch_model.bin"
            (saved / name).write_bytes(pickle.dumps(_Bomb(trace)))
        words = "asks for code of its own" if kind == "code" else "pickle"
        text = refused(CheckpointError, lambda: open_model(saved, "float32"), words)
    assert not trace.exists(), "the code was run"
    return text


@fault("extra", "a quantised base in the probe")
def quantised(folder: Path, rng: random.Random) -> str:
    from safetensors.torch import load_file, save_file

    base, saved = copy("base", folder), copy("adapter", folder)
    tensors = load_file(base / "model.safetensors")
    gptq = rng.random() < 0.5
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        packed = (tensors.pop(key) * 100).to(torch.int8)
        tensors[key.replace(".weight", ".qweight") if gptq else key] = packed
    tensors = {k: v for k, v in tensors.items() if not gptq or ("embed" not in k and "lm_head" not in k)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    words = "is it quantised" if gptq else "quantised weights have to be dequantised"
    text = refused(CheckpointError, lambda: list(saved_models.probe(base, [base])), words)
    refused(CheckpointError, lambda: list(saved_models.probe(base, [saved])))
    return text


@fault("extra", "an index of shards with huge, false or hostile entries")
def huge_index(folder: Path, rng: random.Random) -> str:
    saved = copy("base", folder)
    names = list(header_of(saved / "model.safetensors")[0])
    kind = rng.choice(["lost", "many", "huge", "number", "missing"])
    shard = "model-00001-of-00001.safetensors"  # beside a single file no index is read
    (saved / "model.safetensors").rename(saved / shard)
    table: Any = dict.fromkeys([name for name in names if name != "__metadata__"], shard)
    if kind == "lost":
        table["model.layers.99.self_attn.q_proj.weight"] = shard
    elif kind == "many":
        table |= {f"model.layers.{n}.w": shard for n in range(20_000)}
    elif kind == "number":
        table[names[-1]] = rng.choice([10**400, None, [], {"a": 1}])
    elif kind == "missing":
        table[names[-1]] = f"model-{10**9:05}-of-99999.safetensors"
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 10**30}, "weight_map": table}))
    if kind == "huge":
        with index.open("ab") as file:
            file.truncate(200_000_000)  # sparse: no such space is taken
    return refused(CheckpointError, lambda: list(saved_models.probe(saved, [saved])))
