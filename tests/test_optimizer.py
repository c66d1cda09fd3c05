"""Groups of parameters and the two optimisers, against plain loops; what decay alone does to a magnitude."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_spec
from torch import nn

from dora_lab.io.limits import Group, group_of
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import Paths
from dora_lab.runs.record import run_path
from dora_lab.runs.streams import read_stream
from dora_lab.spec import SpecError, derive
from dora_lab.training.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def _optim(**changes: Any) -> Any:
    spec: Any = make_spec()
    return replace(spec.optim, learning_rate=0.1, **changes)


def _model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)


def test_groups_are_read_and_refused() -> None:
    assert group_of("lora_B=16") == Group("lora_B", 16.0, None)
    assert group_of("a=b.*=1:0.01") == Group("a=b.*", 1.0, 0.01)
    for text in ("lora_B", "lora_B=0", "lora_B=x", "(=1", "=1", "lora_B=1:-1"):
        with pytest.raises(SpecError, match="PATTERN=FACTOR"):
            derive(make_spec(), {"optim.groups": text})
    with pytest.raises(SpecError, match=r"'lora_b' names no parameter that is trained.*did you mean"):
        make_optimizer({"x.lora_B": nn.Parameter(torch.ones(1))}, [], _optim(groups=("lora_b=2",)))


def test_sgd_with_groups_is_a_plain_loop() -> None:
    model, x = _model()
    optim = _optim(optimizer="sgd", groups=("^0.weight=3:0.5", "bias=0.5"), weight_decay=0.2)
    made = make_optimizer(dict(model.named_parameters()), ["0.weight", "1.weight"], optim)
    own = {name: weight.detach().clone().double() for name, weight in model.named_parameters()}
    momentum = {name: torch.zeros_like(weight) for name, weight in own.items()}
    rule = {"0.weight": (0.3, 0.5), "0.bias": (0.05, 0.0), "1.weight": (0.1, 0.2), "1.bias": (0.05, 0.0)}
    for _ in range(4):
        made.zero_grad()
        model(x).square().sum().mul(0.01).backward()
        for name, weight in model.named_parameters():
            rate, decay = rule[name]
            momentum[name] = 0.9 * momentum[name] + weight.grad.double()
            own[name] = own[name] * (1 - rate * decay) - rate * momentum[name]
        made.step()
        for name, weight in model.named_parameters():
            assert weight.detach().double() == pytest.approx(own[name], rel=1e-5, abs=1e-6), name
    assert made.param_groups[0]["lr"] == 0.1


def test_lora_plus_is_torchs_adamw_on_groups_made_by_hand() -> None:
    model, x = _model()
    other = _model()[0]
    made = make_optimizer(dict(model.named_parameters()), [], _optim(groups=("1=16",)))
    theirs = torch.optim.AdamW(
        [{"params": other[0].parameters(), "lr": 0.1}, {"params": other[1].parameters(), "lr": 1.6}], weight_decay=0
    )
    for net, optimizer in ((model, made), (other, theirs)):
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5)


def _run(inputs: Path, root: Path, **changes: Any) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    spec = make_spec(**changes)
    paths = Paths(root, inputs / "data", inputs / "model")
    run_spec(spec, paths)
    path = run_path(root, spec)
    return spec, read_stream(path, "metrics"), read_stream(path, "probe")


def test_a_magnitude_that_nothing_else_moves_shrinks_by_delta(inputs: Path, tmp_path: Path) -> None:
    """The factor of its rate so small that AdamW moves it by nothing, the decay so large that it shrinks all the same;
    delta from the rates that the run recorded."""
    tiny, decay = 1e-6, 2e5
    changes: dict[str, Any] = {"method__name": "dora", "optim__groups": f"magnitude={tiny}:{decay}"}
    _, metrics, probe = _run(inputs, tmp_path, **changes)
    rates = np.array([row["learning_rate"] for row in metrics if "learning_rate" in row])
    delta = 1 - np.prod(1 - rates * tiny * decay)
    assert delta > 0.001
    last = [row for row in probe if row["step"] == probe[-1]["step"] and row["kind"] in ("q_proj", "v_proj")]
    assert len(last) == 4
    for row in last:
        assert row["growth"] == pytest.approx(-delta, rel=2e-3), row["module"]
        assert row["grown"] == 0


def test_groups_that_change_nothing_change_nothing(inputs: Path, tmp_path: Path) -> None:
    _, plain, probe = _run(inputs, tmp_path / "plain")
    _, grouped, same = _run(inputs, tmp_path / "grouped", optim__groups="lora_A=1")
    told = [{k: v for k, v in row.items() if k != "seconds"} for row in plain]
    assert told == [{k: v for k, v in row.items() if k != "seconds"} for row in grouped]
    assert [r["delta_m"] for r in probe] == [r["delta_m"] for r in same]
