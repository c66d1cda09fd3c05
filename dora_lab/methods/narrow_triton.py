"""The two passes over outputs of a `narrow.Narrow` layer with a magnitude, each as one Triton kernel; `narrow_eager`
says what they are.

A pass reads and writes each number once, with float32 between; sums are added up in a fixed order, where atomic ones
would differ from run to run. Starting a kernel from here takes the processor several times as long as one of torch's,
so nothing small is here.
Shape suffixes: as in `narrow`.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ONTO = (64, 64, 4)  # tokens and outputs of a program, warps
BACK = (64, 64, 4, 4)  # the same, with the steps that a program takes down the tokens before the warps


@triton.jit
def _onto(y, z, h, b, g, bias, by, tokens, width, parts, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
          TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_K: tl.constexpr):  # fmt: skip
    o, t = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O), tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    in_t, in_o = t[:, None] < tokens, o[None, :] < width
    offset = t[:, None].to(tl.int64) * width + o[None, :]
    value = tl.load(y + offset, mask=in_t & in_o, other=0.0).to(tl.float32)
    low = tl.zeros((TILE_T, TILE_O), dtype=tl.float32)
    for start in range(0, parts, TILE_K):
        k = start + tl.arange(0, TILE_K)
        h_tile = tl.load(h + t[:, None] * parts + k[None, :], mask=in_t & (k[None, :] < parts), other=0.0)
        b_tile = tl.load(b + o[None, :] * parts + k[:, None], mask=in_o & (k[:, None] < parts), other=0.0)
        low = tl.dot(h_tile, b_tile, low)
    gain = tl.load(g + o, mask=o < width, other=1.0)[None, :]
    if HAS_Z:
        value += (gain - 1) * tl.load(z + offset, mask=in_t & in_o, other=0.0).to(tl.float32)
    else:
        value *= gain
        if HAS_BIAS:
            value += (1 - gain) * tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, (value + low * by).to(y.dtype.element_ty), mask=in_t & in_o)


@triton.jit
def _back(grad, value, bias, g, moved, sums, tokens, width, HAS_BIAS: tl.constexpr, TILE_T: tl.constexpr,
          TILE_O: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    gain = tl.load(g + o, mask=o < width, other=1.0)[None, :]
    total = tl.zeros((TILE_O,), dtype=tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(1) * STEPS + step) * TILE_T + tl.arange(0, TILE_T)
        inside = (t[:, None] < tokens) & (o[None, :] < width)
        offset = t[:, None].to(tl.int64) * width + o[None, :]
        grad_tile = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        value_tile = tl.load(value + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value_tile -= tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
        tl.store(moved + offset, (grad_tile * gain).to(moved.dtype.element_ty), mask=inside)
        total += tl.sum(grad_tile * value_tile, axis=0)
    tl.store(sums + tl.program_id(1) * width + o, total, mask=o < width)


def onto(
    y_TO: Tensor, z_TO: Tensor | None, h_TK: Tensor, B_OK: Tensor, g_O: Tensor, bias_O: Tensor | None, by: float
) -> None:
    (tokens, width), (tile_t, tile_o, warps) = y_TO.shape, ONTO
    with _on(y_TO):
        _onto[triton.cdiv(width, tile_o), triton.cdiv(tokens, tile_t)](
            y_TO, y_TO if z_TO is None else z_TO, h_TK, B_OK, g_O, g_O if bias_O is None else bias_O, by, tokens, width,
            h_TK.shape[1], HAS_Z=z_TO is not None, HAS_BIAS=bias_O is not None, TILE_T=tile_t, TILE_O=tile_o,
            TILE_K=32, num_warps=warps,
        )  # fmt: skip


def back(G_TO: Tensor, value_TO: Tensor, bias_O: Tensor | None, g_O: Tensor) -> tuple[Tensor, Tensor]:
    (tokens, width), (tile_t, tile_o, steps, warps) = G_TO.shape, BACK
    grid = (triton.cdiv(width, tile_o), triton.cdiv(tokens, tile_t * steps))
    moved_TO, sums_PO = torch.empty_like(G_TO), g_O.new_empty(grid[1], width)
    with _on(G_TO):
        _back[grid](G_TO, value_TO.contiguous(), g_O if bias_O is None else bias_O, g_O, moved_TO, sums_PO, tokens,
                    width, HAS_BIAS=bias_O is not None, TILE_T=tile_t, TILE_O=tile_o, STEPS=steps,
                    num_warps=warps)  # fmt: skip
    return moved_TO, sums_PO


def _on(tensor: Tensor) -> Any:
    """Triton starts a kernel on the device that is current, whatever its tensors are on; mostly it is theirs."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
