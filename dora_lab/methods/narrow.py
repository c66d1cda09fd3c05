"""LoRA and DoRA on a base of bfloat16 or float16 weights with float32 factors, on a GPU: nothing is made wide.

A float32 copy of x, y or dy costs as much as half the dense product, and float32 products have no tensor cores. So a
float32 number is two narrow ones, X = hi + lo (to 2^-17 in bfloat16), products are of narrow numbers and summed in
float32, and what is a parameter or a gradient of one is float32 as everywhere. With h = drop(x) A^T and
z = x W0^T + s h B^T:
- LoRA: y = z + bias; DoRA, ``branch`` dropout or none: y = g z + bias, g = m / ||V||;
- DoRA with a second product, the authors' dropout: y = x W0^T + (g - 1) drop(x) W0^T + g s h B^T + bias.
At g = 1 and B = 0 all are the base's own output, bit for bit. Of the size of the output, DoRA keeps its output for the
gradient of m, dm = sum_t dy (y - bias) / m, and with a second product that; LoRA keeps nothing. A layer that is
``steady`` (see `steady`) never waits for the device. What is not a matrix product is in `narrow_eager`, and in kernels,
which never ask at all, in `narrow_triton`: where Triton is, those are used.
Shape suffixes: O = out features, I = in features, R = rank, T = tokens, K = 3 R (three narrow parts), L = 2 R (high and
low), P = pieces of a sum over tokens.
"""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_lab.methods import narrow_eager
from dora_lab.methods.dora_autograd import living, saved
from dora_lab.methods.narrow_eager import Parts, gained, product

ON = ("cuda",)  # devices that it is for
THERE = find_spec("triton") is not None  # CUDA builds of torch come with it
FUSED = THERE  # right on an H200, and faster there: results/tables/gpu


class How(NamedTuple):
    """What a layer is besides its tensors."""

    dtype: torch.dtype
    scaling: float
    dropout: float = 0.0
    second: bool = False
    through_norm: bool = False
    alive: bool = False  # is it known that no row of V is zero?
    steady: bool = False  # and that no m is?


def narrow_type(x: Tensor, A_RI: Tensor) -> torch.dtype | None:
    """The type that the layer computes in, if it is one for `Narrow` here; else None."""
    device = x.device.type
    if device not in ON or A_RI.dtype != torch.float32:
        return None
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def kernels(on: Tensor) -> Any:
    """The Triton kernels if they are for that tensor's device, else None."""
    if not FUSED or on.device.type not in ON:
        return None
    from dora_lab.methods import narrow_triton

    return narrow_triton


def on_factor(W_OI: Tensor, A_KI: Tensor) -> Tensor:
    """W0 A^T, (out, rank), in float32, of a narrow W0 and A's parts."""
    rank = len(A_KI) // 3
    WA_OL = product(W_OI, A_KI[rank:].t())
    return WA_OL[:, :rank] + WA_OL[:, rank:]


