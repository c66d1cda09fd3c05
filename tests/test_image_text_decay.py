"""Decay as VL-BART's runs had it: how much is taken off in all, of what, and what has a row in the table."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from torch import nn

from dora_lab.spec import spec_id, validate
from dora_lab.training.optimizer import make_optimizer
from experiments import image_text, image_text_decay
from experiments.image_text_decay import AMOUNT, COPIED, NONE, RELEASED, Cell


def test_five_seeds_of_three_rows_and_those_without_decay_are_image_texts() -> None:
    cells = image_text_decay.cells()
    assert Counter(cells.values()) == {
        Cell(row, decay): 5 for row in AMOUNT for decay in (NONE, RELEASED, COPIED)
    }  # fmt: skip
    beside = {spec_id(spec) for spec in image_text.confirmation()}
    assert {spec_id(spec) for spec in image_text_decay.specs("mini")} == {*cells} - beside
    for spec in image_text_decay.specs("mini"):
        validate(spec)


@pytest.mark.parametrize("row", AMOUNT)
def test_what_is_taken_off_in_all_is_what_the_released_script_takes_off(row: str) -> None:
    """Sum of rate times decay over the steps: VL-Adapter's 20 epochs, and here, from the schedule step by step."""
    cells = image_text_decay.cells()
    spec = next(s for s in image_text_decay.specs("mini") if cells[spec_id(s)] == Cell(row, RELEASED))
    assert spec.optim is not None
    steps, warm = image_text.MINI_STEPS, math.ceil(0.1 * image_text.MINI_STEPS)
    rates = [spec.optim.learning_rate * min(k / warm, (steps - k) / (steps - warm)) for k in range(steps)]
    parts = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "visual_embedding": nn.Linear(4, 4)})
    made = make_optimizer(dict(parts.named_parameters()), {"q_proj.weight", "visual_embedding.weight"}, spec.optim)
    held = {id(weight): group for group in made.param_groups for weight in group["params"]}
    for name, factor in (("q_proj", 1.0), ("visual_embedding", image_text.SEEN_RATE / spec.optim.learning_rate)):
        layer = parts[name]
        group = held[id(layer.weight)]
        assert group["lr"] == pytest.approx(factor * spec.optim.learning_rate, rel=1e-3)
        total = group["weight_decay"] * factor * sum(rates)
        assert total == pytest.approx(AMOUNT[row], rel=0.02)
        assert held[id(layer.bias)]["weight_decay"] == 0
