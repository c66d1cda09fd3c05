"""Full fine-tuning (FT): every parameter is trained, or those in `scope`, and no layer is wrapped."""

from __future__ import annotations

import re

import torch
from torch import nn

from dora_lab.spec import Method

FIELDS = ("scope",)
PARAMETERS = "model"
LABEL = "FT"
WORDS = "full fine-tuning"
COLOUR = "#2b2b2b"
MARKER = "s"
LINE = "--"
ORDER = 1
SAVED = {False: {2: (24, 8), 4: (40, 16)}}


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Make every parameter trainable that has `scope` in its full name; raises ValueError where none has."""
    trained = [name for name, _ in model.named_parameters() if re.search(method.scope or "", name)]
    if not trained:
        raise ValueError(f"scope: '{method.scope}' is in the full name of no parameter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
