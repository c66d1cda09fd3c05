"""The norms of a base's matrices, from its files: all that `report.law` needs of a model that nobody has tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dora_lab.decompose import dots
from dora_lab.probing.matrices import Base
from dora_lab.probing.saved_models import blocks


def norms(
    base: Path, progress: Callable[[int, int, str], None] = lambda done, total, text: None
) -> Iterator[dict[str, Any]]:
    """A row per matrix, embeddings and the head left out: module, layer, kind, norm (mean |w| over outputs), inputs.

    Raises CheckpointError as `Base` does, and for a base that does not say which way its weights lie.
    """
    weights = Base(base)
    wanted = [matrix for matrix in weights.known() if matrix.name not in weights.words and matrix.expert in (None, 0)]
    for done, matrix in enumerate(wanted):
        progress(done, len(wanted), matrix.module)
        along = 0 if matrix.transposed else 1
        squares = [dots(W0, W0, along) for _, W0 in blocks(weights, matrix, False)]
        square_O = torch.cat(squares) if along else torch.stack(squares).sum(0)
        parts = matrix.module.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), None)
        norm = square_O.sqrt().mean().item()
        yield {"module": matrix.module, "layer": layer, "kind": parts[-1], "norm": norm, "inputs": matrix.shape[1]}
