"""The products of the DoRA layer on one dense matrix, with their gradients written out.

With z = W0 x + s B A drop(x) and g = m / ||V||, per token:
- `Decomposed`, ``branch`` dropout or none: y = g z + bias;
- `Published`, the authors' dropout: y = W0 x + (g - 1) W0 drop(x) + g s B A drop(x) + bias. What is dropped is few and
  known, so the second product is had from the first: W0 drop(x) = (W0 x - W0 (x o Z)) / (1 - p), Z the dropped entries.
  Backwards, with D = (g - 1) G: dx = (G + D / (1 - p)) W0, less D W0 / (1 - p) at Z alone.
- `Blocked`, both of these for a base of a narrower type than the adapter's, and the second at any dropout: the dense
  products in the base's type, everything else in float32, a block of tokens at a time (`narrow` does it on a GPU).
Shape suffixes: O = out features, I = in features, R = rank, T = tokens.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_lab.decompose import magnitude

SPARSE = 0.1  # dropout up to which few enough entries are dropped for sparse products to be the faster ones
BLOCK = 2**20  # elements of W0 that are transposed at a time for a sparse product
WORKSPACE = 2**22  # elements of the largest gradient that is worked on in memory that stays
TOKENS = {"cpu": 2**19, "other": 2**24}  # elements of an output that are in float32 at a time
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)  # said once a process, to nobody


def scale(m_O: Tensor, norm_O: Tensor, alive: bool) -> Tensor:
    """g_O = m / ||V||, and 1 where V is zero; `alive` says that it is zero nowhere."""
    if alive:
        return m_O / norm_O
    zero_O = norm_O == 0
    return (m_O / norm_O.masked_fill(zero_O, 1.0)).masked_fill(zero_O, 1.0)


def product(
    x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, g_O: Tensor, s: float,
    dropped_TI: Tensor | None = None, base_TO: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(g z + bias, h) with h_TR = drop(x) A^T; `base_TO` = x W0^T, which is written into, if it is at hand."""
    h_TR = (x.reshape(-1, x.shape[-1]) if dropped_TI is None else dropped_TI) @ A_RI.t()
    y, base_TO = _output(x, W_OI, base_TO)
    z_TO = base_TO.addmm_(h_TR, B_OR.t(), alpha=s)
    if bias_O is None:
        torch.mul(z_TO, g_O, out=y.view(base_TO.shape))
    else:
        torch.addcmul(bias_O, z_TO, g_O, out=y.view(base_TO.shape))
    return y, h_TR


