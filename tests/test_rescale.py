"""A base rescaled layer by layer: the same function, other norms, and a probe that knows what it began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_spec, save_data, save_model
from transformers import AutoModelForCausalLM

from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.models.base import model_and_tokenizer
from dora_lab.models.rescale import factor, rescale
from dora_lab.probing.saved_models import probe
from dora_lab.runs.record import run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import SpecError, validate

pytestmark = pytest.mark.usefixtures("one_thread")
ENTRIES = ("q_proj=2/0.5", "v_proj=0.25/3", "up_proj=1.5/1.1")


def test_the_function_stays_and_the_norms_do_not(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    plain, _ = model_and_tokenizer(make_spec(), folder)
    other, _ = model_and_tokenizer(make_spec(model__rescale=",".join(ENTRIES)), folder)
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(plain(ids).logits, other(ids).logits, atol=1e-5)
    for name, weight in plain.named_parameters():
        if ".layers." not in name:
            assert torch.equal(other.get_parameter(name), weight)
            continue
        kind, layer = name.split(".")[-2], name.split(".")[2]
        wanted = {
            "q_proj": (2, 0.5), "k_proj": (1 / 2, 1 / 0.5), "v_proj": (0.25, 3), "o_proj": (1 / 0.25, 1 / 3),
            "up_proj": (1.5, 1.1), "down_proj": (1 / 1.5, 1 / 1.1),
        }.get(kind)  # fmt: skip
        c = 1.0 if wanted is None else wanted[int(layer)]
        assert torch.equal(other.get_parameter(name), weight * c) and factor(ENTRIES, name) == pytest.approx(c)


def test_the_probe_begins_at_the_rescaled_weights(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "results", save_data(tmp_path / "data"), save_model(tmp_path / "model"))
    full = {"method__name": "ft", "method__rank": None, "method__alpha": None, "method__dropout": 0.0}
    for method in (full | {"method__target_modules": ()}, {"method__name": "lora"}):
        spec = make_spec(model__rescale=",".join(ENTRIES), optim__learning_rate=1e-3, **method)
        run_spec(spec, paths)
        rows = read_stream(run_path(paths.results, spec), "probe")
        assert rows and all(row["delta_d"] < 0.05 and row["delta_m_share"] < 0.2 for row in rows), "no factor is seen"
    for tuned in (run := run_path(paths.results, spec), run / "adapter"):  # of the last, LoRA's
        with pytest.raises(CheckpointError, match=r"rescaled its base \(model\.rescale\).*own probe rows"):
            list(probe(paths.model_dir, [tuned]))  # type: ignore[arg-type]


@pytest.mark.parametrize("entries", ["q_proj=2", "k_proj=1/2", "q_proj=1/0", "q_proj=1/x", "q_proj=1/2,q_proj=1/2"])
def test_what_it_cannot_be(entries: str, tmp_path: Path) -> None:
    if entries == "q_proj=2":
        with pytest.raises(LoadError, match=r"model.rescale: 1 factors for q_proj, the model has 2"):
            model_and_tokenizer(make_spec(model__rescale=entries), save_model(tmp_path / "model"))
        return
    with pytest.raises(SpecError, match=r"model.rescale = .*KIND=FACTOR/FACTOR"):
        validate(make_spec(model__rescale=entries))


def test_what_stands_between_is_found(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(layer.self_attn.q_proj.out_features))
    with pytest.raises(LoadError, match=r"changes the logits by .*leave it out"):
        rescale(model, ENTRIES)
