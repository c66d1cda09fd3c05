"""Full fine-tuning of some modules' weights alone: W' = W0 + anything; all else, biases too, stays frozen.

A control: `ft` trains what the probe does not see (norms, embeddings) beside what it does. Shape suffixes: O = out
features, I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dora_lab.methods.contract import AdaptedLinear
from dora_lab.methods.inject import wrap
from dora_lab.spec import Method

FIELDS = ("target_modules",)
PARAMETERS = "inputs * outputs"
LABEL = "FT of the modules"
WORDS = "full fine-tuning of the adapted modules alone"
COLOUR = "#7f7f7f"
MARKER = "s"
LINE = ":"
ORDER = 2


class DenseLinear(AdaptedLinear):
    """Trains `dense` (out, in), which begins as the base weight."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.dense = nn.Parameter(self.base_weight().clone())

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The trained weight, (out, in)."""
        return self.dense.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        base = self._base(x)
        return base + self.kind.low(x, self.dense - self.base_weight()).to(base.dtype)


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Freeze the model and give its target modules weights of their own."""
    wrap(model, method, lambda name, layer, settings: DenseLinear(layer))
