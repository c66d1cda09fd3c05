"""What the likelihoods of an item's options say beyond right and wrong. No torch: samples can be read again anywhere.

For an item with options k, of log-likelihoods l_k in nats (with protocol cloze: nats per token), and the right one g:

- choice_nll: -log softmax(l)_g, over the options that the item offers (log K where the model cannot tell K apart);
- answer_nll: -l_g, over all tokens of the right answer (cloze: their mean);
- margin: l_g - max of the others (positive where the answer is right).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dora_lab.runs.item_values import number_of, pack

NAMES = ("choice_nll", "answer_nll", "margin")


def of_sample(sample: dict[str, Any]) -> tuple[float, float, float]:
    """The three numbers of one sample, in the order of `NAMES`.

    Its `output` holds the options' log-likelihoods, by label or in order; its `gold` is the label or the position.
    """
    output = sample["output"]
    right = float(output[sample["gold"]])
    # by place, not by value: two options may be equally likely
    places = list(output) if isinstance(output, dict) else range(len(output))
    others = [float(output[place]) for place in places if place != sample["gold"]]
    best = max(right, *others)
    whole = best + math.log(math.fsum(math.exp(value - best) for value in (right, *others)))
    return whole - right, -right, right - max(others)


def columns(samples: Sequence[dict[str, Any]], facts: Sequence[str | None], items: bool) -> dict[str, Any]:
    """What a row of the stream eval has of them: means, and the values of single items if `items`.

    facts: what each item asks about, None where the data does not say; items of one fact belong together.
    """
    found = list(zip(*map(of_sample, samples), strict=True))
    means = {name: math.fsum(values) / len(values) for name, values in zip(NAMES, found, strict=True)}
    if not items:
        return means
    per_item = {name: pack(name, values) for name, values in zip(NAMES, found, strict=True)}
    if None not in facts:
        per_item["fact"] = pack("fact", [number_of(fact) for fact in facts if fact is not None])
    return {**means, "per_item": per_item}
