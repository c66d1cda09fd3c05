"""What a `narrow.Narrow` layer computes beside matrix products, in few operations of torch: each is a start that the
processor has to make, and at a few thousand tokens starting takes as long as computing.

`narrow_triton` has `onto` and `back` in one pass each, and has to agree.
Shape suffixes: as in `narrow`.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = (64, 32, 16, 8)  # outputs of one product of which only the diagonal is wanted


def factor(A_RI: Tensor, dtype: torch.dtype) -> Tensor:
    """hi, hi, lo of A, (3 R, I): all for a product with `activation`, the last two for one with narrow numbers."""
    rank, inner = A_RI.shape
    parts_3RI = A_RI.new_empty(3, rank, inner, dtype=dtype)
    parts_3RI[:2] = A_RI
    torch.sub(A_RI, parts_3RI[0], out=parts_3RI[2])
    return parts_3RI.view(3 * rank, inner)


def activation(both_TL: Tensor, dtype: torch.dtype, by: float) -> Tensor:
    """hi, lo, hi of (high + low half) `by`, (T, 3 R): all for a product with a factor, or the first two, as above."""
    high_TR, low_TR = both_TL.chunk(2, 1)
    sum_TR = high_TR + low_TR
    if by != 1:
        sum_TR *= by
    tokens, rank = sum_TR.shape
    parts_T3R = sum_TR.new_empty(tokens, 3, rank, dtype=dtype)
    parts_T3R[:, ::2] = sum_TR[:, None]
    torch.sub(sum_TR, parts_T3R[:, 0], out=parts_T3R[:, 1])
    return parts_T3R.view(tokens, 3 * rank)


def gained(B_OR: Tensor, dtype: torch.dtype, by: Tensor | float) -> Tensor:
    """hi, hi, lo of B `by`, (O, 3 R), a number or one for each row."""
    width, rank = B_OR.shape
    scaled_OR = B_OR * (by[:, None] if isinstance(by, Tensor) else by)
    parts_O3R = B_OR.new_empty(width, 3, rank, dtype=dtype)
    parts_O3R[:, :2] = scaled_OR[:, None]
    torch.sub(scaled_OR, parts_O3R[:, 0], out=parts_O3R[:, 2])
    return parts_O3R.view(width, 3 * rank)


def onto(
    y_TO: Tensor, z_TO: Tensor | None, h_TK: Tensor, B_OK: Tensor, g_O: Tensor, bias_O: Tensor | None, by: float
) -> None:
    """From the base's output to the layer's, in place; with z = drop(x) W0^T: y + (g - 1) z + the low-rank product."""
    low_TO = product(h_TK, B_OK.t())  # in float32, so that the sum is rounded once
    if by != 1:
        low_TO *= by
    if z_TO is not None:
        torch.add(low_TO.addcmul_(z_TO, g_O - 1), y_TO, out=y_TO)
        return
    if bias_O is not None:
        low_TO += (1 - g_O) * bias_O
    torch.addcmul(low_TO, y_TO, g_O, out=y_TO)


def back(G_TO: Tensor, value_TO: Tensor, bias_O: Tensor | None, g_O: Tensor) -> tuple[Tensor, Tensor]:
    """(G g, narrow; sums over tokens of G (value - bias), a row for each piece, float32)."""
    moved_TO = torch.mul(G_TO, g_O, out=torch.empty_like(G_TO))
    sum_O = along(G_TO, value_TO)
    if bias_O is not None:
        sum_O = torch.addcmul(sum_O, G_TO.sum(0, dtype=sum_O.dtype), bias_O, value=-1)
    return moved_TO, sum_O[None]


def along(G_TO: Tensor, value_TO: Tensor) -> Tensor:
    """Sums over tokens of G times value, (out,), in float32.

    They are the diagonal of G^T value. A few outputs at a time, a product that throws the rest away reads both but
    once and nothing is made wide.
    """
    tokens, width = G_TO.shape
    size = next((size for size in BLOCKS if width % size == 0), None)
    if size is None:
        return (G_TO.float() * value_TO).sum(0)
    left, right = G_TO.view(tokens, -1, size), value_TO.reshape(tokens, -1, size)
    return product(left.permute(1, 2, 0), right.permute(1, 0, 2)).diagonal(dim1=1, dim2=2).reshape(width)


def product(left: Tensor, right: Tensor) -> Tensor:
    """A product of narrow numbers in float32, or as many as there are."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    return multiply(left, right, out_dtype=torch.float32)