def _output(x: Tensor, W_OI: Tensor, base_TO: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what becomes the output, x W0^T), in one memory where the product is not at hand.

    The output is no view of anything: the model may write into it.
    """
    if base_TO is not None:
        return x.new_empty(*x.shape[:-1], W_OI.shape[0]), base_TO
    y = F.linear(x, W_OI)
    return y, y.view(-1, W_OI.shape[0])


class Decomposed(torch.autograd.Function):
    """y = g (x W0^T + s drop(x) A^T B^T) + bias.

    The gradient of m is taken from the output, which the next operation mostly keeps anyway: dm = sum_t dy (y - bias)
    / m. Where the model has written into the output, or an m is 0, the product is computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, m_O: Tensor,
                norm_O: Tensor, alive: bool, s: float, dropout: float, through_norm: bool,
                base_TO: Tensor | None) -> Tensor:  # fmt: skip
        dropped_TI, rest_TI = _drop(x.reshape(-1, x.shape[-1]), dropout) if dropout else (None, None)
        g_O = scale(m_O, norm_O, alive)
        y, h_TR = product(x, W_OI, bias_O, A_RI, B_OR, g_O, s, dropped_TI, base_TO)
        ctx.save_for_backward(x, W_OI, bias_O, A_RI, B_OR, m_O, norm_O, g_O, h_TR, rest_TI, y)
        ctx.s, ctx.dropout, ctx.through_norm, ctx.alive = s, dropout, through_norm, alive
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph: the gradients are to have gradients
            return _by_autograd(ctx, grad)
        x, W_OI, bias_O, A_RI, B_OR, m_O, norm_O, g_O, h_TR, rest_TI, y = saved(ctx)
        s, needs = ctx.s, ctx.needs_input_grad
        G_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        moved_TO = torch.mul(G_TO, g_O, out=_workspace(G_TO))
        dh_TR = torch.addmm(h_TR, moved_TO, B_OR, beta=0, alpha=s)
        dB_OR = torch.addmm(B_OR, moved_TO.t(), h_TR, beta=0, alpha=s)
        dx = None
        if needs[0]:
            dx_TI = moved_TO @ W_OI
            if rest_TI is None:
                dx_TI.addmm_(dh_TR, A_RI)
            else:
                dx_TI.addcmul_(dh_TR @ A_RI, rest_TI.to(x.dtype), value=1 / (1 - ctx.dropout))
            dx = dx_TI.view_as(x)
        dA_RI = dh_TR.t() @ (x_TI if rest_TI is None else x_TI * rest_TI)
        if rest_TI is not None:
            dA_RI *= 1 / (1 - ctx.dropout)
        dm_O = None
        if needs[5] or ctx.through_norm:
            if y is None or not bool(m_O.all()):
                z_TO = (x_TI @ W_OI.t()).addmm_(h_TR, B_OR.t(), alpha=s)
                sum_O, per_m_O = torch.mul(G_TO, z_TO, out=moved_TO).sum(0), norm_O
            else:  # sum_t dy g (y - bias), over m g
                if bias_O is not None:
                    along_bias_O = bias_O * moved_TO.sum(0)
                sum_O, per_m_O = moved_TO.mul_(y.reshape(G_TO.shape)).sum(0), m_O * g_O
                if bias_O is not None:
                    sum_O -= along_bias_O
            dm_O = living(sum_O / per_m_O, norm_O, ctx.alive)
            if ctx.through_norm:
                c_O = living(-m_O * dm_O / norm_O.square(), norm_O, ctx.alive)
                _by_way_of_the_norm(W_OI, A_RI, B_OR, c_O, s, dA_RI, dB_OR)
        dbias_O = G_TO.sum(0) if needs[2] else None
        return dx, None, dbias_O, dA_RI, dB_OR, dm_O, None, None, None, None, None, None


