"""The base model as it is: nothing is trained."""

from __future__ import annotations

import torch
from torch import nn

from dora_lab.spec import Method

FIELDS = ()
PARAMETERS = "0"
LABEL = "Base"
WORDS = "base model"
COLOUR = "#8c8c8c"
MARKER = "x"
LINE = ":"
ORDER = 0


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Freeze every parameter."""
    model.requires_grad_(False)
