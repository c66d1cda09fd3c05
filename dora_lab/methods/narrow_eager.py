"""What a `narrow.Narrow` layer computes beside matrix products, an operation at a time: what `narrow_triton` has to
agree with, and what runs where there is no Triton (there alone the device is asked whether an m is zero).

Shape suffixes: as in `narrow`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_lab.methods.dora_autograd import scale


def factor(A_RI: Tensor, dtype: torch.dtype) -> Tensor:
    """hi, hi, lo of A, (3 R, I): all for a product with `activation`, the last two for one with narrow numbers."""
    hi, lo = _parts(A_RI, dtype)
    return torch.cat([hi, hi, lo])


def activation(both_TL: Tensor, dtype: torch.dtype, by: float) -> Tensor:
    """hi, lo, hi of (high + low half) `by`, (T, 3 R): all for a product with a factor, or the first two, as above."""
    high, low = both_TL.chunk(2, 1)
    hi, lo = _parts((high + low) * by, dtype)
    return torch.cat([hi, lo, hi], 1)


def gained(B_OR: Tensor, dtype: torch.dtype, by: float, m_O: Tensor | None, norm_O: Tensor | None) -> Tensor:
    """hi, hi, lo of g B `by`, (O, 3 R); without m of B `by`."""
    g_O = 1.0 if m_O is None or norm_O is None else scale(m_O, norm_O, False)[:, None]
    hi, lo = _parts(B_OR * g_O * by, dtype)
    return torch.cat([hi, hi, lo], 1)


def onto(y_TO: Tensor, z_TO: Tensor | None, h_TK: Tensor, B_OK: Tensor, m_O: Tensor, norm_O: Tensor,
         bias_O: Tensor | None, by: float) -> None:  # fmt: skip
    """From the base's output to the layer's, in place; with z = drop(x) W0^T: y + (g - 1) z + the low-rank product."""
    g_O = scale(m_O, norm_O, False)
    low_TO = product(h_TK, B_OK.t()).mul_(by)
    if z_TO is not None:
        low_TO += y_TO.float().addcmul_(z_TO, g_O - 1)
    else:
        low_TO.addcmul_(y_TO, g_O)
        if bias_O is not None:
            low_TO += (1 - g_O) * bias_O
    y_TO.copy_(low_TO)


def back(
    G_TO: Tensor, value_TO: Tensor, bias_O: Tensor | None, m_O: Tensor, norm_O: Tensor, less: int
) -> tuple[Tensor, Tensor]:
    """(G (g - less), narrow; sums over tokens of G (value - bias), a row for each piece, float32)."""
    moved_TO = torch.mul(G_TO, scale(m_O, norm_O, False) - less, out=torch.empty_like(G_TO))
    wide_TO = value_TO.float() if bias_O is None else value_TO.float() - bias_O
    return moved_TO, (wide_TO * G_TO).sum(0, keepdim=True)


def rows(sums_PO: Tensor, raw_OL: Tensor, B_OR: Tensor, m_O: Tensor, norm_O: Tensor, s: float, of_base: bool,
         G_TO: Tensor, x_TI: Tensor, W_OI: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dB, dm). The sums are of the base's product, or of g z, which says nothing where m = 0: of x and W0 there."""
    high, low = raw_OL.chunk(2, 1)
    raw_OR, sum_O = high + low, sums_PO.sum(0)
    along_O = (raw_OR * B_OR).sum(1) * s  # sum_t dy s h B^T
    if of_base:
        dm_O = (sum_O + along_O) / norm_O
    else:
        dm_O = sum_O / m_O
        if len(lost := (m_O == 0).nonzero()[:, 0]):
            base_TO = x_TI.float() @ W_OI[lost].float().t()
            dm_O[lost] = ((G_TO[:, lost] * base_TO).sum(0) + along_O[lost]) / norm_O[lost]
    return raw_OR * (scale(m_O, norm_O, False) * s)[:, None], dm_O.masked_fill(norm_O == 0, 0.0)


def _parts(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X as two narrow numbers, hi + lo."""
    hi = X.to(dtype)
    return hi, (X - hi).to(dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """A product of narrow numbers in float32."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)
