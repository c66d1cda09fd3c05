"""ΔM and ΔD between saved models: what `dora-lab probe` computes, a row per matrix and checkpoint.

Every block of the base is read once for all that was tuned from it. LoRA and DoRA are not merged: with s B A for the
change, W0.E = s rowsum(B * W0 A^T) and |E|^2 = s^2 rowsum(B A A^T * B). Sums that cancel are made again in float64 for
the rows concerned. See `decompose.Products` for what follows from the sums.

Columns of a row (o = one output feature; with ``axis="in"`` one input feature; m_o = |W_o|, m0_o = |W0_o|):

- tuned, step, module, layer, kind, axis: what was measured; tied_with: modules that share the weight, counted here;
  expert: of a tensor that holds the matrices of many experts, which one, else none;
- delta_m: mean |m_o - m0_o| (equation 3), in the units of the weight; delta_m_share: the same over the mean m0;
  delta_m_p10, _p50, _p90: quantiles of |m_o - m0_o|; delta_m_signed, delta_m_sd: mean and standard deviation (over o,
  divisor n) of m_o - m0_o; grown: share of the magnitudes that grew;
- delta_d: mean 1 - cos of the angle between W_o and W0_o (equation 4), in [0, 2]; delta_d_p10, _p50, _p90: quantiles;
- growth: mean of |W_o| / |W0_o| - 1, over the outputs with a direction; it is the sum of radial, the mean of p_o - 1
  with p_o = 1 + E_o.W0_o / |W0_o|^2 (E = W - W0), and rotation, the mean of p_o d_o / (1 - d_o) with d_o = 1 - cos:
  what Pythagoras adds to a row that turns; radial_sd: standard deviation of p_o (over o, divisor n);
- relative_change: Frobenius norm of W - W0 over that of W0;
- undirected: outputs that are zero in W or W0 and so have no direction, left out of delta_d;
- magnitude_still: of DoRA, whether no magnitude has left its start |W0_o|, as rounded in its file, while V did: a
  trainer that forgot to train it; none for what has no magnitude of its own;

and with `dynamics`:

- effective_rank: exp of the entropy of the singular values of W - W0 over their sum (Roy and Vetterli 2007);
- sigma_1 .. sigma_3: its largest singular values over the largest of W0;
- intruders: of the 10 first left singular vectors of W, those whose |cos| with every one of W0 is below 0.5
  (Shuttleworth et al. 2024, arXiv 2410.21228).

A byte that changed on the way is seen where it makes a number that is not finite, where a manifest or the hub's cache
has a hash (`verify`; our adapters' always), or where the header breaks; else safetensors has nothing to see it by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_lab.decompose import Change, Products, along_of, dots, exactly, factored, row
from dora_lab.formats.shards import Shards, refuse_changed
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.io.hub import saved_folder
from dora_lab.probing.matrices import Base, Matrix
from dora_lab.probing.pairs import LowRank, Tuned, Update, open_tuned, steps_of
from dora_lab.probing.spectrum import Dynamics

BLOCK = 2**19  # numbers of the base at a time: a block and its change stay in a core's cache


def probe(
    base: str | Path,
    tuned: Sequence[str | Path],
    *,
    axis: str = "out",
    kinds: Sequence[str] = (),
    dynamics: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    failed: Callable[[CheckpointError], None] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[dict[str, Any]]:
    """Rows of every matrix of every tuned model, as they are known: matrix by matrix, all models of one together.

    base, tuned: folders, or hub ids ("org/name", "org/name@revision"), which are looked up in the hub's cache first.
    failed: takes the error of one tuned model that cannot be used, and the others go on; None: it is raised.
    progress: called with (matrices done, matrices in all, name) before each matrix.

    Raises CheckpointError for a base that cannot be read, ValueError for an unknown axis.
    """
    along_of(axis)
    weights = Base(_folder(base), allow_pickle=allow_pickle)
    for file in weights.files() if verify else ():
        refuse_changed(file)
    opened: list[Tuned] = []
    for path in map(str, tuned):
        try:
            for step, folder in steps_of(_folder(path)):
                try:
                    opened.append(
                        open_tuned(weights, path, step, folder, kinds, allow_pickle=allow_pickle, verify=verify)
                    )
                except CheckpointError as error:
                    _tell(error, failed)
        except CheckpointError as error:
            _tell(error, failed)
    order = {name: place for place, name in enumerate(weights)}
    wanted = sorted(
        {matrix for one in opened for matrix in one.updates},
        key=lambda m: (order[m.name], m.expert or 0, m.module, m.tied_with or ""),
    )
    for done, matrix in enumerate(wanted):
        here = [one for one in opened if matrix in one.updates]
        if not here:
            continue
        progress(done, len(wanted), matrix.module)
        updates = [one.updates[matrix] for one in here]
        more = Dynamics(weights, matrix) if dynamics else None
        for one, update, change in zip(here, updates, changes(weights, matrix, updates, axis), strict=True):
            if isinstance(change, CheckpointError):
                _tell(change, failed)
                opened.remove(one)
                continue
            names = {"tuned": one.path, "step": one.step, "tied_with": matrix.tied_with, "expert": matrix.expert}
            magnitude = update.magnitude if isinstance(update, LowRank) else None
            yield names | row(matrix.module, change, axis, magnitude) | (more.of(update) if more else {})


def changes(
    base: Shards, matrix: Matrix, updates: Sequence[Update], axis: str = "out"
) -> list[Change | CheckpointError]:
    """How far a matrix moved in each of several tuned models, reading the base once (twice for DoRA across its axis).

    Raises CheckpointError if the base cannot be read; an error of one update takes the place of its change.
    """
    own = 0 if matrix.transposed else 1  # DoRA's magnitudes are norms of the stored tensor along this
    along = own if axis == "out" else 1 - own
    scaled = [
        index for index, update in enumerate(updates) if isinstance(update, LowRank) and update.magnitude is not None
    ]
    known: list[Update | _Scaled] = list(updates)
    if along != own and scaled:
        seen = _products(base, matrix, [updates[index] for index in scaled], own)
        for index, products in zip(scaled, seen, strict=True):
            if isinstance(products, Products):
                known[index] = _Scaled(updates[index], products.change().norm, own)  # type: ignore[arg-type]
    found: list[Change | CheckpointError] = []
    for update, products in zip(known, _products(base, matrix, known, along), strict=True):
        if isinstance(products, CheckpointError):
            found.append(products)
        else:
            found.append(products.change(update.magnitude if isinstance(update, LowRank) else None))
    return found


class _Scaled:
    """DoRA, seen across its axis: the rows of V are scaled one by one, so the change has no factors and is built."""

    def __init__(self, update: LowRank, norm_O: Tensor, own: int) -> None:
        assert update.magnitude is not None
        self.update, self.own = update, own
        m_O = update.magnitude.double()
        self.growth_O = torch.where(norm_O > 0, m_O / norm_O.masked_fill(norm_O == 0, 1.0) - 1, 0.0)

    def difference(self, start: int, W0: Tensor, out: Tensor) -> Tensor:
        """m V / |V| - W0 = (m / |V| - 1) V + s B A: no difference of two nearly equal weights."""
        E = self.update.difference(start, W0, out)
        grown = self.growth_O[start : start + len(W0), None] if self.own == 1 else self.growth_O[None]
        return E.addcmul_(W0 + E, grown.to(E.dtype))


def _products(base: Shards, matrix: Matrix, updates: Sequence[Any], along: int) -> list[Products | CheckpointError]:
    """The three sums for every update, in one pass over the base, and again in float64 where they cancelled."""
    double = base.dtype(matrix.name) == "F64"
    errors: dict[int, CheckpointError] = {}
    squares: list[Tensor] = []
    sums: dict[int, tuple[list[Tensor], list[Tensor]]] = {
        index: ([], []) for index, update in enumerate(updates) if not isinstance(update, LowRank)
    }
    low = _Stack([update for update in updates if isinstance(update, LowRank)], matrix, along, double)
    for start, W0 in blocks(base, matrix, double):
        # a magnitude is compared with |W0| itself, not through W - W0, so that norm has to keep all its digits
        exact = low.exact[: len(W0)].copy_(W0) if low.scaled else W0
        squares.append(dots(exact, exact, along))
        low.add(start, W0)
        for index, (a, e2) in sums.items():
            if index in errors:
                continue
            try:
                E = updates[index].difference(start, W0, low.room[: len(W0)])
            except CheckpointError as error:
                errors[index] = error
                continue
            a.append(dots(W0, E, along))
            e2.append(dots(E, E, along))
    w2 = _joined(squares, along)
    if not bool(torch.isfinite(w2).all()):
        raise CheckpointError(_not_finite(base.file(matrix.name), matrix.name))
    low_rank = low.sums()
    found: list[Products | CheckpointError] = []
    for index, update in enumerate(updates):
        if index in errors:
            found.append(errors[index])
            continue
        a, e2 = (_joined(parts, along) for parts in sums[index]) if index in sums else next(low_rank)
        if not bool(torch.isfinite(a).all() & torch.isfinite(e2).all()):
            file = update.after.file(update.name) if hasattr(update, "after") else "the adapter"
            found.append(CheckpointError(_not_finite(file, matrix.name)))
        else:
            found.append(Products(w2.clone(), a, e2))
    again = {i: p.doubtful.nonzero()[:, 0] for i, p in enumerate(found) if isinstance(p, Products)}
    _settle(base, matrix, updates, found, {index: where for index, where in again.items() if len(where)}, along)
    return found


def _settle(
    base: Shards, matrix: Matrix, updates: Sequence[Any], found: list[Any], again: dict[int, Tensor], along: int
) -> None:
    """Make the sums of some rows or columns again, in float64."""
    if not again:
        return
    exact: dict[int, list[Products]] = {index: [] for index in again}
    for start, W0 in blocks(base, matrix, True):
        out = torch.empty_like(W0)
        for index, where in again.items():
            inside = where if along == 0 else where[(where >= start) & (where < start + len(W0))] - start
            if len(inside):
                E = updates[index].difference(start, W0, out)
                W0_there, E_there = (side.index_select(1 - along, inside) for side in (W0, E))
                exact[index].append(exactly(W0_there, E_there, along))
    for index, where in again.items():
        parts = ([getattr(part, name) for part in exact[index]] for name in ("w2", "a", "e2"))
        w2, a, e2 = (_joined(part, along) for part in parts)
        found[index].settle(where, Products(w2, a, e2))


def _joined(parts: list[Tensor], along: int) -> Tensor:
    """Sums of blocks of rows as those of the matrix."""
    return torch.cat(parts) if along == 1 else torch.stack(parts).sum(0)


class _Stack:
    """The sums of all low-rank updates of a matrix: one product of every block with all their factors side by side."""

    def __init__(self, updates: Sequence[LowRank], matrix: Matrix, along: int, double: bool) -> None:
        self.updates, self.along = updates, along
        self.scaled = any(update.magnitude is not None for update in updates) and along == int(not matrix.transposed)
        dtype, (rows, width) = torch.float64 if double else torch.float32, matrix.stored
        self.exact = torch.empty(min(rows, _size(matrix)) * self.scaled, width, dtype=torch.float64)
        self.room = torch.empty(min(rows, _size(matrix)), width, dtype=dtype)  # for changes that are not factored
        if not updates:
            return
        ranks = sum(update.right.shape[0] for update in updates)
        if along == 1:
            self.factor = torch.cat([update.right.to(dtype) for update in updates]).t().contiguous()  # (width, ranks)
            self.seen = torch.empty(rows, ranks, dtype=dtype)
        else:
            self.factor = torch.cat([update.left.to(dtype) for update in updates], dim=1)  # (rows, ranks)
            self.seen = torch.zeros(ranks, width, dtype=dtype)

    def add(self, start: int, W0: Tensor) -> None:
        """Take a block of rows of the base."""
        if not self.updates:
            return
        if self.along == 1:
            torch.mm(W0, self.factor, out=self.seen[start : start + len(W0)])
        else:
            self.seen.addmm_(self.factor[start : start + len(W0)].t(), W0)

    def sums(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(a, e2) of every update, float64."""
        first = 0
        for update in self.updates:
            ranks = slice(first, first + update.right.shape[0])
            first = ranks.stop
            seen = self.seen[:, ranks] if self.along == 1 else self.seen[ranks]
            yield factored(update.left, update.right, update.scaling, seen, self.along)


def _size(matrix: Matrix) -> int:
    return max(1, BLOCK // matrix.stored[1])


def blocks(base: Shards, matrix: Matrix, double: bool) -> Iterator[tuple[int, Tensor]]:
    """(first row, W0) of every block of rows of the stored tensor, in one memory."""
    (rows, width), size = matrix.stored, _size(matrix)
    room = torch.empty(min(rows, size), width, dtype=torch.float64 if double else torch.float32)
    for start in range(0, rows, size):
        W0 = room[: min(size, rows - start)]
        base.fill(matrix.name, matrix.first + start, W0)
        yield start, W0


def _not_finite(file: object, name: str) -> str:
    return f"{file}: '{name}' holds numbers that are not finite, or whose squares are not; fetch it again"


def _folder(path: str | Path) -> Path:
    try:
        return saved_folder(str(path))
    except LoadError as error:
        raise CheckpointError(str(error)) from None


def _tell(error: CheckpointError, failed: Callable[[CheckpointError], None] | None) -> None:
    if failed is None:
        raise error
    failed(error)
