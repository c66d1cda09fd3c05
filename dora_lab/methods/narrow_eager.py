"""What a `narrow.Narrow` layer computes beside matrix products, in few operations of torch: each is a start that the
processor has to make, and at a few thousand tokens starting takes as long as computing.

`narrow_triton` has the same functions, of one kernel each, and has to agree.
Shape suffixes: as in `narrow`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dora_lab.methods.dora_autograd import living, scale

BLOCKS = (64, 32, 16, 8)  # outputs of one product of which only the diagonal is wanted


class Parts(NamedTuple):
    """Narrow parts of the factors as `factor` and `gained` make them; with a magnitude, B's are those of g s B."""

    A_KI: Tensor
    B_OK: Tensor
    g_O: Tensor | None = None
    sg_O: Tensor | None = None  # where it was needed for them


def factors(
    A_RI: Tensor, B_OR: Tensor, dtype: torch.dtype, by: float, s: float, m_O: Tensor | None, norm_O: Tensor | None,
    alive: bool, A_KI: Tensor | None = None,
) -> Parts:  # fmt: skip
    """The parts of A, if they are not at hand, and of s B `by`, with m of g s B `by`; and g."""
    A_KI = factor(A_RI, dtype) if A_KI is None else A_KI
    if m_O is None or norm_O is None:
        return Parts(A_KI, gained(B_OR, dtype, s * by))
    g_O = scale(m_O, norm_O, alive)
    sg_O = g_O * s
    return Parts(A_KI, gained(B_OR, dtype, sg_O if by == 1 else sg_O * by), g_O, sg_O)


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


def back(G_TO: Tensor, value_TO: Tensor, bias_O: Tensor | None, g_O: Tensor, less: int = 0) -> tuple[Tensor, Tensor]:
    """(G (g - less), narrow; sums over tokens of G (value - bias), a row for each piece, float32)."""
    moved_TO = torch.mul(G_TO, g_O - less if less else g_O, out=torch.empty_like(G_TO))
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


def sums(raw_OL: Tensor, halves_LI: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """(dA, dB) of LoRA: the sums of the two halves each."""
    raw_OR, dA_RI = _halves(raw_OL, halves_LI)
    return dA_RI, raw_OR if s == 1 else raw_OR.mul_(s)


def rows(
    sums_PO: Tensor, raw_OL: Tensor, halves_LI: Tensor, B_OR: Tensor, m_O: Tensor, norm_O: Tensor, parts: Parts,
    of_base: bool, G_TO: Tensor, x_TI: Tensor, W_OI: Tensor, s: float, alive: bool, steady: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dA, dB, dm). The sums are of the base's product, or of g z, which says nothing where m = 0."""
    raw_OR, dA_RI = _halves(raw_OL, halves_LI)
    sum_O = sums_PO[0] if len(sums_PO) == 1 else sums_PO.sum(0)
    if of_base:
        dm_O = living(torch.add(sum_O, (raw_OR * B_OR).sum(1), alpha=s) / norm_O, norm_O, alive)
    elif steady:  # an m of 0 was written where nothing shows it: it is seen in some steps
        dm_O = (sum_O / m_O).nan_to_num_(0.0, torch.inf, -torch.inf)
    else:
        dm_O = sum_O / m_O
        if len(lost := (m_O == 0).nonzero()[:, 0]):  # of x and W0 there; this asks the device where that is
            base_TO = x_TI.float() @ W_OI[lost].float().t()
            along_O = (raw_OR[lost] * B_OR[lost]).sum(1) * s  # sum_t dy s h B^T
            dm_O[lost] = ((G_TO[:, lost] * base_TO).sum(0) + along_O) / norm_O[lost]
        dm_O = living(dm_O, norm_O, alive)
    assert parts.sg_O is not None  # there is a magnitude
    return dA_RI, raw_OR * parts.sg_O[:, None], dm_O


def _halves(raw_OL: Tensor, halves_LI: Tensor) -> tuple[Tensor, Tensor]:
    rank = raw_OL.shape[1] // 2
    return raw_OL[:, :rank] + raw_OL[:, rank:], halves_LI[:rank] + halves_LI[rank:]


def product(left: Tensor, right: Tensor) -> Tensor:
    """A product of narrow numbers in float32, or as many as there are."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    return multiply(left, right, out_dtype=torch.float32)
