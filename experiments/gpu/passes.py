"""The parts of an adapted layer alone, on LLaMA-7B's widest output: what each takes beside the bytes it has to move.

They say which part a step's time is in, and which tile of a kernel is the best one; nothing here is a contender.
Shape suffixes: O = out features, I = in features, R = rank, T = tokens, K = 3 R, L = 2 R.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_lab.methods import narrow_eager
from experiments.gpu import lab
from experiments.gpu.visit import Visit

TILES = {
    "ONTO": ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8)),
    "BACK": ((64, 64, 4, 4), (32, 128, 1, 4), (32, 128, 4, 4), (64, 128, 2, 8)),
}


def run(visit: Visit) -> None:
    """All parts; seconds, bytes and their share of the copy ceiling."""
    tokens, (out, width), rank = 32 if visit.cpu else 4096, visit.size.shapes()["up_proj"], visit.size.rank
    kernels, product, make = lab.narrow.kernels(_random(visit, 1)), narrow_eager.product, _random
    x_TI, G_TO, y_TO, W_OI = (
        make(visit, *shape) for shape in ((tokens, width), (tokens, out), (tokens, out), (out, width))
    )
    A_RI, B_OR = make(visit, rank, width).float(), make(visit, out, rank).float() * 1e-3
    g_O = 1 + 1e-3 * torch.randn(out, device=visit.device)
    dtype, both_TL = x_TI.dtype, make(visit, tokens, 2 * rank).float()
    A_KI, B_OK, h_TK = (
        narrow_eager.factor(A_RI, dtype),
        narrow_eager.gained(B_OR, dtype, 1.0),
        narrow_eager.activation(both_TL, dtype, 1.0),
    )
    output, entry = y_TO.nbytes, x_TI.nbytes

    def part(name: str, moved: float, step: Callable[[], Any]) -> None:
        visit.cell("passes", name, 0.3, lambda: _timed(visit, moved, step))

    def tiled(name: str, what: str, moved: float, step: Callable[[], Any]) -> None:
        kept = getattr(kernels, what, ())
        for tile in TILES[what] if kernels else ():
            setattr(kernels, what, tile)
            part(f"{name} {tile}", moved, step)
        if kernels:
            setattr(kernels, what, kept)

    part("dense x W^T", output + entry + W_OI.nbytes, lambda: x_TI @ W_OI.t())
    part("dense G W", output + entry + W_OI.nbytes, lambda: G_TO @ W_OI)
    part("h = x A^T", entry, lambda: product(x_TI, A_KI[rank:].t()))
    part("dh = G B", output, lambda: product(G_TO, B_OK[:, rank:]))
    part("dB = G^T h", output, lambda: product(G_TO.t(), h_TK[:, : 2 * rank]))
    part("dA = dh^T x", entry, lambda: product(h_TK[:, : 2 * rank].t(), x_TI))
    part("W A^T", W_OI.nbytes, lambda: product(W_OI, A_KI[rank:].t()))
    part("dx += dh A", 2 * entry, lambda: x_TI.addmm_(h_TK, A_KI, alpha=1e-6))
    part("y += h B, LoRA", 2 * output, lambda: y_TO.addmm_(h_TK, B_OK.t(), alpha=1e-6))
    part("parts of A", A_RI.nbytes + A_KI.nbytes, lambda: narrow_eager.factor(A_RI, dtype))
    part("parts of B", B_OR.nbytes + B_OK.nbytes, lambda: narrow_eager.gained(B_OR, dtype, g_O))
    part("parts of h", both_TL.nbytes + h_TK.nbytes, lambda: narrow_eager.activation(both_TL, dtype, 1.0))
    part("onto", 2 * output, lambda: narrow_eager.onto(y_TO, None, h_TK, B_OK, g_O, None, 1.0))
    part("onto, second", 3 * output, lambda: narrow_eager.onto(y_TO, G_TO, h_TK, B_OK, g_O, None, 1.0))
    part("back", 3 * output, lambda: narrow_eager.back(G_TO, y_TO, None, g_O))
    part("G g", 2 * output, lambda: torch.mul(G_TO, g_O, out=y_TO))
    part("sum G y", 2 * output, lambda: narrow_eager.along(G_TO, y_TO))
    part("A A^T", A_RI.nbytes, lambda: A_RI @ A_RI.t())
    if kernels is None:
        return
    tiled("onto, kernel", "ONTO", 2 * output, lambda: kernels.onto(y_TO, None, h_TK, B_OK, g_O, None, 1e-3))
    part("onto, second, kernel", 3 * output, lambda: kernels.onto(y_TO, G_TO, h_TK, B_OK, g_O, None, 1e-3))
    tiled("back, kernel", "BACK", 3 * output, lambda: kernels.back(G_TO, y_TO, None, g_O))


def _timed(visit: Visit, moved: float, step: Callable[[], Any]) -> dict[str, Any]:
    found = visit.took(step, warm=2, rounds=15)
    rate = moved / found["seconds"]
    return found | {"bytes": moved, "gbps": rate / 1e9, "share": visit.share("copy", moved, found["seconds"])}


def _random(visit: Visit, *shape: int) -> Tensor:
    return torch.randn(*shape, device=visit.device, dtype=torch.bfloat16)
