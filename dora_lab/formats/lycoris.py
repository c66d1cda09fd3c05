"""LyCORIS and ComfyUI files: lora_down, lora_up, alpha, dora_scale (out, 1); one of (1, in) is another function.

Shape suffixes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dora_lab.formats.neutral import Factors
from dora_lab.io.errors import CheckpointError
from dora_lab.spec import did_you_mean


def read_layers(file: Path, tensors: Mapping[str, Tensor], modules: tuple[str, ...]) -> dict[str, Factors]:
    """Layers by module name; modules: names of the base's, to resolve keys by. Raises CheckpointError."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        flat, _, part = key.partition(".")
        if part.removesuffix(".weight") not in ("lora_down", "lora_up", "alpha", "dora_scale"):
            raise CheckpointError(f"{file}: key '{key}' is of a kind of adapter that is not supported here")
        parts.setdefault(flat, {})[part.removesuffix(".weight")] = tensor
    layers: dict[str, Factors] = {}
    for flat, part in parts.items():
        try:
            layers[_unflatten(flat, modules)] = _lycoris_factors(part)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: '{flat}': {error}") from None
    return layers


def _lycoris_factors(part: Mapping[str, Tensor]) -> Factors:
    A, B = part.get("lora_down"), part.get("lora_up")
    if A is None or B is None:
        raise CheckpointError(f"lora_{'down' if A is None else 'up'} is missing")
    kind = "conv" if A.dim() > 2 else "linear"
    channels = A.shape[1]
    A_RI, B_OR = A.flatten(1), B.flatten(1)
    alpha = float(part["alpha"]) if "alpha" in part else float(A_RI.shape[0])
    m, out = part.get("dora_scale"), B_OR.shape[0]
    if m is not None:
        if m.dim() < 2 and out == channels:
            raise CheckpointError(f"dora_scale {tuple(m.shape)} of a square layer does not say its axis: out or in")
        if m.dim() >= 2 and m.shape[0] == 1 and out != 1:
            raise CheckpointError(
                f"dora_scale {tuple(m.shape)} has one magnitude per input feature; DoRA as published has one per "
                f"output ({out}, 1): another function, trained with wd_on_output=False, which cannot be converted"
            )
        if m.numel() != out:
            raise CheckpointError(f"dora_scale {tuple(m.shape)} fits neither axis of a layer with {out} outputs")
    return Factors(A_RI, B_OR, alpha / A_RI.shape[0], None if m is None else m.reshape(-1), kind)


def _unflatten(flat: str, modules: tuple[str, ...]) -> str:
    """The module that a key with underscores for dots means; refused when there is none, or more than one."""
    if not modules:
        raise CheckpointError("its name writes dots as underscores: give the base's module names to resolve it")
    short = re.sub(r"^(lora_unet|lora_te\d?|lora_transformer|lycoris|lora)_", "", flat)
    found = [name for name in modules if name.replace(".", "_") in (flat, short)]
    if len(found) != 1:
        meant = f"could be {', '.join(found)}" if found else did_you_mean(short, [n for n in modules if n][:40])
        raise CheckpointError(f"names {'several modules' if found else 'no module'} of the base: {meant}")
    return found[0]
