"""Two passes over the tokens of a `narrow.Narrow` layer as Triton kernels: a pass reads and writes every output once.

- `onto`: from the base's output and h = drop(x) A^T to the layer's output, in place;
- `back`: from dy and y to dy g and, in the same reading, the sums that the gradient of m needs.
Both compute in float32 whatever the types in memory (``tf32x3``: high and low parts on tensor cores); sums are added up
in a fixed order.
Shape suffixes: O = out features, R = rank, T = tokens.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_T, TILE_O, WARPS = 128, 128, 8  # of a program of `onto`
BACK_T, BACK_O, BACK_STEPS, BACK_WARPS = 32, 128, 4, 4  # of a program of `back`, which takes some steps down the tokens


@triton.jit
def _onto(y, z, h, b, g, bias, s, tokens, width, rank, HAS_Z: tl.constexpr, HAS_G: tl.constexpr,
          HAS_BIAS: tl.constexpr, TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_R: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    t = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    inside = (t[:, None] < tokens) & (o[None, :] < width)
    offset = t[:, None].to(tl.int64) * width + o[None, :]
    base = tl.load(y + offset, mask=inside, other=0.0)
    low = tl.zeros((TILE_T, TILE_O), dtype=tl.float32)
    for start in range(0, rank, TILE_R):
        r = start + tl.arange(0, TILE_R)
        h_tile = tl.load(
            h + t[:, None] * rank + r[None, :], mask=(t[:, None] < tokens) & (r[None, :] < rank), other=0.0
        )
        b_tile = tl.load(b + o[None, :] * rank + r[:, None], mask=(o[None, :] < width) & (r[:, None] < rank), other=0.0)
        low = tl.dot(h_tile, b_tile, low, input_precision="tf32x3")
    value = base.to(tl.float32) + low * s
    if HAS_G:
        gain = tl.load(g + o, mask=o < width, other=0.0)[None, :]
        if HAS_Z:
            other = tl.load(z + offset, mask=inside, other=0.0).to(tl.float32) + low * s
            tl.store(z + offset, other.to(z.dtype.element_ty), mask=inside)
            value += (gain - 1) * other
        else:
            value = value * gain
            if HAS_BIAS:
                value += (1 - gain) * tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _back(grad, value, gain, moved, sums, tokens, width, TILE_T: tl.constexpr, TILE_O: tl.constexpr,
          STEPS: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    g = tl.load(gain + o, mask=o < width, other=0.0)[None, :]
    total = tl.zeros((TILE_O,), dtype=tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(1) * STEPS + step) * TILE_T + tl.arange(0, TILE_T)
        inside = (t[:, None] < tokens) & (o[None, :] < width)
        offset = t[:, None].to(tl.int64) * width + o[None, :]
        grad_tile = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        value_tile = tl.load(value + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(moved + offset, (grad_tile * g).to(moved.dtype.element_ty), mask=inside)
        total += tl.sum(grad_tile * value_tile, axis=0)
    # one row of sums a program: added up outside in a fixed order, where atomic sums would differ from run to run
    tl.store(sums + tl.program_id(1) * width + o, total, mask=o < width)


def onto(
    y_TO: Tensor, z_TO: Tensor | None, h_TR: Tensor, B_OR: Tensor, g_O: Tensor | None, bias_O: Tensor | None, s: float
) -> None:
    """`narrow._onto`: y = g (y + s h B^T) + (1 - g) bias in place, or with z, in place too, y + s h B^T + (g - 1) z."""
    (tokens, width), rank = y_TO.shape, h_TR.shape[1]
    grid = (triton.cdiv(width, TILE_O), triton.cdiv(tokens, TILE_T))
    _onto[grid](y_TO, y_TO if z_TO is None else z_TO, h_TR, B_OR.contiguous(), h_TR if g_O is None else g_O,
                h_TR if bias_O is None else bias_O, s, tokens, width, rank,
                HAS_Z=z_TO is not None, HAS_G=g_O is not None, HAS_BIAS=bias_O is not None, TILE_T=TILE_T,
                TILE_O=TILE_O, TILE_R=16 if rank <= 16 else 32, num_warps=WARPS)  # fmt: skip


def back(G_TO: Tensor, value_TO: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """`narrow._back`: (G gain, sum over tokens of G value)."""
    tokens, width = G_TO.shape
    grid = (triton.cdiv(width, BACK_O), triton.cdiv(tokens, BACK_T * BACK_STEPS))
    moved_TO = torch.empty_like(G_TO)
    sums = torch.empty(grid[1], width, dtype=torch.float32, device=G_TO.device)
    _back[grid](G_TO, value_TO.contiguous(), gain_O, moved_TO, sums, tokens, width, TILE_T=BACK_T, TILE_O=BACK_O,
                STEPS=BACK_STEPS, num_warps=BACK_WARPS)  # fmt: skip
    return moved_TO, sums.sum(0)
