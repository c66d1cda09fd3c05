"""Full fine-tuning (FT): every parameter is trained and no layer is wrapped."""

from __future__ import annotations

import torch
from torch import nn

from dora_lab.spec import Method

FIELDS = ()
PARAMETERS = "model"
LABEL = "FT"
WORDS = "full fine-tuning"
COLOUR = "#2b2b2b"
MARKER = "s"
LINE = "--"
ORDER = 1
SAVED = {False: {2: (24, 8), 4: (40, 16)}}


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Make every parameter trainable."""
    model.requires_grad_(True)
