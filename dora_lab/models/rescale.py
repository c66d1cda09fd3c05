"""A base whose layers have other norms and that computes the same: what `model.rescale` says.

In a Llama block the queries meet the keys in a product, the values the output projection, and the up projection the
down projection, linearly: one times c, the other divided by c, leaves every output as it was. So norms can be set by
hand on one and the same function. It holds where nothing stands between the two: no bias, no norm of queries and keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from dora_lab.io.errors import LoadError
from dora_lab.io.limits import PARTNERS, rescaled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # of the logits' standard deviation; float32 leaves 1e-5
_WEIGHT = re.compile(r"\.(\d+)\.(?:\w+\.)?(\w+)\.weight$")  # of a block's linear layer: number, kind


def factor(entries: Sequence[str], name: str) -> float:
    """What the weight called `name` is multiplied by: 1 for those that nothing is said of."""
    if not (found := _WEIGHT.search(name)):
        return 1.0
    layer, kind = int(found[1]), found[2]
    for scaled, factors in map(rescaled, entries):
        if kind == scaled:
            return factors[layer]
        if kind == PARTNERS[scaled]:
            return 1 / factors[layer]
    return 1.0


def rescale(model: PreTrainedModel, entries: Sequence[str]) -> None:
    """Multiply the weights of a loaded model, in place.

    Raises LoadError, naming the field, for a model without such layers, for another number of layers than of factors,
    and where the logits do not stay what they were.
    """
    parameters = dict(model.named_parameters())
    for kind, factors in map(rescaled, entries):
        for part in (kind, PARTNERS[kind]):
            found = [name for name in parameters if (match := _WEIGHT.search(name)) and match[2] == part]
            if len(found) != len(factors):
                raise LoadError(f"model.rescale: {len(factors)} factors for {kind}, the model has {len(found)} {part}")
    import torch

    vocabulary = cast(Any, model.get_input_embeddings()).weight.shape[0]
    ids_1T = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before_1TV = model(input_ids=ids_1T).logits.double()
        for name, parameter in parameters.items():
            if (c := factor(entries, name)) != 1:
                parameter.mul_(c)
        off = (model(input_ids=ids_1T).logits.double() - before_1TV).abs().max() / before_1TV.std()
    if not off < TOLERANCE:
        raise LoadError(
            f"model.rescale changes the logits by {off:.1e} of their deviation: something stands between the layers of "
            "this model (a bias, a norm of queries and keys, a narrow type); leave it out"
        )