class Published(torch.autograd.Function):
    """The authors' dropout with one dense product each way (on the CPU, for a `dropout` of at most `SPARSE`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, m_O: Tensor,
                norm_O: Tensor, alive: bool, s: float, dropout: float,
                base_TO: Tensor | None) -> Tensor:  # fmt: skip
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI, rest_TI = _drop(x_TI, dropout)
        gone = (rest_TI == 0).view(-1).nonzero()[:, 0]
        h_TR = dropped_TI @ A_RI.t()
        g_O = scale(m_O, norm_O, alive)
        y, base_TO = _output(x, W_OI, base_TO)
        z_TO = base_TO - _sparse_product(_entries(x_TI, gone), W_OI)
        z_TO.mul_(1 / (1 - dropout)).addmm_(h_TR, B_OR.t(), alpha=s)
        y_TO = y.view(base_TO.shape)
        # W0 drop(x) = z - s B A drop(x)
        torch.addcmul(base_TO.addmm_(h_TR, B_OR.t(), alpha=s), z_TO, g_O - 1, out=y_TO)
        if bias_O is not None:
            y_TO += bias_O
        ctx.save_for_backward(x, W_OI, A_RI, B_OR, norm_O, g_O, h_TR, z_TO, gone)
        ctx.s, ctx.dropout, ctx.alive = s, dropout, alive
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, W_OI, A_RI, B_OR, norm_O, g_O, h_TR, z_TO, gone = ctx.saved_tensors
        s, needs, kept = ctx.s, ctx.needs_input_grad, 1 - ctx.dropout
        G_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        sg_O1 = (g_O * s)[:, None]
        dh_TR = G_TO @ (B_OR * sg_O1)
        dm_O = living((G_TO * z_TO).sum(0) / norm_O, norm_O, ctx.alive) if needs[5] else None
        dx = None
        if needs[0]:
            D_TO = G_TO * ((g_O - 1) / kept)
            dx_TI = _without(dh_TR @ A_RI, gone, ctx.dropout)
            pattern = _entries(x_TI, gone)
            at_gone = torch.sparse.sampled_addmm(pattern, D_TO, W_OI, beta=0).values()
            dx_TI.addmm_(D_TO.add_(G_TO), W_OI).view(-1)[gone] -= at_gone
            dx = dx_TI.view_as(x)
        dA_RI = dh_TR.t() @ _without(x_TI.clone(), gone, ctx.dropout)
        dB_OR = (G_TO.t() @ h_TR).mul_(sg_O1)
        dbias_O = G_TO.sum(0) if needs[2] else None
        return dx, None, dbias_O, dA_RI, dB_OR, dm_O, None, None, None, None, None


class Blocked(torch.autograd.Function):
    """y = b + (g - 1) b' + g s drop(x) A^T B^T + bias in any types, b = x W0^T; b' = b or, if `second`, drop(x) W0^T.

    At g = 1 and B = 0 it is the base's own output, bit for bit. Of the size of the output, nothing is kept for the
    gradients but the output itself; with a second product, z = b' + s drop(x) A^T B^T.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, m_O: Tensor,
                norm_O: Tensor, alive: bool, s: float, dropout: float, through_norm: bool, second: bool,
                dtype: torch.dtype) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            x, weight_OI = x.to(dtype), W_OI.to(dtype)
            x_TI = x.reshape(-1, x.shape[-1])
            dropped_TI, rest_TI = _drop(x_TI, dropout) if dropout else (x_TI, None)
            g_O = scale(m_O, norm_O, alive)
            y = F.linear(x, weight_OI, None if bias_O is None else bias_O.to(dtype))
            y_TO = y.view(-1, y.shape[-1])
            z_TO = dropped_TI @ weight_OI.t() if second else None
            h_TR = torch.empty(x_TI.shape[0], A_RI.shape[0], dtype=A_RI.dtype, device=x.device)
            for rows in _token_blocks(y_TO):
                torch.mm(dropped_TI[rows].to(A_RI.dtype), A_RI.t(), out=h_TR[rows])
                low_TO = torch.mm(h_TR[rows], B_OR.t()).mul_(s)
                base_TO = y_TO[rows].to(low_TO.dtype)
                if z_TO is not None:
                    again_TO = z_TO[rows].to(low_TO.dtype)
                else:
                    again_TO = base_TO if bias_O is None else base_TO - bias_O
                y_TO[rows] = torch.addcmul(base_TO, again_TO, g_O - 1).addcmul_(low_TO, g_O)
                if z_TO is not None:
                    z_TO[rows] += low_TO
        ctx.save_for_backward(x, W_OI, bias_O, A_RI, B_OR, m_O, norm_O, g_O, h_TR, rest_TI, z_TO if second else y)
        ctx.s, ctx.dropout, ctx.through_norm, ctx.alive, ctx.second = s, dropout, through_norm, alive, second
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, W_OI, bias_O, A_RI, B_OR, m_O, norm_O, g_O, h_TR, rest_TI, kept_TO = saved(ctx)
        s, kept, needs, second, wide = ctx.s, 1 - ctx.dropout, ctx.needs_input_grad, ctx.second, A_RI.dtype
        weight_OI, x_TI = W_OI.to(x.dtype), x.reshape(-1, x.shape[-1])
        G_TO = grad.reshape(-1, grad.shape[-1])
        sgB_OR = B_OR * (g_O * s)[:, None]
        dh_TR, dB_OR, dA_RI = torch.empty_like(h_TR), torch.zeros_like(B_OR), torch.zeros_like(A_RI)
        sum_O, moved_TO = torch.zeros_like(m_O), torch.empty_like(G_TO) if needs[0] else None
        take_m = needs[5] or ctx.through_norm
        from_output = take_m and not second and kept_TO is not None and bool(m_O.all())
        # what dy is multiplied by, summed over tokens, for the gradient of m: y, z, or z without its last term
        of_m_TO = G_TO
        if second or from_output:
            of_m_TO = cast(Tensor, kept_TO).view(G_TO.shape)
        elif take_m:
            of_m_TO = x_TI @ weight_OI.t()
        for rows in _token_blocks(G_TO):
            G, h = G_TO[rows].to(wide), h_TR[rows]
            dB_OR.addmm_(G.t(), h)
            torch.mm(G, sgB_OR, out=dh_TR[rows])
            dropped = x_TI[rows].to(wide)
            dA_RI.addmm_(dh_TR[rows].t(), dropped if rest_TI is None else dropped * rest_TI[rows])
            if moved_TO is not None:
                moved_TO[rows] = G * (g_O - 1 if second else g_O)
            if take_m:
                value_TO = of_m_TO[rows].to(wide)
                if from_output:
                    value_TO = value_TO if bias_O is None else value_TO - bias_O
                elif not second:
                    value_TO = torch.addmm(value_TO, h, B_OR.t(), alpha=s)
                sum_O += (value_TO * G).sum(0)
        dB_OR *= (g_O * s)[:, None]
        if rest_TI is not None:
            dA_RI *= 1 / kept
        dx = None
        if moved_TO is not None:
            dx_TI = moved_TO @ weight_OI
            plain_TI = G_TO @ weight_OI if second else None
            for rows in _token_blocks(dx_TI):
                through = torch.mm(dh_TR[rows], A_RI)
                through = through + dx_TI[rows] if second else through
                through = through if rest_TI is None else through * rest_TI[rows] / kept
                dx_TI[rows] = through + (dx_TI[rows] if plain_TI is None else plain_TI[rows])
            dx = dx_TI.view_as(x)
        dm_O = None
        if take_m:
            dm_O = living(sum_O / (m_O if from_output else norm_O), norm_O, ctx.alive)
            if ctx.through_norm:
                c_O = living(-m_O * dm_O / norm_O.square(), norm_O, ctx.alive)
                _by_way_of_the_norm(W_OI, A_RI, B_OR, c_O, s, dA_RI, dB_OR)
        dbias_O = G_TO.sum(0) if needs[2] else None
        return dx, None, dbias_O, dA_RI, dB_OR, dm_O, *([None] * 7)


