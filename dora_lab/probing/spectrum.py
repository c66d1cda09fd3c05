"""Singular values and vectors of a change: its effective rank, its largest values, the directions that are new.

Definitions are in `measure`. Shape suffixes: O = out features, I = in features, R = rank, K = leading directions.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from dora_lab.formats.shards import Shards
from dora_lab.probing.matrices import Matrix
from dora_lab.probing.pairs import LowRank, Update

FIRST, OVERLAP = 10, 0.5  # of the intruder count


class Dynamics:
    """The base matrix with its decomposition, made once for all that was tuned from it; whole in memory."""

    def __init__(self, base: Shards, matrix: Matrix) -> None:
        self.base, self.matrix = base, matrix

    @cached_property
    def stored(self) -> Tensor:
        """W0 as stored, float32."""
        W0 = torch.empty(self.matrix.stored)
        self.base.fill(self.matrix.name, self.matrix.first, W0)
        return W0

    @cached_property
    def decomposed(self) -> tuple[Tensor, float]:
        """(left singular vectors of W0 (out, ...), its largest singular value)."""
        left, sigma, _ = torch.linalg.svd(self._seen(self.stored), full_matrices=False)
        return left, sigma[0].item()

    def of(self, update: Update) -> dict[str, Any]:
        """The columns of `dynamics` of one update."""
        E_OI = self._seen(self._difference(update))
        if isinstance(update, LowRank) and update.magnitude is None:
            sigma = _factored(update.left, update.right, update.scaling)
        else:
            sigma = torch.linalg.svdvals(E_OI).double()
        left0, largest = self.decomposed
        share = sigma / sigma.sum() if sigma.sum() > 0 else sigma
        entropy = -(share * share.clamp_min(1e-300).log()).sum().item()
        top = [(value / largest).item() if largest > 0 else None for value in sigma[:3]]
        nearest = (_leading(self._seen(self.stored) + E_OI).t() @ left0).abs().max(dim=1).values
        return {
            "effective_rank": math.exp(entropy) if sigma.sum() > 0 else 0.0,
            **{f"sigma_{i + 1}": top[i] if i < len(top) else None for i in range(3)},
            "intruders": int((nearest < OVERLAP).sum()),
        }

    def _seen(self, stored: Tensor) -> Tensor:
        return stored.t() if self.matrix.transposed else stored

    def _difference(self, update: Update) -> Tensor:
        """W - W0 as stored."""
        E = update.difference(0, self.stored, torch.empty_like(self.stored))
        if isinstance(update, LowRank) and update.magnitude is not None:
            V, along = self.stored + E, int(not self.matrix.transposed)
            norm_O = torch.linalg.vector_norm(V, dim=along, dtype=torch.float64)
            grown_O = torch.where(norm_O > 0, update.magnitude.double() / norm_O - 1, 0.0).to(E.dtype)
            E.addcmul_(V, grown_O.unsqueeze(along))
        return E


def _factored(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Singular values of s left right, exactly, from those of a matrix (R, R)."""
    first = torch.linalg.qr(left.double())[1]
    second = torch.linalg.qr(right.double().t())[1]
    return torch.linalg.svdvals(first @ second.t()) * abs(scaling)


def _leading(W_OI: Tensor) -> Tensor:
    """The first left singular vectors, (out, K)."""
    if min(W_OI.shape) <= 4 * FIRST:
        return torch.linalg.svd(W_OI, full_matrices=False)[0][:, :FIRST]
    start = np.ones(min(W_OI.shape), dtype=np.float32)  # the same every time
    return torch.from_numpy(svds(W_OI.numpy(), k=FIRST, v0=start)[0].copy())
