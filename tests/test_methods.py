"""Every file in methods/ keeps the whole contract: saved, loaded, probed, resumed, merged, counted; none by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_spec, small_method
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dora_lab
from dora_lab.decompose import delta_d, delta_m
from dora_lab.formats.live import load_adapter, save_adapter, save_trained
from dora_lab.io.errors import CheckpointError
from dora_lab.launch import plan
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.methods import catalog
from dora_lab.methods.catalog import entry_of, methods
from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.inject import adapted, inject
from dora_lab.methods.lora import LoraLinear
from dora_lab.models import shapes
from dora_lab.models.open import open_model
from dora_lab.probing import saved_models
from dora_lab.probing.callback import DecompositionCallback
from dora_lab.runs.record import read_record, run_path
from dora_lab.spec import Spec, to_dict

NAMES = methods()
TRAINED = [name for name in NAMES if entry_of(name).parameters != "0"]
TARGETS = ("q_proj", "v_proj", "down_proj")
IDS = torch.arange(3, 31).view(2, 14)


def base_of(inputs: Path) -> Any:
    return open_model(inputs / "model", "float32").eval()


def stirred(inputs: Path, name: str) -> Any:
    """The base with the method on, every trained number moved."""
    model = base_of(inputs)
    inject(model, small_method(name, TARGETS), seed=0)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_loads_as_itself(name: str, inputs: Path, tmp_path: Path) -> None:
    model = stirred(inputs, name)
    save_trained(model, tmp_path / "saved", "tiny")
    if not any(True for _ in adapted(model)):  # the model itself
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(logits(again), logits(model))
        return
    again = load_adapter(base_of(inputs), tmp_path / "saved").eval()
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(base_of(inputs)))
    assert [type(layer) for _, layer in adapted(again)] == [type(layer) for _, layer in adapted(model)]
    assert {key for key, p in again.named_parameters() if p.requires_grad} == {
        key for key, p in model.named_parameters() if p.requires_grad
    }
    save_adapter(again, tmp_path / "again", base_name="tiny")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_the_effective_weight(name: str, inputs: Path) -> None:
    for _, layer in adapted(stirred(inputs, name)):
        if (found := layer.factors()) is None:
            continue
        A, B, s, m = found
        V = layer.base_weight() + s * B @ A
        W = V if m is None else V * (m / V.norm(dim=1))[:, None]
        torch.testing.assert_close(layer.effective_weight(), W.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_merging_detaching_and_what_is_held(name: str, inputs: Path) -> None:
    model, plain = stirred(inputs, name), base_of(inputs)
    before, layers = logits(model), dict(adapted(model))
    own = {f"{module}.{part}" for module, layer in layers.items() for part in layer.trained_state()}
    if layers:
        assert own == set(model.state_dict()) - set(plain.state_dict())
        assert all(layer.method == small_method(name, TARGETS) for layer in layers.values())
        assert all(layer.unmoved() is None for layer in layers.values())
    torch.testing.assert_close(logits(dora_lab.merge(model)), before, rtol=1e-4, atol=1e-4)
    if layers:
        assert torch.equal(logits(dora_lab.unmerge(model)), before)
        dora_lab.detach(model)
        assert torch.equal(logits(model), logits(plain))
        dora_lab.attach(model, layers)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", TRAINED)
def test_the_callback_and_saved_models_are_probed(name: str, inputs: Path, tmp_path: Path) -> None:
    model, plain = stirred(inputs, name), base_of(inputs)
    trained: Any = base_of(inputs)
    inject(trained, small_method(name, TARGETS), seed=0)
    callback = DecompositionCallback(lambda row: None, kinds=TARGETS)
    callback.begin(trained)
    trained.load_state_dict(model.state_dict())
    rows = {row["module"]: row for row in callback.measure(trained)}
    save_trained(model, tmp_path / "saved", "tiny")
    files = {row["module"]: row for row in saved_models.probe(inputs / "model", [tmp_path / "saved"], kinds=TARGETS)}
    assert len(rows) == 6 and rows.keys() == files.keys()
    for module in rows:
        layer: Any = model.get_submodule(module)
        W = layer.effective_weight() if isinstance(layer, AdaptedLinear) else layer.weight.detach()
        W0: Any = plain.get_submodule(module).weight.detach()
        for key, formula in (("delta_m", delta_m), ("delta_d", delta_d)):
            expected = formula(W0.double(), W.double())
            assert rows[module][key] == pytest.approx(expected, rel=1e-4, abs=1e-7), key
            assert files[module][key] == pytest.approx(expected, rel=1e-4, abs=1e-7), key
        assert rows[module]["delta_m"] > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_from_shapes(name: str, inputs: Path) -> None:
    method, shape = small_method(name, TARGETS), shapes.of_folder(inputs / "model")
    if not catalog.is_counted(method):
        pytest.skip("its file gives no PARAMETERS")
    counted = inject(base_of(inputs), method, seed=0)
    assert shape.trained(method) == counted["trainable"]


def spec_of(name: str) -> Spec:
    spec = make_spec(optim__epochs=1.6, data__train_items=40, evaluation__protocols="loglikelihood")  # 8 steps
    spec = replace(spec, method=small_method(name, ("q_proj", "v_proj")))
    return spec if name in TRAINED else replace(spec, optim=None, probe=None)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_has_an_estimate(name: str, inputs: Path) -> None:
    lines = list(plan.lines([spec_of(name)], {}, inputs / "model", None, None))
    assert ("8 steps" in lines[0] or name not in TRAINED) and "1 specs" in lines
    assert any("FLOP" in line for line in lines) == catalog.is_counted(spec_of(name).method)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.spec import from_dict
def progress(phase, done, of, loss):
    if phase == "train" and done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
runtime = Runtime(progress=progress, checkpoint_steps=2)
run_spec(from_dict(json.loads(sys.argv[1])), Paths(*map(Path, sys.argv[2:])), runtime)
"""


