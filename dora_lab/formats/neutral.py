"""Adapter files as one neutral value, whoever wrote them. Shape suffixes: O = out features, I = in, R = rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import ADAPTER

CONFIG, WEIGHTS, PICKLE = ADAPTER, "adapter_model.safetensors", "adapter_model.bin"
OWN = "DORA_LAB"  # peft_type of "tensors": PEFT knows no such type and says so
PREFIX = "base_model.model."  # of every key in a PEFT file


def refuse_not_finite(tensors: Mapping[str, Tensor], where: object = None) -> None:
    """Raise CheckpointError for the first tensor that holds nan or infinity."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{'' if where is None else f'{where}: '}'{name}' holds numbers that are not finite")


@dataclass(frozen=True)
class Factors:
    """One adapted module, on the CPU, for the (out, in) view of its base weight.

    Raises CheckpointError, on construction, for shapes that do not belong together and numbers that are not finite.
    """

    A: Tensor | None  # (rank, in); None where only the magnitude is trained
    B: Tensor | None  # (out, rank)
    scaling: float  # s: the update is s B A
    magnitude: Tensor | None = None  # (out,); None for LoRA
    kind: str = "linear"  # or "conv1d" (weight stored as (in, out)), "embedding" (the same), "conv" (flattened)

    def __post_init__(self) -> None:
        if (self.A is None) != (self.B is None):
            raise CheckpointError(f"lora_{'A' if self.A is None else 'B'} is missing")
        if self.A is None and self.magnitude is None:
            raise CheckpointError("has neither factors nor a magnitude")
        if self.A is not None and self.B is not None:
            if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
                raise CheckpointError(f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} have no common rank")
            if self.magnitude is not None and self.magnitude.shape != self.B.shape[:1]:
                raise CheckpointError(f"{self.magnitude.numel()} magnitudes for {self.B.shape[0]} output features")
        for name, tensor in (("A", self.A), ("B", self.B), ("magnitude", self.magnitude)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{name} holds numbers that are not finite")
        if not math.isfinite(self.scaling):
            raise CheckpointError(f"its scale is {self.scaling}")


@dataclass(frozen=True)
class Adapter:
    """A whole adapter file."""

    format: str  # "peft", "authors", "lycoris" or "tensors"
    layers: dict[str, Factors]  # module name in the base -> factors
    saved: dict[str, Tensor] = field(default_factory=dict)  # parameter name in the base -> its replacement
    config: dict[str, Any] = field(default_factory=dict)  # the file's own configuration
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of "tensors": the trained state of layers, by name
    frozen: dict[str, Tensor] = field(default_factory=dict)  # parameter name in the base -> what it was, not changed
