"""What the device can do: bytes a second of a copy, operations a second of a dense product, on random data."""

from __future__ import annotations

from typing import Any

import torch

from experiments.gpu.visit import Visit


def run(visit: Visit) -> None:
    """A cell for the copy and one for each type of product."""
    visit.cell("ceilings", "copy", 3, lambda: _copy(visit))
    visit.cell("ceilings", "product", 4, lambda: _product(visit, torch.bfloat16, 8192))
    visit.cell("ceilings", "product float32", 3, lambda: _product(visit, torch.float32, 4096))


def _copy(visit: Visit) -> dict[str, Any]:
    count = 2**22 if visit.cpu else 2**31
    source = torch.empty(count, dtype=torch.bfloat16, device=visit.device).normal_()
    target = torch.empty_like(source)
    found = visit.took(lambda: target.copy_(source), warm=3, rounds=15)
    rate = 2 * source.nbytes / found["seconds"]  # read and written
    return found | {"bytes": 2 * source.nbytes, "rate": rate, "gbps": rate / 1e9}


def _product(visit: Visit, dtype: torch.dtype, size: int) -> dict[str, Any]:
    size = 256 if visit.cpu else size
    left, right = (torch.randn(size, size, device=visit.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    found = visit.took(lambda: torch.mm(left, right, out=out), warm=3, rounds=20)
    rate = 2 * size**3 / found["seconds"]
    return found | {"size": size, "dtype": str(dtype), "rate": rate, "tflops": rate / 1e12}