class Narrow(torch.autograd.Function):
    """See the module's docstring; `m_O` and `norm_O` are None for LoRA. `made`: parts that are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor,
                m_O: Tensor | None, norm_O: Tensor | None, how: How,
                made: Parts | None = None) -> Tensor:  # fmt: skip
        run, lift, s = kernels(x) or narrow_eager, lift_of(how.dtype), how.scaling
        with plainly(x):
            x, weight_OI = x.to(how.dtype), W_OI.to(how.dtype)
            bias_O = None if bias_O is None else bias_O.to(how.dtype)
            x_TI = x.reshape(-1, x.shape[-1])
            dropped_TI, rest_TI = torch.native_dropout(x_TI, how.dropout, True) if how.dropout else (x_TI, None)
            y = F.linear(x, weight_OI, bias_O)
            y_TO = y.view(-1, y.shape[-1])
            if y._is_view():  # it is with a bias: a model may not write into what a function gives as a view
                y = torch.ops.aten._unsafe_view(y_TO, y.shape)
            parts = run.factors(A_RI, B_OR, how.dtype, lift, s, m_O, norm_O, how.alive) if made is None else made
            h_TK = run.activation(product(dropped_TI, parts.A_KI[len(A_RI) :].t()), how.dtype, 1.0)
            if parts.g_O is None:
                y_TO.addmm_(h_TK, parts.B_OK.t(), alpha=1 / lift)
                kept = ()
            else:
                z_TO = dropped_TI @ weight_OI.t() if how.second else None
                run.onto(y_TO, z_TO, h_TK, parts.B_OK, parts.g_O, bias_O, 1 / lift)
                of_norm, of_m = A_RI if how.through_norm else None, z_TO if how.second else y
                kept = (bias_O, of_norm, B_OR, m_O, norm_O, parts.g_O, parts.sg_O, of_m)
        ctx.save_for_backward(x, W_OI, parts.A_KI, h_TK, parts.B_OK, rest_TI, *kept)
        ctx.how = how
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        with plainly(grad):
            return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, W_OI, A_KI, h_TK, B_OK, rest_TI, *of_m = saved(ctx)
    how, rank, run = ctx.how, len(A_KI) // 3, kernels(x) or narrow_eager
    weight_OI, x_TI, dtype = W_OI.to(x.dtype), x.reshape(-1, x.shape[-1]), x.dtype
    G_TO = grad.reshape(-1, grad.shape[-1]).contiguous()
    raw_OL = product(G_TO.t(), h_TK[:, : 2 * rank])  # the two halves of dy^T h
    dh_TK = run.activation(product(G_TO, B_OK[:, rank:]), dtype, 1 / lift_of(dtype))
    dropped_TI = x_TI if rest_TI is None else _masked(x_TI, rest_TI, how.dropout)
    halves_LI = product(dh_TK[:, : 2 * rank].t(), dropped_TI)
    dm_O, moved_TO = None, G_TO
    if not of_m:
        dA_RI, dB_OR = run.sums(raw_OL, halves_LI, how.scaling)
    else:
        bias_O, A_RI, B_OR, m_O, norm_O, g_O, sg_O, kept_TO = of_m
        of_base = how.second or kept_TO is None  # the model has written into the output: x W0^T once more
        value_TO = x_TI @ weight_OI.t() if kept_TO is None else kept_TO.reshape(G_TO.shape)
        moved_TO, sums_PO = run.back(G_TO, value_TO, None if of_base else bias_O, g_O, int(how.second))
        parts, asked = Parts(A_KI, B_OK, g_O, sg_O), (how.scaling, how.alive, how.steady)
        where = (of_base, G_TO, x_TI, weight_OI)
        dA_RI, dB_OR, dm_O = run.rows(sums_PO, raw_OL, halves_LI, B_OR, m_O, norm_O, parts, *where, *asked)
        if how.through_norm:
            c_O = living(-m_O * dm_O / norm_O.square(), norm_O, how.alive)
            _by_way_of_the_norm(weight_OI, A_KI, A_RI, B_OR, c_O, how.scaling, dA_RI, dB_OR)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _to_input(G_TO, moved_TO, weight_OI, dh_TK, A_KI, rest_TI, how).view_as(x)
    dbias_O = G_TO.sum(0) if ctx.needs_input_grad[2] else None
    return dx, None, dbias_O, dA_RI, dB_OR, dm_O, None, None, None


def plainly(x: Tensor) -> Any:
    """Without autocast, whose context costs as much as some operations: only where there is one."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _to_input(
    G_TO: Tensor, moved_TO: Tensor, weight_OI: Tensor, dh_TK: Tensor, A_KI: Tensor, rest_TI: Tensor | None, how: How
) -> Tensor:
    """The gradient of x: through `moved`, through dh, and with a second product through dy itself."""
    if rest_TI is None:
        return (moved_TO @ weight_OI).addmm_(dh_TK, A_KI)
    through_TI = (moved_TO @ weight_OI).addmm_(dh_TK, A_KI) if how.second else dh_TK @ A_KI
    return _masked(through_TI, rest_TI, how.dropout).addmm_(G_TO if how.second else moved_TO, weight_OI)


def _masked(t_TI: Tensor, rest_TI: Tensor, dropout: float) -> Tensor:
    """What dropout does, by its mask."""
    return torch.ops.aten.native_dropout_backward(t_TI, rest_TI, 1 / (1 - dropout))


def lift_of(dtype: torch.dtype) -> float:
    """What B is multiplied by before it is parted: a power of two that keeps low parts out of subnormal numbers."""
    return 256.0 if dtype == torch.float16 else 1.0


def _by_way_of_the_norm(
    W_OI: Tensor, A_KI: Tensor, A_RI: Tensor, B_OR: Tensor, c_O: Tensor, s: float, dA_RI: Tensor, dB_OR: Tensor
) -> None:
    """Add what flows through the norm (equation 6) to the gradients of A and B: dL/dV = c V, row by row."""
    lift, rank = lift_of(W_OI.dtype), len(A_RI)
    cB_OR = B_OR * c_O[:, None]
    along_OR = torch.addmm(on_factor(W_OI, A_KI), B_OR, A_RI @ A_RI.t(), alpha=s)
    dB_OR.addcmul_(along_OR, c_O[:, None], value=s)
    # where V is small c is beyond float16's numbers
    top = cB_OR.abs().amax().clamp_min(1e-30) if W_OI.dtype == torch.float16 else None
    halves_LI = product(gained(cB_OR if top is None else cB_OR / top, W_OI.dtype, lift)[:, rank:].t(), W_OI)
    along_RI = halves_LI[:rank] + halves_LI[rank:]
    dA_RI.add_(along_RI if top is None else along_RI * top, alpha=s / lift)
    dA_RI.addmm_(cB_OR.t() @ B_OR, A_RI, alpha=s * s)
