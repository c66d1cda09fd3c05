"""DoRA (section 4.1): W' = m V / ||V|| with V = W0 + s B A, s = alpha / rank, one magnitude m per output feature.

Shape suffixes: O = out features, I = in features, R = rank.

The norm is recomputed at every forward, in float32 or wider, and by default a constant in the gradient (equation 11);
with ``detach_norm=False`` the gradient goes through it (equation 6, ablated in table 7). It is the direct norm of V,
block of rows by block: no dense V is kept, no cached ||W0||^2 can go stale, and, unlike with the expanded square
||W0||^2 + 2 s <W0, BA> + s^2 ||BA||^2, nothing cancels where V is much smaller than W0. For layers that fit one block
it is also the faster form, and while B = 0 it is bit for bit the initial m.

Dropout, with g = m / ||V||:
- ``published`` (the authors' code): y = x W0^T + (g - 1) drop(x) W0^T + g s B A drop(x) + bias, a second base product;
- ``branch``: y = g (x W0^T + s B A drop(x)) + bias.
Without dropout the two are one function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab.adapters import wrap
from dora_lab.adapters.lora import FIELDS as LORA_FIELDS
from dora_lab.adapters.lora import LoraLinear
from dora_lab.decompose import magnitude
from dora_lab.spec import Method

FIELDS: tuple[str, ...] = (*LORA_FIELDS, "dropout_form", "detach_norm")

BLOCK = {"cpu": 2**17, "other": 2**24}  # elements of V at a time: about a core's cache; on a GPU, few kernel launches


class DoraLinear(LoraLinear):
    """Trains `magnitude` (out,), initialised to the row norms of W0, beside LoRA's A and B.

    A row whose V is zero has no direction: its g is 1, so the row acts as the zeros that it is, and all gradients are
    finite.
    """

    def __init__(self, linear: nn.Linear, method: Method, generator: torch.Generator) -> None:
        super().__init__(linear, method, generator)
        self.detach_norm = method.detach_norm
        self.published_dropout = method.dropout_form == "published"
        # by the same routine as in the forward, so that m / ||V|| is exactly 1 before training
        self.magnitude = nn.Parameter(self._norm().detach())

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """m V / ||V||, (out, in)."""
        return self._scale()[:, None] * self._direction()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        g_O = self._scale()
        second = bool(self.training and self.dropout and self.published_dropout)
        if second or x.dtype != g_O.dtype or torch.is_autocast_enabled(x.device.type):
            return self._onto_base(x, g_O, second)
        product = self._product(x, None)
        return product * g_O if self.bias is None else torch.addcmul(self.bias, product, g_O)

    def _onto_base(self, x: Tensor, g_O: Tensor, second: bool) -> Tensor:
        """The form y = base + (g - 1) x W0^T + g s B A drop(x), with x dropped in the middle term too if `second`.

        It is the `published` dropout, and the form for bfloat16: exact at g = 1, and the small terms are summed in
        float32 instead of being rounded away.
        """
        dropped = self._drop(x)
        base = F.linear(x, self.weight, self.bias)
        again = base
        if second:
            again = F.linear(dropped, self.weight)
        elif self.bias is not None:
            again = base - self.bias
        low = F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        moved = torch.addcmul(base, again, g_O - 1)
        return torch.addcmul(moved, low, g_O * self.scaling).to(base.dtype)

    def _scale(self) -> Tensor:
        """g_O = m / ||V||, and 1 where V is zero."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm_O = self._norm()
            zero_O = norm_O == 0
            norm_O = norm_O.masked_fill(zero_O, 1.0)
        return (self.magnitude / norm_O).masked_fill(zero_O, 1.0)

    def _norm(self) -> Tensor:
        rows = max(1, BLOCK["cpu" if self.weight.device.type == "cpu" else "other"] // self.in_features)
        if rows >= self.out_features:
            return magnitude(self._direction())
        starts = range(0, self.out_features, rows)
        return torch.cat([magnitude(self._direction(slice(start, start + rows))) for start in starts])


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Freeze the model and adapt its target modules with `DoraLinear`."""
    wrap(model, method, lambda linear: DoraLinear(linear, method, generator))
