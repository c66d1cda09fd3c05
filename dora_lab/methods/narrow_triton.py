"""What a `narrow.Narrow` layer computes beside matrix products, in few kernels of Triton: each as in `narrow_eager`.

Starting a kernel takes the processor longer than many a kernel takes the device, and one of Triton's about as long as
two or three of torch's: so a kernel here does all that can be done at its time, for A and for B. A pass over outputs
reads and writes each once, with float32 between; sums are added up in a fixed order, where atomic ones would differ
from run to run. What is rare is decided by the kernel itself, for its own rows: rows whose m is zero or whose V is
small beside W0. So nothing waits for the device.
Shape suffixes: as in `narrow`.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_lab.methods.narrow_eager import Parts, product

ONTO = (64, 64, 4)  # tokens and outputs of a program, warps
BACK = (64, 64, 4, 4)  # the same, with the steps that a program takes down the tokens before the warps
NORM = (32, 128, 8)  # outputs, inputs at a time of a close look, warps
TILE = 1024  # numbers of a program that goes through them one by one
CANCELS = tl.constexpr(1e-2)  # share of ||W0||^2 below which the expanded square has lost digits: `dora.CANCELS_ON`


@triton.jit
def _gain(m, norm, at, inside):
    length = tl.load(norm + at, mask=inside, other=1.0)
    return tl.where(length == 0, 1.0, tl.div_rn(tl.load(m + at, mask=inside, other=1.0), length))


@triton.jit
def _part(value, at, place, inside, LOW_LAST: tl.constexpr):
    high = value.to(at.dtype.element_ty)
    low = (value - high.to(tl.float32)).to(at.dtype.element_ty)
    tl.store(at, high, mask=inside)
    tl.store(at + place, high if LOW_LAST else low, mask=inside)
    tl.store(at + 2 * place, low if LOW_LAST else high, mask=inside)


@triton.jit
def _activation(x, out, by, size, rank, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside, row, column = i < size, i // rank, i % rank
    at = x + row * 2 * rank + column
    value = (tl.load(at, mask=inside, other=0.0) + tl.load(at + rank, mask=inside, other=0.0)) * by
    _part(value, out + row * 3 * rank + column, rank, inside, False)


@triton.jit
def _factors(a, b, m, norm, a_out, b_out, g, by, a_size, b_size, rank, GAIN: tl.constexpr, TILE: tl.constexpr):
    of_a = tl.cdiv(a_size, TILE)
    if tl.program_id(0) < of_a:
        i = tl.program_id(0) * TILE + tl.arange(0, TILE)
        _part(tl.load(a + i, mask=i < a_size, other=0.0), a_out + i, a_size, i < a_size, True)
    else:
        j = (tl.program_id(0) - of_a) * TILE + tl.arange(0, TILE)
        inside, row, column = j < b_size, j // rank, j % rank
        value = tl.load(b + j, mask=inside, other=0.0) * by
        if GAIN:
            gain = _gain(m, norm, row, inside)
            tl.store(g + row, gain, mask=inside & (column == 0))
            value *= gain
        _part(value, b_out + row * 3 * rank + column, rank, inside, True)


@triton.jit
def _squares(w, a, b, o, s, width, inner, rank, w_row, w_column, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
             TILE_R: tl.constexpr):  # fmt: skip
    square, in_o = tl.zeros((TILE_O,), dtype=tl.float32), o[:, None] < width
    for start in range(0, inner, TILE_I):
        i = start + tl.arange(0, TILE_I)[None, :]
        at = w + o[:, None].to(tl.int64) * w_row + i.to(tl.int64) * w_column
        v = tl.load(at, mask=in_o & (i < inner), other=0.0).to(tl.float32)
        low = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        for first in range(0, rank, TILE_R):
            r = first + tl.arange(0, TILE_R)
            a_tile = tl.load(a + r[:, None] * inner + i, mask=(r[:, None] < rank) & (i < inner), other=0.0)
            b_tile = tl.load(b + o[:, None] * rank + r[None, :], mask=in_o & (r[None, :] < rank), other=0.0)
            low = tl.dot(b_tile, a_tile, low, input_precision="ieee")
        v += low * s
        square += tl.sum(v * v, axis=1)
    return square


@triton.jit
def _norm(w, a, b, wa, aa, whole, m, norm, g, out, s, by, width, inner, rank, w_row, w_column, GAIN: tl.constexpr,
          TILE_O: tl.constexpr, TILE_I: tl.constexpr, TILE_R: tl.constexpr):  # fmt: skip
    o, tile = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O), tl.arange(0, TILE_R)
    in_o = o < width
    start = tl.load(whole + o, mask=in_o, other=0.0)
    square = tl.zeros((TILE_O,), dtype=tl.float32)
    for first in range(0, rank, TILE_R):
        r = first + tile[None, :]
        inside = in_o[:, None] & (r < rank)
        across = tl.zeros((TILE_O, TILE_R), dtype=tl.float32)
        for other in range(0, rank, TILE_R):
            k = other + tile
            b_tile = tl.load(b + o[:, None] * rank + k[None, :], mask=in_o[:, None] & (k[None, :] < rank), other=0.0)
            aa_tile = tl.load(aa + k[:, None] * rank + r, mask=(k[:, None] < rank) & (r < rank), other=0.0)
            across = tl.dot(b_tile, aa_tile, across, input_precision="ieee")
        at = wa + o[:, None] * 2 * rank + r
        both = tl.load(at, mask=inside, other=0.0) + tl.load(at + rank, mask=inside, other=0.0)
        b_here = tl.load(b + o[:, None] * rank + r, mask=inside, other=0.0)
        square += tl.sum((2 * s * both + s * s * across) * b_here, axis=1)
    square += start
    near = (start > 0) & ((square > CANCELS * start) == 0)
    if tl.max(near.to(tl.int32), axis=0) > 0:
        square = tl.where(near, _squares(w, a, b, o, s, width, inner, rank, w_row, w_column, TILE_O, TILE_I, TILE_R),
                          square)  # fmt: skip
    length = tl.sqrt_rn(tl.where(square < 0, 0.0, square))
    tl.store(norm + o, length, mask=in_o)
    if GAIN:
        gain = tl.where(length == 0, 1.0, tl.div_rn(tl.load(m + o, mask=in_o, other=1.0), length))
        tl.store(g + o, gain, mask=in_o)
        for first in range(0, rank, TILE_R):
            r = first + tile[None, :]
            inside = in_o[:, None] & (r < rank)
            value = tl.load(b + o[:, None] * rank + r, mask=inside, other=0.0) * by * gain[:, None]
            _part(value, out + o[:, None] * 3 * rank + r, rank, inside, True)


@triton.jit
def _onto(y, z, h, b, g, bias, by, tokens, width, parts, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
          TILE_T: tl.constexpr, TILE_O: tl.constexpr, TILE_K: tl.constexpr):  # fmt: skip
    o, t = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O), tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    in_t, in_o = t[:, None] < tokens, o[None, :] < width
    offset = t[:, None].to(tl.int64) * width + o[None, :]
    value = tl.load(y + offset, mask=in_t & in_o, other=0.0).to(tl.float32)
    low = tl.zeros((TILE_T, TILE_O), dtype=tl.float32)
    for start in range(0, parts, TILE_K):
        k = start + tl.arange(0, TILE_K)
        h_tile = tl.load(h + t[:, None] * parts + k[None, :], mask=in_t & (k[None, :] < parts), other=0.0)
        b_tile = tl.load(b + o[None, :] * parts + k[:, None], mask=in_o & (k[:, None] < parts), other=0.0)
        low = tl.dot(h_tile, b_tile, low)
    gain = tl.load(g + o, mask=o < width, other=1.0)[None, :]
    if HAS_Z:
        value += (gain - 1) * tl.load(z + offset, mask=in_t & in_o, other=0.0).to(tl.float32)
    else:
        value *= gain
        if HAS_BIAS:
            value += (1 - gain) * tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, (value + low * by).to(y.dtype.element_ty), mask=in_t & in_o)


@triton.jit
def _back(grad, value, bias, g, moved, sums, less, tokens, width, HAS_BIAS: tl.constexpr, TILE_T: tl.constexpr,
          TILE_O: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    gain = tl.load(g + o, mask=o < width, other=1.0)[None, :] - less
    total = tl.zeros((TILE_O,), dtype=tl.float32)
    for step in range(STEPS):
        t = (tl.program_id(1) * STEPS + step) * TILE_T + tl.arange(0, TILE_T)
        inside = (t[:, None] < tokens) & (o[None, :] < width)
        offset = t[:, None].to(tl.int64) * width + o[None, :]
        grad_tile = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        value_tile = tl.load(value + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value_tile -= tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
        tl.store(moved + offset, (grad_tile * gain).to(moved.dtype.element_ty), mask=inside)
        total += tl.sum(grad_tile * value_tile, axis=0)
    tl.store(sums + tl.program_id(1) * width + o, total, mask=o < width)


@triton.jit
def _halves(x, out, pid, size, TILE: tl.constexpr):
    i = pid * TILE + tl.arange(0, TILE)
    value = tl.load(x + i, mask=i < size, other=0.0) + tl.load(x + size + i, mask=i < size, other=0.0)
    tl.store(out + i, value, mask=i < size)


@triton.jit
def _sums(raw, halves, db, da, s, a_size, b_size, rank, TILE: tl.constexpr):
    of_a = tl.cdiv(a_size, TILE)
    if tl.program_id(0) < of_a:
        _halves(halves, da, tl.program_id(0), a_size, TILE)
    else:
        j = (tl.program_id(0) - of_a) * TILE + tl.arange(0, TILE)
        at = raw + j // rank * 2 * rank + j % rank
        value = tl.load(at, mask=j < b_size, other=0.0) + tl.load(at + rank, mask=j < b_size, other=0.0)
        tl.store(db + j, value * s, mask=j < b_size)


@triton.jit
def _rows(sums, raw, halves, b, m, norm, g, db, da, dm, grad, x, w, s, pieces, tokens, width, inner, rank, w_row,
          w_column, OF_BASE: tl.constexpr, TILE_O: tl.constexpr, TILE_R: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    of_b = tl.cdiv(width, TILE_O)
    if tl.program_id(0) < of_b:
        _rows_of_b(sums, raw, b, m, norm, g, db, dm, grad, x, w, s, pieces, tokens, width, inner, rank, w_row, w_column,
                   OF_BASE, TILE_O, TILE_R)  # fmt: skip
    else:
        _halves(halves, da, tl.program_id(0) - of_b, rank * inner, TILE)


@triton.jit
def _rows_of_b(sums, raw, b, m, norm, g, db, dm, grad, x, w, s, pieces, tokens, width, inner, rank, w_row, w_column,
               OF_BASE: tl.constexpr, TILE_O: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    in_o, tile = o < width, tl.arange(0, TILE)
    gain = tl.load(g + o, mask=in_o, other=1.0) * s
    along = tl.zeros((TILE_O,), dtype=tl.float32)
    for start in range(0, rank, TILE):
        r = start + tile[None, :]
        inside = in_o[:, None] & (r < rank)
        at = raw + o[:, None] * 2 * rank + r
        both = tl.load(at, mask=inside, other=0.0) + tl.load(at + rank, mask=inside, other=0.0)
        along += s * tl.sum(both * tl.load(b + o[:, None] * rank + r, mask=inside, other=0.0), axis=1)
        tl.store(db + o[:, None] * rank + r, both * gain[:, None], mask=inside)
    total = tl.zeros((TILE_O,), dtype=tl.float32)
    for piece in range(pieces):
        total += tl.load(sums + piece * width + o, mask=in_o, other=0.0)
    length, per = tl.load(norm + o, mask=in_o, other=1.0), tl.load(m + o, mask=in_o, other=1.0)
    if OF_BASE:
        total, per = total + along, length
    else:
        lost = per == 0
        if tl.max(lost.to(tl.int32), axis=0) > 0:  # y says nothing of these rows: sum_t dy x W0^T
            base = _along_base(grad, x, w, o, tokens, width, inner, w_row, w_column, TILE_O, TILE)
            total = tl.where(lost, base + along, total)
        per = tl.where(lost, length, per)
    tl.store(dm + o, tl.where(length == 0, 0.0, total / per), mask=in_o)


@triton.jit
def _along_base(grad, x, w, o, tokens, width, inner, w_row, w_column, TILE_O: tl.constexpr, TILE: tl.constexpr):
    in_o, tile = o[None, :] < width, tl.arange(0, TILE)
    base = tl.zeros((TILE_O,), dtype=tl.float32)
    for start in range(0, tokens, TILE):
        t = start + tile[:, None]
        product = tl.zeros((TILE, TILE_O), dtype=tl.float32)
        for first in range(0, inner, TILE):
            i = first + tile
            x_tile = tl.load(x + t.to(tl.int64) * inner + i[None, :], mask=(t < tokens) & (i[None, :] < inner),
                             other=0.0)  # fmt: skip
            at = w + o[None, :].to(tl.int64) * w_row + i[:, None].to(tl.int64) * w_column
            w_tile = tl.load(at, mask=in_o & (i[:, None] < inner), other=0.0)
            product = tl.dot(x_tile, w_tile, product)
        offset = t.to(tl.int64) * width + o[None, :]
        grad_tile = tl.load(grad + offset, mask=(t < tokens) & in_o, other=0.0)
        base += tl.sum(product * grad_tile.to(tl.float32), axis=0)
    return base


def activation(both_TL: Tensor, dtype: torch.dtype, by: float) -> Tensor:
    tokens, rank = both_TL.shape[0], both_TL.shape[1] // 2
    out_TK = both_TL.new_empty(tokens, 3 * rank, dtype=dtype)
    with _on(both_TL):
        _activation[(triton.cdiv(tokens * rank, TILE),)](both_TL, out_TK, by, tokens * rank, rank, TILE=TILE)
    return out_TK


def factors(
    A_RI: Tensor, B_OR: Tensor, dtype: torch.dtype, by: float, s: float, m_O: Tensor | None, norm_O: Tensor | None,
    alive: bool,
) -> Parts:  # fmt: skip
    (rank, inner), width, A_RI, B_OR = A_RI.shape, len(B_OR), A_RI.contiguous(), B_OR.contiguous()
    A_KI, B_OK = A_RI.new_empty(3 * rank, inner, dtype=dtype), B_OR.new_empty(width, 3 * rank, dtype=dtype)
    g_O = None if m_O is None else B_OR.new_empty(width)
    rest = (B_OR, B_OR, B_OR) if m_O is None else (m_O, norm_O, g_O)
    size, count = rank * inner, rank * width
    with _on(A_RI):
        _factors[(triton.cdiv(size, TILE) + triton.cdiv(count, TILE),)](
            A_RI, B_OR, rest[0], rest[1], A_KI, B_OK, rest[2], s * by, size, count, rank, GAIN=m_O is not None,
            TILE=TILE,
        )  # fmt: skip
    return Parts(A_KI, B_OK, g_O)


def normed(
    W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, square_O: Tensor, s: float, by: float, m_O: Tensor | None
) -> tuple[Tensor, Parts | None]:
    """(||W0 + s B A|| of each row, (out,), float32; with m the parts of A and B as well). W0 is narrow.

    The norm is of the expanded square, and of V itself where that is small beside ||W0||^2, `square_O`.
    """
    (rank, inner), (width, dtype) = A_RI.shape, (len(B_OR), W_OI.dtype)
    A_RI, B_OR, size = A_RI.contiguous(), B_OR.contiguous(), rank * inner
    A_KI, norm_O, (tile_o, tile_i, warps) = A_RI.new_empty(3 * rank, inner, dtype=dtype), B_OR.new_empty(width), NORM
    g_O, B_OK = torch.empty_like(norm_O), A_KI if m_O is None else B_OR.new_empty(width, 3 * rank, dtype=dtype)
    with _on(A_RI):
        _factors[(triton.cdiv(size, TILE),)](A_RI, B_OR, B_OR, B_OR, A_KI, A_KI, B_OR, 1.0, size, 0, rank, GAIN=False,
                                            TILE=TILE)  # fmt: skip
        WA_OL, AA_RR = product(W_OI, A_KI[rank:].t()), A_RI @ A_RI.t()
        _norm[(triton.cdiv(width, tile_o),)](
            W_OI, A_RI, B_OR, WA_OL, AA_RR, square_O, norm_O if m_O is None else m_O, norm_O, g_O, B_OK, s, s * by,
            width, inner, rank, W_OI.stride(0), W_OI.stride(1), GAIN=m_O is not None, TILE_O=tile_o, TILE_I=tile_i,
            TILE_R=16 if rank <= 16 else 32, num_warps=warps,
        )  # fmt: skip
    return norm_O, None if m_O is None else Parts(A_KI, B_OK, g_O)


def onto(
    y_TO: Tensor, z_TO: Tensor | None, h_TK: Tensor, B_OK: Tensor, g_O: Tensor, bias_O: Tensor | None, by: float
) -> None:
    (tokens, width), (tile_t, tile_o, warps) = y_TO.shape, ONTO
    with _on(y_TO):
        _onto[triton.cdiv(width, tile_o), triton.cdiv(tokens, tile_t)](
            y_TO, y_TO if z_TO is None else z_TO, h_TK, B_OK, g_O, g_O if bias_O is None else bias_O, by, tokens, width,
            h_TK.shape[1], HAS_Z=z_TO is not None, HAS_BIAS=bias_O is not None, TILE_T=tile_t, TILE_O=tile_o,
            TILE_K=32, num_warps=warps,
        )  # fmt: skip


def back(G_TO: Tensor, value_TO: Tensor, bias_O: Tensor | None, g_O: Tensor, less: int = 0) -> tuple[Tensor, Tensor]:
    (tokens, width), (tile_t, tile_o, steps, warps) = G_TO.shape, BACK
    grid = (triton.cdiv(width, tile_o), triton.cdiv(tokens, tile_t * steps))
    moved_TO, sums_PO = torch.empty_like(G_TO), g_O.new_empty(grid[1], width)
    with _on(G_TO):
        _back[grid](G_TO, value_TO.contiguous(), g_O if bias_O is None else bias_O, g_O, moved_TO, sums_PO, less,
                    tokens, width, HAS_BIAS=bias_O is not None, TILE_T=tile_t, TILE_O=tile_o, STEPS=steps,
                    num_warps=warps)  # fmt: skip
    return moved_TO, sums_PO


def sums(raw_OL: Tensor, halves_LI: Tensor, s: float) -> tuple[Tensor, Tensor]:
    (width, both), inner = raw_OL.shape, halves_LI.shape[1]
    rank = both // 2
    dA_RI, dB_OR, size, count = raw_OL.new_empty(rank, inner), raw_OL.new_empty(width, rank), rank * inner, rank * width
    with _on(raw_OL):
        _sums[(triton.cdiv(size, TILE) + triton.cdiv(count, TILE),)](raw_OL, halves_LI, dB_OR, dA_RI, s, size, count,
                                                                     rank, TILE=TILE)  # fmt: skip
    return dA_RI, dB_OR


def rows(
    sums_PO: Tensor, raw_OL: Tensor, halves_LI: Tensor, B_OR: Tensor, m_O: Tensor, norm_O: Tensor, parts: Parts,
    of_base: bool, G_TO: Tensor, x_TI: Tensor, W_OI: Tensor, s: float, alive: bool, steady: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (width, rank), (tokens, inner) = B_OR.shape, x_TI.shape
    dA_RI, dB_OR, dm_O = B_OR.new_empty(rank, inner), B_OR.new_empty(width, rank), torch.empty_like(m_O)
    with _on(G_TO):
        _rows[(triton.cdiv(width, 32) + triton.cdiv(rank * inner, TILE),)](
            sums_PO, raw_OL, halves_LI, B_OR.contiguous(), m_O, norm_O, parts.g_O, dB_OR, dA_RI, dm_O, G_TO,
            x_TI.contiguous(), W_OI, s, len(sums_PO), tokens, width, inner, rank, W_OI.stride(0), W_OI.stride(1),
            OF_BASE=of_base, TILE_O=32, TILE_R=32, TILE=TILE,
        )  # fmt: skip
    return dA_RI, dB_OR, dm_O


def _on(tensor: Tensor) -> Any:
    """Triton starts a kernel on the device that is current, whatever its tensors are on; mostly it is theirs."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
