"""Two passes over the tokens of a DoRA layer as Triton kernels, for a GPU: what `_products.Blocked` does in blocks.

- `onto`: from the base's output and h = drop(x) A^T to the layer's output, in place, in one reading and one writing;
- `back`: from dy and y to dy g and, in the same reading, the sums that the gradient of m needs.
Both compute in float32 whatever the types in memory; the sums are added up in a fixed order. Used where
`_products.FUSED` is set; the eager form is the reference that the tests compare with.
Shape suffixes: O = out features, R = rank, T = tokens.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_T, TILE_O, TILE_R = 32, 128, 32  # of one program; a product in Triton needs at least 16 of each


@triton.jit
def _onto(y, h, b, g, bias, s, tokens, width, rank, HAS_BIAS: tl.constexpr,
          TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_R: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    low = tl.zeros((TILE_T, TILE_O), dtype=tl.float32)
    for start in range(0, rank, TILE_R):
        r = start + tl.arange(0, TILE_R)
        h_tile = tl.load(
            h + t[:, None] * rank + r[None, :], mask=(t[:, None] < tokens) & (r[None, :] < rank), other=0.0
        )
        b_tile = tl.load(b + o[None, :] * rank + r[:, None], mask=(o[None, :] < width) & (r[:, None] < rank), other=0.0)
        low += tl.dot(h_tile, b_tile, input_precision="ieee")
    inside = (t[:, None] < tokens) & (o[None, :] < width)
    place = y + t[:, None].to(tl.int64) * width + o[None, :]
    base = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    g_tile = tl.load(g + o, mask=o < width, other=0.0)[None, :]
    again = base
    if HAS_BIAS:
        again = base - tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    tl.store(place, (base + (g_tile - 1) * again + g_tile * (low * s)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _back(grad, y, g, bias, moved, sums, tokens, width, HAS_BIAS: tl.constexpr,
          TILE_T: tl.constexpr, TILE_O: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    inside = (t[:, None] < tokens) & (o[None, :] < width)
    place = t[:, None].to(tl.int64) * width + o[None, :]
    grad_tile = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value -= tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    g_tile = tl.load(g + o, mask=o < width, other=0.0)[None, :]
    tl.store(moved + place, (grad_tile * g_tile).to(moved.dtype.element_ty), mask=inside)
    # one row of sums a program: added up outside in a fixed order, where atomic sums would differ from run to run
    tl.store(sums + tl.program_id(0) * width + o, tl.sum(grad_tile * value, axis=0), mask=o < width)


def onto(y_TO: Tensor, h_TR: Tensor, B_OR: Tensor, g_O: Tensor, bias_O: Tensor | None, s: float) -> None:
    """y = b + (g - 1) (b - bias) + g s h B^T in place, b = x W0^T + bias being what y holds; all contiguous."""
    tokens, width = y_TO.shape
    grid = (triton.cdiv(tokens, TILE_T), triton.cdiv(width, TILE_O))
    _onto[grid](y_TO, h_TR, B_OR.contiguous(), g_O, g_O if bias_O is None else bias_O, s, tokens, width, h_TR.shape[1],
                HAS_BIAS=bias_O is not None, TILE_T=TILE_T, TILE_O=TILE_O, TILE_R=TILE_R)  # fmt: skip


def back(G_TO: Tensor, y_TO: Tensor, g_O: Tensor, bias_O: Tensor | None, moved_TO: Tensor) -> Tensor:
    """Write G g into `moved_TO`; returns sum over tokens of G (y - bias), (out,), float32."""
    tokens, width = G_TO.shape
    grid = (triton.cdiv(tokens, TILE_T), triton.cdiv(width, TILE_O))
    sums = torch.empty(grid[0], width, dtype=torch.float32, device=G_TO.device)
    _back[grid](G_TO.contiguous(), y_TO.contiguous(), g_O, g_O if bias_O is None else bias_O, moved_TO, sums, tokens,
                width, HAS_BIAS=bias_O is not None, TILE_T=TILE_T, TILE_O=TILE_O)  # fmt: skip
    return sums.sum(0)
