"""What a `narrow.Narrow` layer computes beside matrix products, as Triton kernels; `narrow_eager` says what each is.

A pass over outputs reads and writes each once, with float32 between; sums are added up in a fixed order, where atomic
ones would differ from run to run. What is rare is decided by the kernel itself, for its own rows: rows whose m is zero
or whose V is small beside W0. So nothing waits for the device.
Shape suffixes: as in `narrow`.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONTO = (64, 64, 4)  # tokens and outputs of a program, warps
BACK = (64, 64, 4, 4)  # the same, with the steps that a program takes down the tokens before the warps
NORM = (32, 128, 8)  # outputs, inputs at a time, warps
CANCELS = tl.constexpr(1e-2)  # share of ||W0||^2 below which the two parts of B and A are too few digits of V


@triton.jit
def _gain(m, norm, at, inside):
    length = tl.load(norm + at, mask=inside, other=1.0)
    return tl.where(length == 0, 1.0, tl.div_rn(tl.load(m + at, mask=inside, other=1.0), length))


@triton.jit
def _parts(x, out, m, norm, by, count, columns, x_stride, out_stride, place, TWO: tl.constexpr, GAIN: tl.constexpr,
           LOW_LAST: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside, row, column = i < count, i // columns, i % columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if TWO:
        value += tl.load(x + row * x_stride + columns + column, mask=inside, other=0.0)
    value *= by
    if GAIN:
        value *= _gain(m, norm, row, inside)
    high = value.to(out.dtype.element_ty)
    low = (value - high.to(tl.float32)).to(out.dtype.element_ty)
    at = out + row * out_stride + column
    tl.store(at, high, mask=inside)
    tl.store(at + place, high if LOW_LAST else low, mask=inside)
    tl.store(at + 2 * place, low if LOW_LAST else high, mask=inside)


@triton.jit
def _onto(y, z, h, b, m, norm, bias, by, tokens, width, parts, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
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
    gain = _gain(m, norm, o, o < width)[None, :]
    if HAS_Z:
        value += (gain - 1) * tl.load(z + offset, mask=in_t & in_o, other=0.0).to(tl.float32)
    else:
        value *= gain
        if HAS_BIAS:
            value += (1 - gain) * tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offset, (value + low * by).to(y.dtype.element_ty), mask=in_t & in_o)


@triton.jit
def _back(grad, value, bias, m, norm, moved, sums, less, tokens, width, HAS_BIAS: tl.constexpr, TILE_T: tl.constexpr,
          TILE_O: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    gain = (_gain(m, norm, o, o < width) - less)[None, :]
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
def _rows(sums, raw, b, m, norm, db, dm, grad, x, w, s, pieces, tokens, width, inner, rank, OF_BASE: tl.constexpr,
          TILE_O: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    in_o, tile = o < width, tl.arange(0, TILE)
    gain = _gain(m, norm, o, in_o) * s
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
            base = tl.zeros((TILE_O,), dtype=tl.float32)
            for start in range(0, tokens, TILE):
                t = start + tile[:, None]
                product = tl.zeros((TILE, TILE_O), dtype=tl.float32)
                for first in range(0, inner, TILE):
                    i = first + tile
                    x_tile = tl.load(x + t.to(tl.int64) * inner + i[None, :],
                                     mask=(t < tokens) & (i[None, :] < inner), other=0.0)  # fmt: skip
                    w_tile = tl.load(w + o[None, :].to(tl.int64) * inner + i[:, None],
                                     mask=in_o[None, :] & (i[:, None] < inner), other=0.0)  # fmt: skip
                    product = tl.dot(x_tile, w_tile, product)
                offset = t.to(tl.int64) * width + o[None, :]
                grad_tile = tl.load(grad + offset, mask=(t < tokens) & in_o[None, :], other=0.0)
                base += tl.sum(product * grad_tile.to(tl.float32), axis=0)
            total = tl.where(lost, base + along, total)
        per = tl.where(lost, length, per)
    tl.store(dm + o, tl.where(length == 0, 0.0, total / per), mask=in_o)


@triton.jit
def _squares(w, a, b, o, s, lift, width, inner, rank, PARTS: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
             TILE_R: tl.constexpr):  # fmt: skip
    square, whole = tl.zeros((TILE_O,), dtype=tl.float32), tl.zeros((TILE_O,), dtype=tl.float32)
    in_o = o[:, None] < width
    for start in range(0, inner, TILE_I):
        i = start + tl.arange(0, TILE_I)[None, :]
        w_tile = tl.load(w + o[:, None].to(tl.int64) * inner + i, mask=in_o & (i < inner), other=0.0).to(tl.float32)
        low = tl.zeros((TILE_O, TILE_I), dtype=tl.float32)
        for first in range(0, rank, TILE_R):
            r = first + tl.arange(0, TILE_R)
            a_tile = tl.load(a + r[:, None] * inner + i, mask=(r[:, None] < rank) & (i < inner), other=0.0)
            b_tile = tl.load(b + o[:, None] * rank + r[None, :], mask=in_o & (r[None, :] < rank), other=0.0) * lift
            if PARTS:
                a_high, b_high = a_tile.to(w.dtype.element_ty), b_tile.to(w.dtype.element_ty)
                low = tl.dot(b_high, a_high, low)
                low = tl.dot((b_tile - b_high.to(tl.float32)).to(w.dtype.element_ty), a_high, low)
                low = tl.dot(b_high, (a_tile - a_high.to(tl.float32)).to(w.dtype.element_ty), low)
            else:
                low = tl.dot(b_tile, a_tile, low, input_precision="ieee")
        v = w_tile + low * (s / lift)
        square += tl.sum(v * v, axis=1)
        whole += tl.sum(w_tile * w_tile, axis=1)
    return square, whole


@triton.jit
def _norm(w, a, b, out, s, lift, width, inner, rank, NARROW: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
          TILE_R: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    square, whole = _squares(w, a, b, o, s, lift, width, inner, rank, NARROW, TILE_O, TILE_I, TILE_R)
    sound = (square > CANCELS * whole) & (square < float("inf"))
    if NARROW and tl.max(((whole > 0) & (sound == 0)).to(tl.int32), axis=0) > 0:
        square, whole = _squares(w, a, b, o, s, 1.0, width, inner, rank, False, TILE_O, TILE_I, TILE_R)
    tl.store(out + o, tl.sqrt_rn(square), mask=o < width)


def factor(A_RI: Tensor, dtype: torch.dtype) -> Tensor:
    rank, inner = A_RI.shape
    return _parted(A_RI, A_RI.new_empty(3 * rank, inner, dtype=dtype), rank, inner, inner, rank * inner, 1.0)


def activation(both_TL: Tensor, dtype: torch.dtype, by: float) -> Tensor:
    tokens, rank = both_TL.shape[0], both_TL.shape[1] // 2
    out_TK = both_TL.new_empty(tokens, 3 * rank, dtype=dtype)
    return _parted(both_TL, out_TK, tokens, rank, 3 * rank, rank, by, two=True, low_last=False)


def gained(B_OR: Tensor, dtype: torch.dtype, by: float, m_O: Tensor | None, norm_O: Tensor | None) -> Tensor:
    width, rank = B_OR.shape
    return _parted(B_OR, B_OR.new_empty(width, 3 * rank, dtype=dtype), width, rank, 3 * rank, rank, by, m_O, norm_O)


def _parted(
    X: Tensor, out: Tensor, count: int, columns: int, stride: int, place: int, by: float,
    m_O: Tensor | None = None, norm_O: Tensor | None = None, two: bool = False, low_last: bool = True,
) -> Tensor:  # fmt: skip
    X, size = X.contiguous(), count * columns
    _parts[(triton.cdiv(size, 1024),)](X, out, X if m_O is None else m_O, X if norm_O is None else norm_O, by, size,
                                       columns, X.shape[1], stride, place, TWO=two, GAIN=m_O is not None,
                                       LOW_LAST=low_last, TILE=1024, num_warps=4)  # fmt: skip
    return out


def onto(y_TO: Tensor, z_TO: Tensor | None, h_TK: Tensor, B_OK: Tensor, m_O: Tensor, norm_O: Tensor,
         bias_O: Tensor | None, by: float) -> None:  # fmt: skip
    (tokens, width), (tile_t, tile_o, warps) = y_TO.shape, ONTO
    _onto[triton.cdiv(width, tile_o), triton.cdiv(tokens, tile_t)](
        y_TO, y_TO if z_TO is None else z_TO, h_TK, B_OK, m_O, norm_O, m_O if bias_O is None else bias_O, by, tokens,
        width, h_TK.shape[1], HAS_Z=z_TO is not None, HAS_BIAS=bias_O is not None, TILE_T=tile_t, TILE_O=tile_o,
        TILE_K=32, num_warps=warps,
    )  # fmt: skip


def back(
    G_TO: Tensor, value_TO: Tensor, bias_O: Tensor | None, m_O: Tensor, norm_O: Tensor, less: int
) -> tuple[Tensor, Tensor]:
    (tokens, width), (tile_t, tile_o, steps, warps) = G_TO.shape, BACK
    grid = (triton.cdiv(width, tile_o), triton.cdiv(tokens, tile_t * steps))
    moved_TO, sums_PO = torch.empty_like(G_TO), m_O.new_empty(grid[1], width)
    _back[grid](G_TO, value_TO.contiguous(), m_O if bias_O is None else bias_O, m_O, norm_O, moved_TO, sums_PO, less,
                tokens, width, HAS_BIAS=bias_O is not None, TILE_T=tile_t, TILE_O=tile_o, STEPS=steps,
                num_warps=warps)  # fmt: skip
    return moved_TO, sums_PO


def rows(sums_PO: Tensor, raw_OL: Tensor, B_OR: Tensor, m_O: Tensor, norm_O: Tensor, s: float, of_base: bool,
         G_TO: Tensor, x_TI: Tensor, W_OI: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    (width, rank), (tokens, inner) = B_OR.shape, x_TI.shape
    dB_OR, dm_O = torch.empty_like(B_OR), torch.empty_like(m_O)
    _rows[(triton.cdiv(width, 32),)](
        sums_PO, raw_OL, B_OR.contiguous(), m_O, norm_O, dB_OR, dm_O, G_TO, x_TI.contiguous(), W_OI.contiguous(), s,
        len(sums_PO), tokens, width, inner, rank, OF_BASE=of_base, TILE_O=32, TILE=32, num_warps=4,
    )  # fmt: skip
    return dB_OR, dm_O


def norm(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, s: float) -> Tensor:
    """||W0 + s B A|| of each row, (out,), float32, of a W0 of any type; where V is small beside W0 as well."""
    (width, inner), (tile_o, tile_i, warps), norm_O = W_OI.shape, NORM, B_OR.new_empty(len(B_OR))
    tensors = (W_OI.contiguous(), A_RI.contiguous(), B_OR.contiguous(), norm_O)
    lift = 256.0 if W_OI.dtype == torch.float16 else 1.0
    with torch.cuda.device_of(W_OI):
        _norm[(triton.cdiv(width, tile_o),)](*tensors, s, lift, width, inner, len(A_RI),
                                         NARROW=W_OI.element_size() == 2, TILE_O=tile_o, TILE_I=tile_i,
                                         TILE_R=16 if len(A_RI) <= 16 else 32, num_warps=warps)  # fmt: skip
    return norm_O
