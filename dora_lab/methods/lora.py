"""LoRA (Hu et al. 2021; section 3.1 of the DoRA paper): W' = W0 + s B A with s = alpha / rank.

With ``rslora`` (Kalajdzievski 2023) s = alpha / sqrt(rank).
Shape suffixes: O = out features, I = in features, R = rank, T = tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab.decompose import wide
from dora_lab.methods.contract import AdaptedLinear, FactorsOf, is_traced
from dora_lab.methods.inject import wrap
from dora_lab.methods.layers import Opaque
from dora_lab.methods.narrow import How, Narrow, narrow_type
from dora_lab.spec import Method

FIELDS = ("rank", "alpha", "dropout", "target_modules", "rslora", "rank_pattern", "alpha_pattern")
PARAMETERS = "rank * (inputs + outputs)"
FORM = "factors"
LABEL = "LoRA"
COLOUR = "#56a5dd"
MARKER = "o"
LINE = "-."
ORDER = 2
SAVED = {False: {2: (24, 8), 4: (32, 16)}, True: {2: (32, 10), 4: (56, 20)}}


class LoraLinear(AdaptedLinear):
    """y = x W0^T + s (drop(x) A^T) B^T + bias; trains A (rank, in) and B (out, rank).

    A is Kaiming-uniform with a = sqrt(5) (uniform in +-1/sqrt(in)), B is zero; of an embedding A is zero and B standard
    normal. Both are float32, whatever the base's type, except on a float64 base. Token ids are not dropped. Raises
    ValueError for a rank that is missing or above min(out, in).
    """

    def __init__(self, layer: nn.Module, method: Method, generator: torch.Generator) -> None:
        super().__init__(layer)
        smaller = min(self.in_features, self.out_features)
        if method.rank is None or method.alpha is None:
            raise ValueError(f"method '{method.name}' needs rank and alpha, got {method.rank} and {method.alpha}")
        if not 1 <= method.rank <= smaller:
            raise ValueError(f"rank = {method.rank} must be in 1 .. {smaller}, the smaller side of this layer")
        self.scaling = method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)  # s
        self.dropout = method.dropout
        # drawn in float32 on the CPU whatever the model's type and device, so that a seed means one start
        A_RI, B_OR = torch.zeros(method.rank, self.in_features), torch.zeros(self.out_features, method.rank)
        if self.kind.zero == "lora_B":
            bound = 1 / math.sqrt(self.in_features)  # = sqrt(6 / ((1 + 5) * in)), the Kaiming bound for a = sqrt(5)
            A_RI.uniform_(-bound, bound, generator=generator)
        else:
            B_OR.normal_(generator=generator)
        base: Any = layer
        like = wide(base.weight) if self.kind.readable else next(layer.parameters(), torch.empty(0)).to(torch.float32)
        self.lora_A = nn.Parameter(A_RI.to(like.device, like.dtype))
        self.lora_B = nn.Parameter(B_OR.to(like.device, like.dtype))

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W0 + s B A, (out, in)."""
        return self._direction()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.kind.is_matrix:
            return self._sum(x)
        if not is_traced() and (dtype := narrow_type(x, self.lora_A)):
            how = How(dtype, self.scaling, self.dropout if self.training else 0.0)
            return Narrow.apply(x, self.matrix, self.bias, self.lora_A, self.lora_B, None, None, how)
        return self._product(x, self.bias)

    def factors(self) -> FactorsOf:
        """(A, B, s, None)."""
        return self.lora_A, self.lora_B, self.scaling, None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        rank = self.lora_A.shape[0]
        return f"{super().extra_repr()}, rank={rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"

    def _direction(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """V = W0 + s B A for some rows, float32 or wider; part of the graph where gradients are on."""
        device = self.lora_A.device.type
        if torch.is_autocast_enabled(device):  # which would round the product to its narrow type
            with torch.autocast(device, enabled=False):
                return self._direction(rows)
        if isinstance(self.kind, Opaque):
            with torch.no_grad():
                W_OI = self.kind.dense(self.frozen, rows)
        else:
            W_OI = wide(self.kind.matrix(self.weight)[rows])
        return torch.addmm(W_OI, self.lora_B[rows], self.lora_A, alpha=self.scaling)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout and x.is_floating_point() else x

    def _low(self, x: Tensor) -> Tensor:
        """x A^T B^T in the layer's own layout, without the scale."""
        return self.kind.up(self.kind.low(x, self.lora_A), self.lora_B)

    def _sum(self, x: Tensor) -> Tensor:
        """The forward of any kind of layer."""
        base = self._base(x)
        return torch.add(base, self._low(self._drop(x)).to(base.dtype), alpha=self.scaling)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W0^T + bias + s B A drop(x), the sum made inside the last matrix product where types allow."""
        base = F.linear(x, self.matrix, bias)
        low_R = F.linear(self._drop(x).to(self.lora_A.dtype), self.lora_A)
        if low_R.dtype != base.dtype:
            return base + (F.linear(low_R, self.lora_B) * self.scaling).to(base.dtype)
        flat_TO = base.reshape(-1, self.out_features)
        low_TR = low_R.reshape(-1, self.lora_B.shape[1])
        return torch.addmm(flat_TO, low_TR, self.lora_B.t(), alpha=self.scaling).view(base.shape)


def hold(layer: nn.Module, settings: Method, scaling: float) -> AdaptedLinear:
    """A layer for the factors of a file, of the rank in `settings`, to be filled."""
    made = LoraLinear(layer, settings, torch.Generator())
    made.scaling = scaling  # as the file says it: alpha / rank may differ in the last bit
    return made


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Freeze the model and adapt its target modules with `LoraLinear`."""
    wrap(model, method, lambda _, layer, settings: LoraLinear(layer, settings, generator))
