"""LoRA and DoRA on a base of bfloat16 or float16 weights with float32 factors, on a GPU: nothing is made wide.

A float32 copy of x, y or dy costs as much as half the dense product, and float32 products have no tensor cores. So a
float32 number is two narrow ones, X = hi + lo (to 2^-17 in bfloat16), products are of narrow numbers and summed in
float32, and what is a parameter or a gradient of one is float32 as everywhere. With z = x W0^T + s drop(x) A^T B^T:
- LoRA: y = z + bias; DoRA, ``branch`` dropout or none: y = g z + bias, g = m / ||V||;
- DoRA with a second product, the authors' dropout, h = drop(x) A^T: y = x W0^T + s h B^T + (g - 1) z' + bias with
  z' = drop(x) W0^T + s h B^T.
At g = 1 and B = 0 all are the base's own output, bit for bit. Of the size of the output, DoRA keeps its output for the
gradient of m, dm = sum_t dy (y - bias) / m, and with a second product z'; LoRA keeps nothing.
Shape suffixes: O = out features, I = in features, R = rank, T = tokens, K = 3 R (three narrow parts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_lab.methods.dora_autograd import living, saved, scale

ON = ("cuda",)  # devices that it is for
FUSED = False  # the passes over outputs as Triton kernels; the eager form is their reference
SUM_WIDTH = 32  # columns whose sums are the diagonal of one product; 0: the products are written out


class How(NamedTuple):
    """What a layer is besides its tensors; `settle` waits for the norm and says whether no ||V|| and no m is zero."""

    dtype: torch.dtype
    scaling: float
    dropout: float = 0.0
    second: bool = False
    through_norm: bool = False
    settle: Callable[[], bool] = lambda: True


def narrow_type(x: Tensor, A_RI: Tensor) -> torch.dtype | None:
    """The type that the layer computes in, if it is one for `Narrow` here; else None."""
    device = x.device.type
    if device not in ON or A_RI.dtype != torch.float32:
        return None
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def by_factor(X_TI: Tensor, A_RI: Tensor) -> Tensor:
    """X A^T, (T, R), float32, of a narrow X and a float32 A."""
    return _joined(_product(X_TI, _factor(A_RI, X_TI.dtype, 0)[len(A_RI) :].t()), 1)


class Narrow(torch.autograd.Function):
    """See the module's docstring; `m_O` and `norm_O` are None for LoRA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor,
                m_O: Tensor | None, norm_O: Tensor | None, how: How) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            x, weight_OI = x.to(how.dtype), W_OI.to(how.dtype)
            x_TI = x.reshape(-1, x.shape[-1])
            dropped_TI, rest_TI = torch.native_dropout(x_TI, how.dropout, True) if how.dropout else (x_TI, None)
            y = F.linear(x, weight_OI, None if bias_O is None else bias_O.to(how.dtype))
            y_TO = y.view(-1, y.shape[-1])
            z_TO = dropped_TI @ weight_OI.t() if how.second else None
            A_KI = _factor(A_RI, how.dtype, 0)
            h_TR = _joined(_product(dropped_TI, A_KI[len(A_RI) :].t()), 1)
            g_O, alive = None, True
            if m_O is not None and norm_O is not None:
                alive = how.settle()  # here: the device has the dense product to do while this waits
                g_O = scale(m_O, norm_O, alive)
            _onto(y_TO, z_TO, h_TR, B_OR, g_O, bias_O, how.scaling)
        kept_TO = None if m_O is None else z_TO if how.second else y
        ctx.save_for_backward(x, W_OI, bias_O, A_RI, B_OR, m_O, norm_O, g_O, h_TR, rest_TI, kept_TO)
        ctx.how, ctx.alive = how, alive
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):
            return _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, W_OI, bias_O, A_RI, B_OR, m_O, norm_O, g_O, h_TR, rest_TI, kept_TO = saved(ctx)
    how, rank = ctx.how, len(A_RI)
    weight_OI, x_TI, dtype = W_OI.to(x.dtype), x.reshape(-1, x.shape[-1]), x.dtype
    G_TO = grad.reshape(-1, grad.shape[-1]).contiguous()
    lift = _lift(dtype)
    gain: Any = how.scaling if g_O is None else (g_O * how.scaling)[:, None]
    h_TK = _activation(h_TR, dtype)
    dB_OR = _joined(_product(G_TO.t(), h_TK[:, : 2 * rank]), 1).mul_(gain)
    dh_TR = _joined(_product(G_TO, _factor(B_OR * (gain * lift), dtype, 1)[:, rank:]), 1)
    dh_TK = _activation(dh_TR if lift == 1.0 else dh_TR / lift, dtype)
    dropped_TI = x_TI if rest_TI is None else _masked(x_TI, rest_TI, how.dropout)
    dA_RI = _joined(_product(dh_TK[:, : 2 * rank].t(), dropped_TI), 0)
    dm_O, moved_TO = None, G_TO
    if g_O is not None:
        value_TO, per_O, along_O = kept_TO, norm_O, None
        if not how.second and ctx.alive and kept_TO is not None:
            per_O, along_O = m_O, bias_O  # sum_t dy g (y - bias) over m g
        elif not how.second:  # the model has written into the output, or an m is zero: once more
            value_TO = x_TI @ weight_OI.t()
            _onto(value_TO, None, h_TR, B_OR, None, None, how.scaling)
        moved_TO, sum_O = _back(G_TO, value_TO.reshape(G_TO.shape), g_O - 1 if how.second else g_O)
        if along_O is not None:
            sum_O -= along_O * G_TO.sum(0, dtype=torch.float32)
        dm_O = living(sum_O / per_O, norm_O, ctx.alive)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _to_input(G_TO, moved_TO, weight_OI, dh_TK, _factor(A_RI, dtype, 0), rest_TI, how).view_as(x)
    if how.through_norm:
        c_O = living(-m_O * dm_O / norm_O.square(), norm_O, ctx.alive)
        _by_way_of_the_norm(weight_OI, A_RI, B_OR, c_O, how.scaling, dA_RI, dB_OR)
    dbias_O = G_TO.sum(0) if ctx.needs_input_grad[2] else None
    return dx, None, dbias_O, dA_RI, dB_OR, dm_O, None, None


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


