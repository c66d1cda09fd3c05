"""What is trained: out of a model and into it, in one piece, also where its weights are shared out over processes.

With shares (`distributed.shard`) every process has to call each of these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from dora_lab import distributed
from dora_lab.methods.inject import adapted

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, as they lie in this process."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _held(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained and whatever else adapted layers say that they hold, by name."""
    layers = ((f"{name}.", layer.trained_state()) for name, layer in adapted(model))
    return {**trained(model), **{name + part: held for name, state in layers for part, held in state.items()}}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What training leaves, by name, whole and contiguous on the CPU: in the first process, for all."""
    found = {}
    for name, weight in _held(model).items():
        gathered = distributed.whole(weight.detach())
        if distributed.first():
            found[name] = gathered.cpu().contiguous()
    return found


def fill_trained(model: nn.Module, values: Mapping[str, Tensor], source: str) -> None:
    """Put `values` of `trained_weights` back; raises ValueError, naming `source`, where names differ."""
    held = _held(model)
    if values.keys() != held.keys():
        raise ValueError(f"{source} holds other weights than are trained: {sorted(values.keys() ^ held.keys())}")
    with torch.no_grad():
        for name, weight in held.items():
            weight.copy_(_cut_as(values[name], weight))


def _cut_as(value: Tensor, like: Tensor) -> Tensor:
    """`value`, cut as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Write the state of an optimiser of shared weights, by parameter name; the first process does."""
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if distributed.first():
        torch.save(state, file)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Read it back, each process its share."""
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    for group in optimizer.param_groups:
        group["betas"] = tuple(group["betas"])  # it was made a list: the next file would not be the same to the byte
