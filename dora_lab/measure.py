"""ΔM and ΔD between saved models: what `dora-lab probe` computes, a row per matrix and checkpoint.

Columns of a row (o = one output feature; with ``axis="in"`` one input feature):

- delta_m: mean |m_o - m0_o| (equation 3), in the units of the weight; delta_m_share: the same over the mean m0;
- delta_d: mean 1 - cos of the angle between W_o and W0_o (equation 4), in [0, 2];
- relative_change: Frobenius norm of W - W0 over that of W0;
- grown: share of the magnitudes that grew; delta_d_p10, _p50, _p90: quantiles over the outputs;
- undirected: outputs that are zero in W or W0 and so have no direction, left out of delta_d;

and with `dynamics`, from singular values of matrices that are built whole for it:

- effective_rank: exp of the entropy of the singular values of W - W0 over their sum (Roy and Vetterli 2007);
- sigma_1 .. sigma_3: its largest singular values over the largest of W0;
- intruders: of the 10 first left singular vectors of W, those whose |cos| with every one of W0 is below 0.5
  (Shuttleworth et al. 2024, arXiv 2410.21228).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dora_lab.checkpoints.pairs import Pair, pairs, steps_of
from dora_lab.checkpoints.shards import Shards
from dora_lab.decompose import change
from dora_lab.files import CheckpointError

FIRST, OVERLAP = 10, 0.5  # of the intruder count


def probe(
    base: Path,
    tuned: Sequence[Path],
    *,
    axis: str = "out",
    kinds: Sequence[str] = (),
    dynamics: bool = False,
    allow_pickle: bool = False,
    failed: Callable[[CheckpointError], None] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Rows of every matrix of every tuned model, as they are known.

    failed: takes the error of one tuned model that cannot be used, and the others go on; None: it is raised.

    Raises CheckpointError for a base that cannot be read, ValueError for an unknown axis.
    """
    weights = Shards(Path(base))
    for path in map(Path, tuned):
        try:
            for step, folder in steps_of(path):
                for pair in pairs(weights, folder, kinds, allow_pickle=allow_pickle):
                    progress(f"{folder.name} {pair.module}")
                    names = {"tuned": str(path), "step": step, **_place(pair.module)}
                    yield names | _numbers(pair, axis) | (_dynamics(pair) if dynamics else {})
        except CheckpointError as error:
            if failed is None:
                raise
            failed(error)


def _place(module: str) -> dict[str, Any]:
    parts = module.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    return {"module": module, "layer": layer, "kind": parts[-1]}


def _numbers(pair: Pair, axis: str) -> dict[str, Any]:
    across = {"out": "in", "in": "out"}
    seen = change(pair.blocks, axis=across.get(axis, axis) if pair.transposed else axis)
    known = seen.delta_d[~seen.delta_d.isnan()]
    quantiles = torch.quantile(known, torch.tensor([0.1, 0.5, 0.9], dtype=known.dtype)) if len(known) else None
    whole = seen.norm0.square().sum().sqrt().item()
    return {
        "axis": axis,
        "delta_m": seen.delta_m.abs().mean().item(),
        "delta_m_share": seen.delta_m.abs().mean().item() / seen.norm0.mean().item() if whole else None,
        "delta_d": known.mean().item() if len(known) else None,
        "relative_change": seen.square.sum().sqrt().item() / whole if whole else None,
        "grown": (seen.delta_m > 0).double().mean().item(),
        **{f"delta_d_p{p}": None if quantiles is None else quantiles[i].item() for i, p in enumerate((10, 50, 90))},
        "undirected": len(seen.delta_d) - len(known),
    }


def _dynamics(pair: Pair) -> dict[str, Any]:
    parts = list(pair.blocks())
    W0, E = (torch.cat(side) for side in zip(*parts, strict=True))
    if pair.transposed:
        W0, E = W0.t(), E.t()
    sigma = torch.linalg.svdvals(E).double()
    left0, sigma0, _ = torch.linalg.svd(W0, full_matrices=False)
    left = torch.linalg.svd(W0 + E, full_matrices=False)[0][:, :FIRST]
    share = sigma / sigma.sum() if sigma.sum() > 0 else sigma
    entropy = -(share * share.clamp_min(1e-300).log()).sum().item()
    top = [(value / sigma0[0]).item() if sigma0[0] > 0 else None for value in sigma[:3]]
    nearest = (left.t() @ left0).abs().max(dim=1).values
    return {
        "effective_rank": math.exp(entropy) if sigma.sum() > 0 else 0.0,
        **{f"sigma_{i + 1}": top[i] if i < len(top) else None for i in range(3)},
        "intruders": int((nearest < OVERLAP).sum()),
    }
