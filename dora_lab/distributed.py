"""The processes of one distributed run, as `torchrun` starts them; alone, a process is the first of one.

Each holds the whole model (DDP), or a share of every weight (`shard`: FSDP2). Torch is imported only where there is
more than one process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

Value = TypeVar("Value")
WAIT = timedelta(days=7)  # the others wait while the first evaluates; the end of a process is noticed at once


class LostError(KeyboardInterrupt):
    """Another process of the run has ended: this one cannot go on; the run is interrupted, not failed."""


def size() -> int:
    """Number of processes of the run (torchrun's WORLD_SIZE)."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def start(gpu: bool) -> None:
    """Join the others, over NCCL where each has a GPU of its own, else over gloo; nothing for a process alone."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise ValueError("FSDP by way of accelerate's settings is not understood; switch it off and give --shard")
    if size() == 1:
        return
    import torch

    if gpu and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if gpu and torch.cuda.is_available() else "gloo", timeout=WAIT)


def leave(code: int) -> None:
    """End this process with `code` if it is one of several; alone, return.

    Not by way of the interpreter's end: a thread of the group's that is still there when C++ takes its statics down
    aborts the process ("terminate called without an active exception"), about one end in two hundred, and torchrun
    then kills the others, who may be writing. Leaving the group first made it rarer, not impossible.
    """
    if size() == 1:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Around what the processes do together: raises LostError where the connection to another one breaks."""
    try:
        yield
    except RuntimeError as error:
        if size() > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection", "Broken pipe")):
            raise LostError(f"another process of the run has ended: {str(error).partition('. ')[0]}") from error
        raise


def shard(model: nn.Module, device: str) -> None:
    """Cut every weight of a transformers model, in place, into one share per process on `device` ("cuda", "cpu").

    A decoder layer is whole only while it computes (FSDP2, `fully_shard`), so weights, gradients and AdamW's moments
    take 1 / size() of their memory. The model may lie on the processor before: it never is on the device as a whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (size(),))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    # without the last word, what no layer holds (embeddings, head) stays whole after a forward pass without a backward
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module, recurse: bool = True) -> bool:
    """Whether a process holds shares of weights of this module (recurse: and of those in it), cut by whomever."""
    return any(hasattr(weight, "full_tensor") for weight in module.parameters(recurse))


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered where it is a share: then every process has to come by here."""
    gathered: Any = tensor
    return gathered.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def barrier() -> None:
    """Wait for the others."""
    share(None)


def share(value: Value) -> Value:
    """The value that the first process gives, in every process."""
    if size() == 1:
        return value
    import torch

    values: list[Any] = [value]
    with connected():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def total(values: Sequence[int], device: Any) -> list[int]:
    """Each value summed over all processes."""
    if size() == 1:
        return list(values)
    import torch

    sums = torch.tensor(values, dtype=torch.int64, device=device)
    with connected():
        torch.distributed.all_reduce(sums)
    return [int(each) for each in sums]
