"""Full fine-tuning (FT): every parameter is trained and no layer is wrapped."""

from __future__ import annotations

import torch
from torch import nn

from dora_lab.spec import Method

FIELDS: tuple[str, ...] = ()


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Make every parameter trainable."""
    model.requires_grad_(True)
