"""The parts of an adapted layer alone, on LLaMA-7B's widest output: what each takes beside the bytes it has to move.

They say which part a step's time is in, and which form or tile of it is the best one; nothing here is a contender.
Shape suffixes: O = out features, I = in features, R = rank, T = tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from experiments.gpu import lab
from experiments.gpu.child import kernels_are_right
from experiments.gpu.visit import Visit

ONTO = ((128, 128, 8), (128, 128, 4), (64, 128, 4), (128, 64, 4), (64, 256, 8), (64, 64, 4))  # tokens, outputs, warps
BACK = ((32, 128, 4, 4), (32, 128, 1, 4), (16, 256, 4, 4), (16, 512, 4, 8), (64, 64, 4, 4), (8, 512, 16, 4))


def run(visit: Visit) -> None:
    """All parts; seconds, bytes and their share of the copy ceiling."""
    tokens, (out, width), rank = 32 if visit.cpu else 4096, visit.size.shapes()["up_proj"], visit.size.rank
    narrow, kernels, make = lab.narrow, kernels_are_right(visit), lambda *shape: _random(visit, *shape)
    x_TI, G_TO, y_TO, W_OI = make(tokens, width), make(tokens, out), make(tokens, out), make(out, width)
    h_TR, A_RI, B_OR = make(tokens, rank).float(), make(rank, width).float(), make(out, rank).float() * 1e-3
    g_O = 1 + 1e-3 * torch.randn(out, device=visit.device)
    A_KI, h_TK, B_OK = narrow._factor(A_RI, x_TI.dtype, 0), narrow._activation(h_TR, x_TI.dtype), None
    B_OK = narrow._factor(B_OR, x_TI.dtype, 1)
    output, entry = y_TO.nbytes, x_TI.nbytes

    def part(name: str, moved: float, step: Callable[[], Any]) -> None:
        visit.cell("passes", name, 0.3, lambda: _timed(visit, moved, step))

    part("dense x W^T", output + entry + W_OI.nbytes, lambda: x_TI @ W_OI.t())
    part("dense G W", output + entry + W_OI.nbytes, lambda: G_TO @ W_OI)
    part("h = x A^T", entry, lambda: narrow._product(x_TI, A_KI[rank:].t()))
    part("dh = G B", output, lambda: narrow._product(G_TO, B_OK[:, rank:]))
    part("dB = G^T h", output, lambda: narrow._product(G_TO.t(), h_TK[:, : 2 * rank]))
    part("dA = dh^T x", entry, lambda: narrow._product(h_TK[:, : 2 * rank].t(), x_TI))
    part("W A^T", W_OI.nbytes, lambda: narrow.by_factor(W_OI, A_RI))
    part("dx += dh A", 2 * entry, lambda: x_TI.addmm_(h_TK, A_KI, alpha=1e-6))
    part("parts of A", A_RI.nbytes + A_KI.nbytes, lambda: narrow._factor(A_RI, x_TI.dtype, 0))
    part("parts of h", h_TR.nbytes + h_TK.nbytes, lambda: narrow._activation(h_TR, x_TI.dtype))
    part("onto, LoRA, eager", 2 * output, lambda: narrow._onto(y_TO, None, h_TR, B_OR, None, None, 1e-3))
    part("onto, eager", 2 * output, lambda: narrow._onto(y_TO, None, h_TR, B_OR, g_O, None, 1e-3))
    part("y g", 2 * output, lambda: torch.mul(y_TO, g_O, out=y_TO))
    for columns in (16, 32, 64, 128, 0):
        part(f"back, eager, {columns}", 3 * output, lambda columns=columns: _eager_back(G_TO, y_TO, g_O, columns))
    part("back, rounded products", 3 * output, lambda: (G_TO * g_O, (G_TO * y_TO).sum(0, dtype=torch.float32)))
    if kernels:
        from dora_lab.methods import narrow_triton as fused

        for tile in ONTO:
            part(f"onto {tile}", 2 * output, lambda tile=tile: _onto(fused, tile, y_TO, None, h_TR, B_OR, g_O))
        part("onto, LoRA", 2 * output, lambda: _onto(fused, ONTO[0], y_TO, None, h_TR, B_OR, None))
        part("onto, second", 4 * output, lambda: _onto(fused, ONTO[0], y_TO, G_TO, h_TR, B_OR, g_O))
        for tile in BACK:
            part(f"back {tile}", 3 * output, lambda tile=tile: _back(fused, tile, G_TO, y_TO, g_O))


def _timed(visit: Visit, moved: float, step: Callable[[], Any]) -> dict[str, Any]:
    found = visit.took(step, warm=2, rounds=15)
    rate = moved / found["seconds"]
    return found | {"bytes": moved, "gbps": rate / 1e9, "share": visit.share("copy", moved, found["seconds"])}


def _random(visit: Visit, *shape: int) -> Tensor:
    return torch.randn(*shape, device=visit.device, dtype=torch.bfloat16)


def _eager_back(G_TO: Tensor, y_TO: Tensor, g_O: Tensor, columns: int) -> None:
    kept, lab.narrow.SUM_WIDTH = lab.narrow.SUM_WIDTH, columns
    try:
        lab.narrow._back(G_TO, y_TO, g_O)
    finally:
        lab.narrow.SUM_WIDTH = kept


def _onto(
    fused: Any, tile: tuple[int, ...], y: Tensor, z: Tensor | None, h: Tensor, B: Tensor, g: Tensor | None
) -> None:
    fused.TILE_T, fused.TILE_O, fused.WARPS = tile
    fused.onto(y, z, h, B, g, None, 1e-3)
    fused.TILE_T, fused.TILE_O, fused.WARPS = ONTO[0]


def _back(fused: Any, tile: tuple[int, ...], G: Tensor, y: Tensor, g: Tensor) -> None:
    fused.BACK_T, fused.BACK_O, fused.BACK_STEPS, fused.BACK_WARPS = tile
    fused.back(G, y, g)
    fused.BACK_T, fused.BACK_O, fused.BACK_STEPS, fused.BACK_WARPS = BACK[0]