def _by_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of `Decomposed` as a graph, from the layer written out."""
    *layer, norm_O, _, _, rest_TI, _ = saved(ctx)
    # views: where x comes from this very layer, what flows through x is not A's, B's or m's here
    given = {at: part.view_as(part) for at, part in enumerate(layer) if ctx.needs_input_grad[at] and at != 1}
    x, W_OI, bias_O, A_RI, B_OR, m_O = (given.get(at, part) for at, part in enumerate(layer))
    if ctx.through_norm:
        norm_O = magnitude(torch.addmm(W_OI, B_OR, A_RI, alpha=ctx.s))
    dropped = x if rest_TI is None else x * rest_TI.view_as(x) / (1 - ctx.dropout)
    z = F.linear(x, W_OI) + ctx.s * F.linear(F.linear(dropped, A_RI), B_OR)
    y = scale(m_O, norm_O, ctx.alive) * z
    y = y if bias_O is None else y + bias_O
    found = dict(zip(given, torch.autograd.grad(y, list(given.values()), grad, create_graph=True), strict=True))
    return tuple(found.get(at) for at in range(12))


def saved(ctx: Any) -> tuple[Any, ...]:
    """What a forward saved; the last, its output, is None if the model has written into it since."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return (*(None if saved is None else saved.unpack() for saved in ctx._raw_saved_tensors[:-1]), None)


