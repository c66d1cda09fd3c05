"""Magnitude and direction of a weight, and how far each has moved (section 3.2, equations 2-4).

The axis, once and for all: a weight W_OI is that of `torch.nn.Linear`, (out, in), and has one magnitude per output
feature, the Euclidean norm of its row. The paper writes W as (in, out) and therefore says "column".

Everything is computed in float32, or in float64 for a float64 weight, whatever the weight's own type: in bfloat16 the
changes of early training are below one unit in the last place. Shape suffixes: O = out features, I = in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def wide(weight: Tensor) -> Tensor:
    """The tensor in the type that the mathematics is done in: float64 stays, everything else becomes float32."""
    return weight if weight.dtype == torch.float64 else weight.float()


def magnitude(W_OI: Tensor) -> Tensor:
    """m_O = the norm of each row of W_OI (equation 2), float32 (float64 for float64), in the units of the weight."""
    return torch.linalg.vector_norm(wide(W_OI), dim=1)


def direction(W_OI: Tensor) -> Tensor:
    """Unit rows W_OI / magnitude(W_OI) (equation 2), (out, in); a row of zeros has no direction and stays zero."""
    norm_O = magnitude(W_OI)
    return wide(W_OI) / norm_O.masked_fill(norm_O == 0, 1.0)[:, None]


def delta_m(W0_OI: Tensor, W_OI: Tensor) -> float:
    """Mean over output features of |m - m0| (equation 3), in the units of the weight, >= 0.

    Raises ValueError if the shapes differ. Computed from the difference of the weights, so that the difference of two
    nearly equal norms does not lose its digits.
    """
    W0_OI, W_OI = _pair(W0_OI, W_OI)
    E_OI = W_OI - W0_OI
    sum_O = magnitude(W0_OI) + magnitude(W_OI)
    # |W|^2 - |W0|^2 = E.(W + W0)
    difference_O = (E_OI * (W_OI + W0_OI)).sum(dim=1).abs() / sum_O.masked_fill(sum_O == 0, 1.0)
    return difference_O.mean().item()


def delta_d(W0_OI: Tensor, W_OI: Tensor) -> float:
    """Mean over output features of 1 - cos(W row, W0 row) (equation 4), in [0, 2].

    1 - cos is computed as half the squared distance of the unit rows: subtracting a float32 cosine from 1 is wrong in
    the first digit at 1e-7, and negative below. Rows of zeros have no direction and are left out of the mean; raises
    ValueError if no row is left, or if the shapes differ.
    """
    W0_OI, W_OI = _pair(W0_OI, W_OI)
    both_O = (magnitude(W0_OI) > 0) & (magnitude(W_OI) > 0)
    if not bool(both_O.any()):
        raise ValueError(f"weight of shape {tuple(W_OI.shape)} has no row with a direction: all rows are zero")
    change_O = (direction(W_OI) - direction(W0_OI)).square().sum(dim=1) / 2
    return change_O[both_O].mean().item()


def relative_change(W0_OI: Tensor, W_OI: Tensor) -> float:
    """Frobenius norm of W - W0 over that of W0, >= 0; raises ValueError if W0 is zero or the shapes differ."""
    W0_OI, W_OI = _pair(W0_OI, W_OI)
    norm = torch.linalg.vector_norm(W0_OI).item()
    if norm == 0:
        raise ValueError(f"initial weight of shape {tuple(W0_OI.shape)} is zero: its relative change has no value")
    return torch.linalg.vector_norm(W_OI - W0_OI).item() / norm


@dataclass(frozen=True)
class Change:
    """How far each vector of a matrix has moved: one number per output feature (or per input feature), float64."""

    norm0: Tensor  # |W0|
    delta_m: Tensor  # |W| - |W0|, signed: the mean of its absolute value is equation 3
    delta_d: Tensor  # 1 - cos (equation 4), in [0, 2]; nan where W or W0 is zero and has no direction
    square: Tensor  # |W - W0|^2


def change(blocks: Callable[[], Iterable[tuple[Tensor, Tensor]]], *, axis: str = "out") -> Change:
    """The change of a matrix that is given as blocks of rows (W0_BI, E_BI), E = W - W0, in order.

    axis: "out" (one number per row) or "in" (one per column; `blocks` is gone through twice).

    With w2 = |W0|^2, a = W0.E and e2 = |E|^2: |W|^2 - |W0|^2 = 2a + e2 and, with the part of E across W0,
    1 - cos = sin^2 / (1 + cos), sin^2 = |E - (a / w2) W0|^2 / |W|^2. No two nearly equal numbers are subtracted, so
    small changes keep their digits; sums are in float64.
    """
    if axis not in ("out", "in"):
        raise ValueError(f"axis = '{axis}': must be 'out' or 'in'")
    along = 1 if axis == "out" else 0
    sums: list[list[Tensor]] = []
    for W0, E in blocks():
        W0, E = wide(W0), wide(E)
        part = [_sum(W0 * W0, along), _sum(W0 * E, along), _sum(E * E, along)]
        if axis == "out":  # the row is at hand whole
            part.append(_across(W0, E, part, along))
        sums.append(part)
    if axis == "out":
        w2, a, e2, across = (torch.cat(parts) for parts in zip(*sums, strict=True))
    else:
        w2, a, e2 = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        across = sum((_across(wide(W0), wide(E), [w2, a], along) for W0, E in blocks()), torch.zeros_like(w2))
    v2 = (w2 + 2 * a + e2).clamp_min(0)
    safe_w2, safe_v2 = w2.masked_fill(w2 == 0, 1.0), v2.masked_fill(v2 == 0, 1.0)
    sine2 = (across / safe_v2).clamp(0, 1)
    cosine = ((w2 + a) / (safe_w2 * safe_v2).sqrt()).clamp(-1, 1)
    turned = torch.where(cosine >= 0, sine2 / (1 + cosine), 1 - cosine)
    norm0 = w2.sqrt()
    moved = (2 * a + e2) / (norm0 + v2.sqrt()).masked_fill((w2 == 0) & (v2 == 0), 1.0)
    return Change(norm0, moved, torch.where((w2 > 0) & (v2 > 0), turned, torch.nan), e2)


def _sum(values: Tensor, along: int) -> Tensor:
    return values.sum(along, dtype=torch.float64)


def _across(W0: Tensor, E: Tensor, sums: list[Tensor], along: int) -> Tensor:
    """|E - (a / w2) W0|^2, summed over this block."""
    ratio = (sums[1] / sums[0].masked_fill(sums[0] == 0, 1.0)).to(W0.dtype).unsqueeze(along)
    return _sum(torch.addcmul(E, W0, ratio, value=-1).square_(), along)


def _pair(W0_OI: Tensor, W_OI: Tensor) -> tuple[Tensor, Tensor]:
    if W0_OI.shape != W_OI.shape or W_OI.dim() != 2:
        raise ValueError(f"expected two matrices of one shape, got {tuple(W0_OI.shape)} and {tuple(W_OI.shape)}")
    return wide(W0_OI.detach()), wide(W_OI.detach())