def _parts(X: Tensor, dtype: torch.dtype, dim: int, low: int) -> Tensor:
    """X as hi, hi, lo along `dim`, the lo at place `low` of the three."""
    shape = (*X.shape[:dim], 3, *X.shape[dim:])
    parts = torch.empty(shape, dtype=dtype, device=X.device).copy_(X.unsqueeze(dim))
    torch.sub(X, parts.select(dim, 0), out=parts.select(dim, low))
    return parts.flatten(dim, dim + 1)


def _factor(X: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """hi, hi, lo of a factor: all for a product with an `_activation`, the last two for one with narrow numbers."""
    return _parts(X, dtype, dim, 2)


def _activation(h_TR: Tensor, dtype: torch.dtype) -> Tensor:
    """hi, lo, hi of tokens: all for a product with a `_factor`, the first two for one with narrow numbers."""
    return _parts(h_TR, dtype, 1, 1)


def _joined(both: Tensor, dim: int) -> Tensor:
    """The sum of what came of high and of low parts, which lie side by side along `dim`."""
    hi, lo = both.chunk(2, dim)
    return hi + lo


def _lift(dtype: torch.dtype) -> float:
    """What B is multiplied by before it is parted: a power of two that keeps low parts out of subnormal numbers."""
    return 256.0 if dtype == torch.float16 else 1.0


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A product of narrow numbers in float32."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _onto(
    y_TO: Tensor, z_TO: Tensor | None, h_TR: Tensor, B_OR: Tensor, g_O: Tensor | None, bias_O: Tensor | None, s: float
) -> None:
    """From the base's output, and drop(x) W0^T if there is a second product, to the layer's output and z', in place."""
    if (kernels := _kernels(y_TO)) is not None:
        kernels.onto(y_TO, z_TO, h_TR, B_OR, g_O, bias_O, s)
        return
    lift = _lift(y_TO.dtype)
    h_TK, B_KO = _activation(h_TR, y_TO.dtype), _factor(B_OR if lift == 1.0 else B_OR * lift, y_TO.dtype, 1).t()
    for base_TO in (y_TO,) if z_TO is None else (y_TO, z_TO):
        base_TO.addmm_(h_TK, B_KO, alpha=s / lift)
    if g_O is None:
        return
    if z_TO is not None:
        torch.addcmul(y_TO, z_TO, g_O - 1, out=y_TO)
    elif bias_O is None:
        torch.mul(y_TO, g_O, out=y_TO)
    else:
        torch.addcmul((1 - g_O) * bias_O, y_TO, g_O, out=y_TO)


def _back(G_TO: Tensor, value_TO: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """(G gain, sum over tokens of G value): the first narrow, the second (out,), float32."""
    if (kernels := _kernels(G_TO)) is not None:
        return kernels.back(G_TO, value_TO, gain_O)
    moved_TO = torch.mul(G_TO, gain_O, out=torch.empty_like(G_TO))
    tokens, width = G_TO.shape
    if not SUM_WIDTH or width % SUM_WIDTH or G_TO.device.type == "cpu":
        return moved_TO, (G_TO * value_TO.float()).sum(0)
    G, value = (t_TO.view(tokens, -1, SUM_WIDTH).transpose(0, 1) for t_TO in (G_TO, value_TO))
    squares = torch.bmm(G.transpose(1, 2), value, out_dtype=torch.float32)  # of these only the diagonals are wanted
    return moved_TO, squares.diagonal(dim1=1, dim2=2).reshape(-1)


def _kernels(output_TO: Tensor) -> Any:
    """The Triton kernels if they are to be used here, else None."""
    if not FUSED or output_TO.device.type not in ON:
        return None
    from dora_lab.methods import narrow_triton  # triton comes with CUDA builds of torch alone

    return narrow_triton


def _by_way_of_the_norm(
    weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, c_O: Tensor, s: float, dA_RI: Tensor, dB_OR: Tensor
) -> None:
    """Add what flows through the norm (equation 6) to the gradients of A and B: dL/dV = c V, row by row."""
    cB_OR = B_OR * c_O[:, None]
    lift = _lift(weight_OI.dtype)
    dB_OR.addcmul_(by_factor(weight_OI, A_RI) + s * (B_OR @ (A_RI @ A_RI.t())), c_O[:, None], value=s)
    cB_OK = _factor(cB_OR * lift, weight_OI.dtype, 1)
    dA_RI.add_(_joined(_product(cB_OK[:, len(A_RI) :].t(), weight_OI), 0), alpha=s / lift)
    dA_RI.addmm_(cB_OR.t() @ B_OR, A_RI, alpha=s * s)
