"""Faults of numbers: 7, 8, 9, 10, 25, dropout in the probe, a magnitude that never moves."""

from __future__ import annotations

import random
import re
import warnings
from pathlib import Path

import torch
from torch import nn

import dora_lab
from dora_lab import decompose, paper
from dora_lab.formats.live import save_trained
from dora_lab.methods.inject import adapted as adapted_layers
from dora_lab.paper import verdict
from dora_lab.probing import saved_models
from dora_lab.probing.callback import DecompositionCallback
from dora_lab.report import statistics
from dora_lab.report.probe_rows import summary
from dora_lab.spec import Method
from tests.faults import fault
from tests.faults._models import IDS, QV, adapted, llama, logits, refused


@fault(7, "output rows of zeros in the base (DoRA: 0 / 0)")
def zero_rows(folder: Path, rng: random.Random) -> str:
    model = llama(seed=rng.randrange(10**6))
    rows = sorted(rng.sample(range(16), rng.randrange(1, 16)))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[rows] = 0
    model.save_pretrained(folder / "base")
    method = Method(name="dora", rank=4, alpha=8.0, target_modules=QV, dropout=rng.choice([0.0, 0.1]),
                    detach_norm=rng.random() < 0.5)  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dora_lab.inject(model, method, seed=0)
    said = [str(one.message) for one in caught if "rows of the base weight are zero" in str(one.message)]
    assert said and f"{len(rows)} rows" in said[0] and "layers.0.self_attn.q_proj" in said[0], said
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients), "a gradient is not finite"
        optimiser.step()
        optimiser.zero_grad()
    dora_lab.save_adapter(model.eval(), folder / "adapter")
    for row in saved_models.probe(folder / "base", [folder / "adapter"]):
        assert 0 <= row["delta_m"] < 10 and 0 <= row["delta_d"] <= 2, row
        if row["module"] == "model.layers.0.self_attn.q_proj":
            assert row["undirected"] == len(rows), row
    assert all(bool(torch.isfinite(p).all()) for p in dora_lab.merge(model).parameters()), "merged weights"
    return said[0]


@fault(8, "a norm that overflows float16, or float32")
def overflow(folder: Path, rng: random.Random) -> str:
    half = nn.Sequential(nn.Linear(64, 32, bias=False)).half()
    with torch.no_grad():
        half[0].weight.copy_(torch.rand(32, 64) * 6e4)  # every number fits, no norm does
    dora_lab.inject(half, Method(name="dora", rank=2, alpha=4.0, target_modules=("0",)), seed=0)
    (_, layer) = next(iter(adapted_layers(half)))
    exact = torch.linalg.vector_norm(layer.base_weight().double(), dim=1)
    assert exact.min() > 65504 and torch.allclose(layer.magnitude.double(), exact, rtol=1e-6)  # type: ignore[operator]
    assert torch.allclose(decompose.magnitude(layer.weight).double(), exact, rtol=1e-6)
    wide = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        wide[0].weight[rng.randrange(8)] = rng.choice([1e25, float("inf"), float("nan")])
    method = Method(name="dora", rank=2, alpha=4.0, target_modules=("0",))
    return refused(ValueError, lambda: dora_lab.inject(wide, method, seed=0), "norm that is not finite", "0: ")


@fault(9, "a rank above the dimension")
def rank_above(folder: Path, rng: random.Random) -> str:
    model = llama()
    method = Method(name=rng.choice(["lora", "dora"]), rank=rng.randrange(17, 600), alpha=8.0, target_modules=QV)
    text = refused(ValueError, lambda: dora_lab.inject(model, method, seed=0), f"rank = {method.rank}", "1 .. 16")
    assert all(p.requires_grad for p in model.parameters()) and not list(adapted_layers(model)), "model changed"
    return text


@fault(10, "one target name that matches nothing")
def no_such_target(folder: Path, rng: random.Random) -> str:
    wrong = rng.choice(["qq_proj", "query", "q_proj ", "v_porj", "attn.q_proj", ""])
    targets = tuple(rng.sample(["q_proj", wrong, "v_proj"], 3))
    method = Method(name=rng.choice(["lora", "dora"]), rank=2, alpha=4.0, target_modules=targets)
    return refused(ValueError, lambda: dora_lab.inject(llama(), method, seed=0), f"'{wrong}'", "choices: ")


@fault(25, "degenerate statistics: nothing varies, too few points, everything right")
def degenerate(folder: Path, rng: random.Random) -> str:
    constant = [rng.random()] * rng.randrange(1, 20)
    assert statistics.correlation({0: (constant, [rng.random() for _ in constant])}) is None
    few = statistics.correlation({0: ([0.0, 1.0, 2.0][: rng.randrange(2, 4)],) * 2})
    assert few is not None and few.low is None and few.high is None and few.p is None
    import numpy as np

    right = verdict.contrast([(1.0, {"boolq": np.zeros((rng.randrange(2, 4), 25))})], {"boolq": np.arange(25)}, False)
    assert (right.value, right.interval(), right.p()) == (0.0, (0.0, 0.0), 1.0)
    assert statistics.mean_sd([1.0]) == (1.0, None) and statistics.mean_sd([]) == (None, None)
    count = rng.randrange(2, 12)
    rows = [
        {"tuned": "x", "step": 1, "kind": "q_proj", "layer": n, "module": f"{n}.q_proj", "delta_m": constant[0],
         "delta_d": n / 10, "relative_change": 0.1, "grown": 0.5, "undirected": 0, "tied_with": None,
         "magnitude_still": False}
        for n in range(count)
    ]  # fmt: skip
    text = summary(rows)
    found = re.search(r"undefined \(n=\d+\)", text)
    assert found and str(count) in found[0] and "nan" not in text, text
    import pandas as pd

    probes = pd.DataFrame([row | {"label": "DoRA", "seed": 0} for row in rows])
    assert paper.layer_correlation(probes, "DoRA", "q_proj") is None
    return f"r(ΔD, ΔM): {found[0]}"


@fault("extra", "dropout left on while the probe measures")
def dropout_in_probe(folder: Path, rng: random.Random) -> str:
    model = adapted(rng.choice(["lora", "dora"]), dropout=rng.uniform(0.1, 0.9))
    callback = DecompositionCallback(lambda row: None, kinds=QV)
    model.train()
    callback.begin(model)
    state = torch.get_rng_state()
    first = callback.measure(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training, "the probe left a trace"
    assert first == callback.measure(model) == callback.measure(model.eval()), "dropout reached the probe"
    return "the same ΔM and ΔD in training and evaluation mode, no random number drawn"


@fault("extra", "a magnitude that never moves while A and B are trained")
def still_magnitude(folder: Path, rng: random.Random) -> str:
    model, text = llama(seed=rng.randrange(10**6)), ""
    dora_lab.inject(model, Method(name="dora", rank=2, alpha=4.0, target_modules=QV), seed=0)
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "magnitude" not in name]
    every = [p for p in model.parameters() if p.requires_grad]
    for parameters in (trained, every):
        optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        for _ in range(rng.randrange(1, 4)):
            model(IDS, labels=IDS).loss.backward()
            optimiser.step()
            model.zero_grad()
        if parameters is trained:
            text = refused(RuntimeError, lambda: save_trained(model, folder, "tiny"), "the magnitude never moved")
    save_trained(model, folder, "tiny")
    assert bool(logits(model).isfinite().all())
    return text