def _token_blocks(output_TO: Tensor) -> list[slice]:
    tokens, width = output_TO.shape
    size = max(16, TOKENS["cpu" if output_TO.device.type == "cpu" else "other"] // width)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _by_way_of_the_norm(
    W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, c_O: Tensor, s: float, dA_RI: Tensor, dB_OR: Tensor
) -> None:
    """Add what flows through the norm (equation 6) to the gradients of A and B: dL/dV = c V, row by row."""
    cB_OR = B_OR * c_O[:, None]
    size = max(1, BLOCK // W_OI.shape[1]) if W_OI.dtype != A_RI.dtype else W_OI.shape[0]
    for start in range(0, W_OI.shape[0], size):
        rows = slice(start, start + size)
        some_OI = W_OI[rows].to(A_RI.dtype)
        dB_OR[rows] += s * c_O[rows, None] * (some_OI @ A_RI.t())
        dA_RI.addmm_(cB_OR[rows].t(), some_OI, alpha=s)
    dB_OR += s * s * c_O[:, None] * (B_OR @ (A_RI @ A_RI.t()))
    dA_RI += s * s * ((cB_OR.t() @ B_OR) @ A_RI)


def living(numbers_O: Tensor, norm_O: Tensor, alive: bool) -> Tensor:
    """The numbers, and 0 where V is zero."""
    return numbers_O if alive else numbers_O.masked_fill(norm_O == 0, 0.0)


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.of: dict[torch.dtype, Tensor] = {}


_workspaces = _Workspaces()


def _workspace(like_TO: Tensor) -> Tensor:
    """Memory of that shape for one backward; on the CPU the same every time, since new memory costs page faults."""
    size, kept = like_TO.numel(), _workspaces.of
    if like_TO.device.type != "cpu" or size > WORKSPACE:
        return torch.empty_like(like_TO, memory_format=torch.contiguous_format)
    if like_TO.dtype not in kept or kept[like_TO.dtype].numel() < size:
        kept[like_TO.dtype] = like_TO.new_empty(size)
    return kept[like_TO.dtype][:size].view(like_TO.shape)


def _drop(x_TI: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """drop(x), drawn as `F.dropout` draws it, and the rest: 0 where it is dropped and 1 elsewhere."""
    if x_TI.device.type != "cpu":
        return torch.native_dropout(x_TI, dropout, True)
    # numbers, not truth values: these would be converted at every use, which takes longer
    rest_TI = torch.empty_like(x_TI, memory_format=torch.contiguous_format).bernoulli_(1 - dropout)
    return torch.mul(x_TI, rest_TI).mul_(1 / (1 - dropout)), rest_TI


def _without(t_TI: Tensor, gone: Tensor, dropout: float) -> Tensor:
    """What dropout does, in place, where the places that are `gone` are known."""
    t_TI.mul_(1 / (1 - dropout)).view(-1).index_fill_(0, gone, 0.0)
    return t_TI


def _entries(x_TI: Tensor, gone: Tensor) -> Tensor:
    """x at the places `gone`, as a sparse matrix (T, I) in rows."""
    tokens, width = x_TI.shape
    starts = torch.searchsorted(gone, torch.arange(tokens + 1) * width)
    return torch.sparse_csr_tensor(
        starts, gone % width, x_TI.reshape(-1)[gone], (tokens, width), check_invariants=False
    )


def _sparse_product(Z_TI: Tensor, W_OI: Tensor) -> Tensor:
    """Z W0^T, (T, O), for a sparse Z; the rows of W0^T are what it reads, so W0 is transposed, a block at a time."""
    size = max(1, BLOCK // W_OI.shape[1])
    return torch.cat([Z_TI @ rows.t().contiguous() for rows in W_OI.split(size)], dim=1)