@pytest.mark.parametrize("name", TRAINED)
def test_a_killed_run_goes_on_to_the_same_bytes(name: str, inputs: Path, tmp_path: Path) -> None:
    spec, places = spec_of(name), (inputs / "data", inputs / "model")
    whole, killed = Paths(tmp_path / "whole", *places), Paths(tmp_path / "killed", *places)
    given = [json.dumps(to_dict(spec)), *map(str, (killed.results, *places))]
    house = {**os.environ, "PYTHONPATH": str(Path(dora_lab.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, *given], env=house, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    for paths in (whole, killed):
        assert run_spec(spec, paths, Runtime(checkpoint_steps=2)) == "complete"
    assert read_record(run_path(killed.results, spec))["training"]["resumed_from"] == 4
    adapters = [run_path(paths.results, spec) / "adapter" for paths in (whole, killed)]
    files = sorted(file.name for file in adapters[0].glob("*.safetensors"))
    assert files and sorted(file.name for file in adapters[1].glob("*.safetensors")) == files
    for file in files:
        assert (adapters[0] / file).read_bytes() == (adapters[1] / file).read_bytes()


# --- layers that no format holds


class Halved(LoraLinear):
    """Computes something else than its parent, and does not say what."""

    def effective_weight(self) -> Tensor:
        return super().effective_weight() / 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Renamed(LoraLinear):
    """The same function under another name."""

    def extra_repr(self) -> str:
        return "renamed"


class Told(Halved):
    """Says its factors itself: what they are is its own word."""

    def factors(self) -> Any:
        return self.lora_A, self.lora_B, 0.5, None


class Doubling:
    """Of no class of ours; what it is mixed into computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


class Mixed(Doubling, LoraLinear):  # type: ignore[misc]
    """Redefines nothing itself."""


def test_factors_are_not_inherited_by_what_computes_something_else() -> None:
    layers = {
        kind: kind(nn.Linear(8, 6), small_method("lora", ()), torch.Generator())
        for kind in (Halved, Renamed, Told, Mixed)
    }
    assert layers[Halved].factors() is None and layers[Mixed].factors() is None
    assert layers[Renamed].factors() is not None and layers[Told].factors() is not None
    model = nn.Sequential(layers[Halved])
    with pytest.raises(CheckpointError, match="'0' is of no method, so nothing could load it"):
        save_adapter(model, Path("never"))
    with pytest.raises(CheckpointError, match="'0' is a Halved, which format 'peft' cannot hold"):
        save_adapter(model, Path("never"), format="peft")


@pytest.fixture
def bare(inputs: Path, tmp_path: Path) -> Path:
    """Ranks that differ beside magnitudes alone: neither PEFT nor the authors' format holds both."""
    model = base_of(inputs)
    method = small_method("dora", TARGETS, rank_pattern=("q_proj=2",), magnitude_modules=("o_proj",))
    inject(model, method, seed=0)
    save_adapter(model, tmp_path / "own")
    return tmp_path / "own"


def test_what_no_format_holds_is_saved_with_its_method(bare: Path, inputs: Path, tmp_path: Path) -> None:
    config = json.loads((bare / "adapter_config.json").read_text())
    assert config["peft_type"] == "DORA_LAB" and config["method"]["rank_pattern"] == ["q_proj=2"]
    assert {layer.out_features for _, layer in adapted(load_adapter(base_of(inputs), bare))}
    with pytest.raises(KeyError, match="DORA_LAB"):
        peft.PeftModel.from_pretrained(base_of(inputs), bare)


def test_numbers_that_are_not_finite_are_not_saved(bare: Path, inputs: Path) -> None:
    model = load_adapter(base_of(inputs), bare)
    layer: Any = model.get_submodule("model.layers.0.self_attn.o_proj")
    layer.magnitude.data[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"o_proj': magnitude holds numbers that are not finite"):
        save_adapter(model, bare)
    layer.factors = lambda: None
    with pytest.raises(CheckpointError, match=r"o_proj\.magnitude' holds numbers that are not finite"):
        save_adapter(model, bare)


def edited(change: Any) -> Any:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        change(config)
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return edit


def retensored(change: Any) -> Any:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


GONE = "model.layers.0.self_attn.o_proj.magnitude"
WRONG = {
    "no method": (edited(lambda c: c.pop("method")), "'method' in adapter_config.json makes no adapter of this base"),
    "unknown": (edited(lambda c: c["method"].update(name="dorra")), "unknown method 'dorra'; did you mean 'dora'"),
    "a field": (edited(lambda c: c["method"].update(rnk=3)), "rnk"),
    "a type": (edited(lambda c: c["method"].update(rank="x")), "method.rank = 'x': expected a whole number"),
    "a target": (edited(lambda c: c["method"].update(target_modules=["q"])), "no module is named 'q'"),
    "wraps nothing": (edited(lambda c: c.update(method={"name": "ft"})), "is no part of the method"),
    "lost": (retensored(lambda t: t.pop(GONE)), f"'{GONE}' is missing"),
    "shape": (retensored(lambda t: t.update({GONE: torch.ones(3)})), rf"'{GONE}' is \(3,\), the base's is \(32,\)"),
    "nan": (retensored(lambda t: t[GONE].fill_(float("nan"))), f"'{GONE}' holds numbers that are not finite"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_named_tensors_that_do_not_fit_are_refused(name: str, bare: Path, inputs: Path) -> None:
    (bare / "dora_lab.json").unlink()
    change, words = WRONG[name]
    change(bare)
    model: LlamaForCausalLM = base_of(inputs)
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_adapter(model, bare)
    assert str(bare) in str(caught.value)
    assert not list(adapted(model)) and [n for n, p in model.named_parameters() if p.requires_grad] == [
        "model.norm.weight"
    ]


# --- the catalog


def test_the_catalog_reads_arithmetic_and_nothing_else() -> None:
    def entry(text: str) -> catalog.Entry:
        return catalog.Entry(name="x", label="x", words="x", colour="x", fields=(), parameters=text)

    assert entry("2 * rank * (inputs - 1) // 3 + outputs").trained(rank=3, inputs=5, outputs=7) == 15
    for text in ("rank ** 2", "max(rank, 1)", "rank.real", "width", "1.5 * rank", "True", "-rank"):
        with pytest.raises(ValueError, match=r"PARAMETERS: '.*' is not whole numbers, rank and \+ - \* //"):
            entry(text).trained(rank=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("LABEL = 'New'", "no FIELDS; say which fields"),
        ("FIELDS = ()\nLABEL = 'Do' + chr(82)", "LABEL is computed; the catalog reads it unrun, so write it out"),
        ("FIELDS = ()\nLABEL = 'DoRA'", "two methods have the LABEL 'DoRA': dora, new"),
    ],
)
def test_a_method_file_that_says_too_little(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in Path(catalog.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "new.py").write_text(f"{text}\n\ndef prepare(model, method, generator): ...\n")
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "catalog.py"))
    catalog.catalog.cache_clear()
    try:
        with pytest.raises(ValueError, match=words):
            catalog.catalog()
    finally:
        catalog.catalog.cache_clear()


def test_the_catalog_imports_no_torch() -> None:
    code = "import sys; from dora_lab.methods.catalog import catalog; catalog(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
