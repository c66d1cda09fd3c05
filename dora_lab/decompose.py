"""Magnitude and direction of a weight, and how far each has moved (section 3.2, equations 2-4).

The axis, once and for all: a weight W_OI is that of `torch.nn.Linear`, (out, in), and has one magnitude per output
feature, the Euclidean norm of its row. The paper writes W as (in, out) and therefore says "column".

Everything is computed in float32 or float64, whatever the weight's own type: in bfloat16 the changes of early training
are below one unit in the last place. Shape suffixes: O = out features, I = in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class Change:
    """How far each vector of a matrix has moved: one number per output feature (or per input feature), float64."""

    norm0: Tensor  # |W0|
    delta_m: Tensor  # |W| - |W0|, signed: the mean of its absolute value is equation 3
    delta_d: Tensor  # 1 - cos (equation 4), in [0, 2]; nan where W or W0 is zero and has no direction
    square: Tensor  # |W - W0|^2
    norm: Tensor  # |W|; with a magnitude, that of V = W0 + E before it is scaled


@dataclass
class Products:
    """w2 = |W0|^2, a = W0.E and e2 = |E|^2 of every row (or column) of a matrix and its change E, in float64.

    All that is asked of a change follows from the three: |W|^2 - |W0|^2 = 2a + e2 and, with the square of the part of E
    across W0, e2 - a^2 / w2: 1 - cos = sin^2 / (1 + cos), sin^2 = (e2 - a^2 / w2) / |W|^2. Where that difference, or
    |W|^2 = w2 + 2a + e2, is much smaller than its terms, `doubtful` says so, and `settle` takes sums of products that
    were made in float64; a caller that makes all of them so need not ask.
    """

    w2: Tensor
    a: Tensor
    e2: Tensor

    @property
    def doubtful(self) -> Tensor:
        """Where sums of float32 products have too few digits left for a relative error of about 1e-5.

        So too where products are so small that float32 rounds them to zero or loses their digits: a row of norm 1e-20
        is no row of zeros.
        """
        across = self.e2 - self.a.square() / _safe(self.w2)
        left = self.w2 + 2 * self.a + self.e2
        cancelled = ((across < CANCELS * self.e2) | (left < CANCELS * (self.w2 + self.e2))) & (self.e2 > 0)
        return cancelled | (self.w2 < SMALL)

    def settle(self, where: Tensor, exact: Products) -> None:
        """Put better sums in place of those at `where` (indices)."""
        self.w2[where], self.a[where], self.e2[where] = exact.w2, exact.a, exact.e2

    def change(self, magnitude: Tensor | None = None) -> Change:
        """The change that W = W0 + E is; with `magnitude` m, that W = m (W0 + E) / |W0 + E| is (equation 5).

        m < 0 turns a vector round: its magnitude is |m|. Where W0 + E is zero, W is zero.
        """
        w2, a, e2 = self.w2, self.a, self.e2
        v2 = (w2 + 2 * a + e2).clamp_min(0)
        norm0, norm = w2.sqrt(), v2.sqrt()
        sine2 = ((e2 - a.square() / _safe(w2)) / _safe(v2)).clamp(0, 1)
        cosine = ((w2 + a) / (_safe(w2) * _safe(v2)).sqrt()).clamp(-1, 1)
        turned = torch.where(cosine >= 0, sine2 / (1 + cosine), 1 - cosine)
        alive = (w2 > 0) & (v2 > 0)
        if magnitude is None:
            moved, square = (2 * a + e2) / _safe(norm0 + norm), e2
        else:
            m = torch.where(v2 > 0, magnitude.to(w2), 0.0)
            turned, alive, m = torch.where(m < 0, 2 - turned, turned), alive & (m != 0), m.abs()
            moved = m - norm0
            square = moved.square() + 2 * m * norm0 * torch.where(alive, turned, 0.0)
        return Change(norm0, moved, torch.where(alive, turned, torch.nan), square, norm)


# |W0|^2 below which the smallest change that float32 can hold, 6e-8 of it, has a square that float32 cannot
SMALL = 1e-12
CANCELS = 0.03  # share of its terms below which a difference of float32 sums is taken again in float64
# products that are added up in the tensor's own type, along rows (more of them BLAS would share among threads), columns
RUN = {1: 4096, 0: 64}
BLOCK = 2**22  # numbers of a matrix at a time that are widened


def dots(X: Tensor, Y: Tensor, along: int) -> Tensor:
    """Scalar products of the rows (along = 1) or columns (along = 0) of two matrices, as float64.

    Products and short sums are made in the matrices' own type, float32 or float64; nothing of their size is allocated.
    """
    if X.device.type != "cpu":
        return torch.linalg.vecdot(X, Y, dim=along).double()
    x, y, size = X.numpy(), Y.numpy(), RUN[along]
    total = np.zeros(X.shape[1 - along])
    for start in range(0, X.shape[along], size):
        run = slice(start, start + size)
        total += np.vecdot(x[:, run], y[:, run]) if along == 1 else np.einsum("ij,ij->j", x[run], y[run])
    return torch.from_numpy(total)


def change(W0_OI: Tensor, W_OI: Tensor, *, axis: str = "out") -> Change:
    """How far each row (axis "out") or column ("in") of a matrix has moved.

    Raises ValueError if the shapes differ, or for another axis.
    """
    _refuse_unlike(W0_OI, W_OI)
    along, W0_OI, W_OI = along_of(axis), W0_OI.detach(), W_OI.detach()
    size = max(1, BLOCK // max(1, W0_OI.shape[1]))
    parts = [_float_sums(W0, W, along) for W0, W in zip(W0_OI.split(size), W_OI.split(size), strict=True)]
    found = Products(*(torch.cat(p) if along == 1 else torch.stack(p).sum(0) for p in zip(*parts, strict=True)))
    for where in found.doubtful.nonzero()[:, 0].split(size):
        W0, W = (side.index_select(1 - along, where).double() for side in (W0_OI, W_OI))
        found.settle(where, exactly(W0, W - W0, along))
    return found.change()


def _float_sums(W0: Tensor, W: Tensor, along: int) -> tuple[Tensor, Tensor, Tensor]:
    W0 = wide(W0)
    E = wide(W) - W0
    return dots(W0, W0, along), dots(W0, E, along), dots(E, E, along)


def factored(left: Tensor, right: Tensor, scaling: float, seen: Tensor, along: int) -> tuple[Tensor, Tensor]:
    """(W0.E, |E|^2) of the rows (along = 1) or columns (0) of E = s left right, which is never built; float64.

    seen: W0 right^T (rows, rank) along rows, left^T W0 (rank, columns) along columns.
    """
    left, right = left.double(), right.double()
    if along == 1:
        return scaling * (left * seen).sum(1), scaling**2 * ((left @ (right @ right.t())) * left).sum(1)
    return scaling * (right * seen).sum(0), scaling**2 * (((left.t() @ left) @ right) * right).sum(0)


def factored_change(
    W0_OI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float,
    magnitude: Tensor | None = None,
    square: Tensor | None = None,
) -> Change:  # fmt: skip
    """How far each row of a matrix moves by s B A, and by a magnitude put on the sum, without building either.

    square: |W0|^2 of each row in float64, if it is at hand: with a magnitude it has to be as exact.
    """
    W0_OI, A_RI, B_OR = W0_OI.detach(), wide(A_RI.detach()), wide(B_OR.detach())
    size = max(1, BLOCK // max(1, W0_OI.shape[1]))
    seen_OR = torch.cat([wide(rows) @ A_RI.t() for rows in W0_OI.split(size)])
    w2 = squares(W0_OI) if square is None else square
    found = Products(w2.clone(), *factored(B_OR, A_RI, scaling, seen_OR, 1))
    for where in found.doubtful.nonzero()[:, 0].split(size):
        E = scaling * (B_OR[where].double() @ A_RI.double())
        found.settle(where, exactly(W0_OI[where], E, 1))
    return found.change(None if magnitude is None else magnitude.detach())


def squares(W_OI: Tensor) -> Tensor:
    """|W|^2 of each row, in float64 throughout."""
    parts = W_OI.detach().split(max(1, BLOCK // max(1, W_OI.shape[1])))
    return torch.cat([dots(part, part, 1) for part in (rows.double() for rows in parts)])


def row(module: str, change: Change, axis: str, magnitude: Tensor | None) -> dict[str, Any]:
    """The columns of a probed matrix, of saved models and while training; `probing.saved_models` says what each is."""
    parts = module.split(".")
    # one transfer: on a GPU every number that is asked for by itself waits for the device
    change = Change(*(values.cpu() for values in vars(change).values()))
    magnitude = None if magnitude is None else magnitude.cpu()
    directed = ~change.delta_d.isnan()
    known = change.delta_d[directed]
    growth = change.delta_m[directed] / change.norm0[directed]
    # |W| / |W0| = p / (1 - d) with p = 1 + E.W0 / |W0|^2, so growth is p - 1 and p d / (1 - d)
    rotation = (1 + growth) * known
    moved, whole = change.delta_m.abs(), change.norm0.square().sum().sqrt().item()
    return {
        "module": module,
        "layer": next((int(part) for part in parts[:-1] if part.isdigit()), None),
        "kind": parts[-1],
        "delta_m": moved.mean().item(),
        "delta_d": known.mean().item() if len(known) else None,
        "relative_change": change.square.sum().sqrt().item() / whole if whole else None,
        "axis": axis,
        "delta_m_share": moved.mean().item() / change.norm0.mean().item() if whole else None,
        "grown": (change.delta_m > 0).double().mean().item(),
        "delta_m_signed": change.delta_m.mean().item(),
        "delta_m_sd": change.delta_m.std(correction=0).item(),
        **_quantiles("delta_m", moved),
        **_quantiles("delta_d", known),
        "growth": growth.mean().item() if len(known) else None,
        "rotation": rotation.mean().item() if len(known) else None,
        "radial": (growth - rotation).mean().item() if len(known) else None,
        "radial_sd": (growth - rotation).std(correction=0).item() if len(known) else None,
        "undirected": len(change.delta_d) - len(known),
        "magnitude_still": _still(change, magnitude) if magnitude is not None and axis == "out" else None,
    }


def _quantiles(name: str, values: Tensor) -> dict[str, float | None]:
    percent = (10, 50, 90)
    if not len(values):
        return {f"{name}_p{p}": None for p in percent}
    found = torch.quantile(values, torch.tensor(percent, dtype=values.dtype, device=values.device) / 100).tolist()
    return {f"{name}_p{p}": value for p, value in zip(percent, found, strict=True)}


def _still(change: Change, magnitude: Tensor) -> bool:
    """Is every magnitude what |W0| is, as rounded in its type, though directions have moved?"""
    start = change.norm0.to(magnitude.dtype).double()
    unmoved = (magnitude.double() - start).abs() <= max(1e-6, torch.finfo(magnitude.dtype).eps) * start
    return bool(unmoved.all()) and bool((change.delta_d > 0).any())


def exactly(W0: Tensor, E: Tensor, along: int) -> Products:
    """The three sums in float64."""
    W0, E = W0.double(), E.double()
    return Products(dots(W0, W0, along), dots(W0, E, along), dots(E, E, along))


def along_of(axis: str) -> int:
    """The dimension of an (out, in) matrix that the norms of an axis go along; ValueError for an unknown axis."""
    if axis not in ("out", "in"):
        raise ValueError(f"axis = '{axis}': must be 'out' or 'in'")
    return 1 if axis == "out" else 0


def _safe(values: Tensor) -> Tensor:
    """The values with 1 for 0, to divide by."""
    return values.masked_fill(values == 0, 1.0)


def _pair(W0_OI: Tensor, W_OI: Tensor) -> tuple[Tensor, Tensor]:
    _refuse_unlike(W0_OI, W_OI)
    return W0_OI.detach().double(), W_OI.detach().double()  # float32 has no square of 1e-20


def _refuse_unlike(W0_OI: Tensor, W_OI: Tensor) -> None:
    if W0_OI.shape != W_OI.shape or W_OI.dim() != 2:
        raise ValueError(f"expected two matrices of one shape, got {tuple(W0_OI.shape)} and {tuple(W_OI.shape)}")
