"""DoRA (section 4.1): W' = m V / ||V|| with V = W0 + s B A, s = alpha / rank, one magnitude m per output feature.

Shape suffixes: O = out features, I = in features, R = rank, T = tokens (all leading dimensions of x together).

The norm of V costs no dense V: ||V||^2 = ||W0||^2 + 2 s <W0 A^T, B> + s^2 <B A A^T, B> row by row, in float32 or wider,
with ||W0||^2 computed once. Where that sum cancels (V much smaller than W0) the row's norm is taken directly (but not
in a compiled graph, where rows cannot be singled out). The norm is kept until A, B or W0 change, so gradient
accumulation, checkpointing and evaluation do not pay for it again. By default it is a constant in the gradient
(equation 11); with ``detach_norm=False`` the gradient goes through it (equation 6, ablated in table 7).

Dropout, with g = m / ||V||:
- ``published`` (the authors' code): y = x W0^T + (g - 1) drop(x) W0^T + g s B A drop(x) + bias, a second base product;
- ``branch``: y = g (x W0^T + s B A drop(x)) + bias.
Without dropout the two are one function.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dora_lab.decompose import magnitude, wide
from dora_lab.methods import narrow
from dora_lab.methods.contract import AdaptedLinear, FactorsOf, is_traced
from dora_lab.methods.dora_autograd import SPARSE, Blocked, Decomposed, Published, product, scale
from dora_lab.methods.inject import adapted, wrap
from dora_lab.methods.layers import Opaque
from dora_lab.methods.lora import LoraLinear
from dora_lab.methods.narrow import How, Narrow, narrow_type, on_factor
from dora_lab.methods.narrow_eager import Parts, factor, factors
from dora_lab.methods.steady import Rows
from dora_lab.spec import Method

FIELDS = (
    "rank", "alpha", "dropout", "target_modules", "rslora", "rank_pattern", "alpha_pattern",
    "dropout_form", "detach_norm", "magnitude_modules",
)  # fmt: skip
PARAMETERS = "rank * (inputs + outputs) + outputs"
FORM = "factors, magnitude"
LABEL = "DoRA"
COLOUR = "#b8341b"
MARKER = "^"
ORDER = 3
HALF = ("#eb9c7c", "v")
SAVED = {False: {2: (26, 8), 4: (44, 16)}, True: {2: (36, 12), 4: (64, 24)}}

BLOCK = {"cpu": 2**17, "other": 2**24}  # elements of W0 at a time: about a core's cache; on a GPU, few kernel launches
CANCELS = 1e-3  # share of ||W0||^2 below which the expanded square has lost too many digits in float32
CANCELS_ON = 1e-2  # the same on a GPU, where A may be two narrow parts and sums are in another order
STACK = 2  # outputs per token from which reading W0 once pays for copying x beside A
_steps = [0]  # optimiser steps taken anywhere: they may write through `.data`, which leaves no trace in versions


def _count_step(*_: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class DoraLinear(LoraLinear):
    """Trains `magnitude` (out,), initialised to the row norms of W0, beside LoRA's A and B.

    A row whose V is zero has no direction: its g is 1, so the row acts as the zeros that it is, and all gradients are
    finite.
    """

    def __init__(self, layer: nn.Module, method: Method, generator: torch.Generator) -> None:
        super().__init__(layer, method, generator)
        self.detach_norm = method.detach_norm
        self.published_dropout = method.dropout_form == "published"
        self._forget()
        # by the same routine as in the forward, so that m / ||V|| is exactly 1 before training
        self.magnitude = _initial(self._norm())

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """m V / ||V||, (out, in)."""
        return scale(self.magnitude, self._norm(), self._alive)[:, None] * self._direction()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        dropout = self.dropout if self.training else 0.0
        second = bool(dropout) and self.published_dropout
        if is_traced() or not self.kind.is_matrix:  # the compiler fuses by itself
            norm_O = self._norm() if self.detach_norm else self._direct_norm()
            return self._onto_base(x, scale(self.magnitude, norm_O, False), second)
        layer = (x, self.matrix, self.bias, self.lora_A, self.lora_B)
        if dtype := narrow_type(x, self.lora_A):
            norm_O, made = self._norm_and_parts(x, dtype)
            steady = self._steady and self.magnitude._version == self._m_version
            how = How(dtype, self.scaling, dropout, second, not self.detach_norm, self._alive, steady)
            return Narrow.apply(*layer, self.magnitude, norm_O, how, made)
        if not self._one_type(x) or (second and not self._sparse(x)):
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            norm_O = self._norm()
            how = (self._alive, self.scaling, dropout, not self.detach_norm, second, dtype)
            return Blocked.apply(*layer, self.magnitude, norm_O, *how)
        norm_O, base_TO = self._kept(), None
        if norm_O is None:
            norm_O, base_TO = self._norm_and_base(x)
        if second:
            return Published.apply(*layer, self.magnitude, norm_O, self._alive, self.scaling, dropout, base_TO)
        if torch.is_grad_enabled():
            how = (self._alive, self.scaling, dropout, not self.detach_norm, base_TO)
            return Decomposed.apply(*layer, self.magnitude, norm_O, *how)
        dropped = self._drop(x).reshape(-1, self.in_features) if dropout else None
        return product(*layer, scale(self.magnitude, norm_O, self._alive), self.scaling, dropped, base_TO)[0]

    def factors(self) -> FactorsOf:
        """(A, B, s, m)."""
        return self.lora_A, self.lora_B, self.scaling, self.magnitude

    @torch.no_grad()
    def unmoved(self) -> str | None:
        """Says so where B was trained and every m is the norm that it began as, to the bit."""
        start_O = self._squares().sqrt().to(self.magnitude)
        if not bool(self.lora_B.any()) or not torch.equal(self.magnitude, start_O):
            return None
        return "A and B were trained, the magnitude never moved: the optimiser does not have it"

    @torch.no_grad()
    def _norm_and_base(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """||V|| of each row, computed, and where tokens are few x W0^T (tokens, out) as well.

        One product of W0 with the rows of x and of A reads W0 once; alone, that with A takes as long as reading it.
        """
        tokens = x.numel() // self.in_features
        if STACK * tokens > self.out_features:
            return self._norm(), None
        both = F.linear(torch.cat([x.reshape(tokens, self.in_features), self.lora_A]), self.matrix)
        return self._norm(both[tokens:].t()), both[:tokens]

    @torch.no_grad()
    def _norm_and_parts(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Parts | None]:
        """||V|| of each row, and what its making has made for the layer's products in that type as well."""
        kept_O, plain = self._kept(), dtype == self.weight.dtype
        if narrow.kernels(x) is not None:
            if kept_O is not None or not plain or self._kernels() is None:
                return self._norm() if kept_O is None else kept_O, None
            with narrow.plainly(x), torch.inference_mode(False), torch.no_grad():
                return self._norm_by_kernels(self.magnitude)
        A_KI = factor(self.lora_A.detach(), dtype)
        if kept_O is None:
            plain = plain and not torch.is_autocast_enabled(x.device.type)
            kept_O = self._norm(on_factor(self.matrix, A_KI) if plain else None)
        given = (dtype, narrow.lift_of(dtype), self.scaling, self.magnitude.detach(), kept_O, self._alive)
        return kept_O, factors(self.lora_A.detach(), self.lora_B.detach(), *given, A_KI)

    def _sparse(self, x: Tensor) -> bool:
        """Does the authors' dropout have the form with one dense product here?"""
        return self.detach_norm and self.dropout <= SPARSE and x.device.type == "cpu"

    def _one_type(self, x: Tensor) -> bool:
        """Are input, base and adapter of one type, so that the layer can be computed in one buffer?"""
        return x.dtype == self.weight.dtype == self.lora_A.dtype and not torch.is_autocast_enabled(x.device.type)

    def _onto_base(self, x: Tensor, g_O: Tensor, second: bool) -> Tensor:
        """The form y = base + (g - 1) x W0^T + g s B A drop(x), with x dropped in the middle term too if `second`.

        It is what `Blocked` computes, by autograd and for every kind of layer.
        """
        dropped = self._drop(x)
        base = self._base(x)
        again = base
        if second:
            again = self._base(dropped, bias=False)
        elif (bias := self.offset) is not None:
            again = base - self.kind.across(bias)
        moved = torch.addcmul(base, again, self.kind.across(g_O - 1))
        return torch.addcmul(moved, self._low(dropped), self.kind.across(g_O * self.scaling)).to(base.dtype)

    @torch.no_grad()
    def _norm(self, WA_OR: Tensor | None = None) -> Tensor:
        """||V|| of each row, (out,), without a gradient; computed only when A, B or W0 are not what they were.

        WA_OR: W0 A^T, if it is at hand.
        """
        if self.lora_A.is_meta:
            return self.lora_A.new_empty(self.out_features)
        if is_traced():  # versions and addresses are no part of a graph
            return self._factored_norm(self._squares())
        if (kept_O := self._kept()) is not None:
            return kept_O
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be needed for gradients later
            return self._computed_norm(WA_OR)

    def _kernels(self) -> Any:
        """The kernels that make the norm, if they do: on any way to it, so that it is one to the bit."""
        if isinstance(self.kind, Opaque) or self.lora_A.dtype != torch.float32:
            return None
        return narrow.kernels(self.lora_A) if self.weight.dtype in (torch.bfloat16, torch.float16) else None

    def _norm_by_kernels(self, m_O: Tensor | None) -> tuple[Tensor, Parts | None]:
        """The norm, computed; with m the parts for the layer's products. Which rows are zero it does not know."""
        self._square_O = self._squares() if self._square_O is None else self._square_O
        self._alive = self._steady = False
        W_OI, s = self.kind.matrix(self.weight), self.scaling
        given = (W_OI, self.lora_A.detach(), self.lora_B.detach(), self._square_O, s, narrow.lift_of(W_OI.dtype))
        norm_O, made = self._kernels().normed(*given, None if m_O is None else m_O.detach())
        return self._keep(norm_O), made

    def _computed_norm(self, WA_OR: Tensor | None) -> Tensor:
        if self._kernels() is not None:
            with narrow.plainly(self.lora_A):
                return self._norm_by_kernels(None)[0]
        self._square_O = self._squares() if self._square_O is None else self._square_O
        return self._keep(self._factored_norm(self._square_O, WA_OR))

    def _keep(self, norm_O: Tensor) -> Tensor:
        self._norm_O = norm_O
        self._norm_stamp = self._stamps()
        if self.lora_A.device.type == "cpu":
            self._seen = [(bits, bits.clone()) for bits in map(_bits, (self.lora_A, self.lora_B))]
        return norm_O

    def _kept(self) -> Tensor | None:
        """The norm that is kept, if it is that of the A, B and W0 of now; forgets ||W0||^2 if that is another W0's."""
        weight = self._stamp(self._base_tensor())
        if weight != self._weight_stamp:
            self._square_O, self._weight_stamp, self._norm_O, self._rows = None, weight, None, Rows()
        if self._norm_O is None or self._stamps() != self._norm_stamp:
            return None
        # A and B may have been written through `.data`, which leaves no trace: looked for where looking costs little
        return self._norm_O if all(torch.equal(bits, seen) for bits, seen in self._seen) else None

    def _stamps(self) -> tuple[Any, ...]:
        # a norm from an evaluation may differ in its last bit from one of training, which must not depend on whether
        # there was an evaluation before: a resumed run has to go on exactly
        return (_steps[0], self.scaling, self.training, *self._stamp(self.lora_A), *self._stamp(self.lora_B))

    @staticmethod
    def _stamp(tensor: Tensor) -> tuple[Any, ...]:
        version = None if tensor.is_inference() else tensor._version
        return (version, tensor.data_ptr(), tensor.dtype, tensor.device)

    def _base_tensor(self) -> Tensor:
        """What a change of the base would show in: its weight, or an opaque layer's first tensor."""
        return self.weight if self.frozen is None else next(self.frozen.parameters(), self.lora_A)

    def _squares(self) -> Tensor:
        """||W0||^2 of each row."""
        if isinstance(self.kind, Opaque):
            return self.kind.dense(self.frozen).square().sum(1)
        W_OI = self.kind.matrix(self.weight)
        return torch.cat([wide(W_OI[rows]).square().sum(1) for rows in self._blocks()])

    def _blocks(self) -> list[slice]:
        if isinstance(self.kind, Opaque):
            return [slice(None)]  # every look at its rows builds them all
        size = max(1, BLOCK["cpu" if self.lora_A.device.type == "cpu" else "other"] // self.in_features)
        return [slice(start, start + size) for start in range(0, self.out_features, size)]

    def _on_factor(self, A_RI: Tensor) -> Tensor:
        """W0 A^T, (out, rank), in the type of A."""
        if isinstance(self.kind, Opaque):
            return self.kind.product(self.frozen, A_RI).to(A_RI.dtype).t()
        W_OI = self.kind.matrix(self.weight)
        if W_OI.dtype == A_RI.dtype:
            return W_OI @ A_RI.t()
        narrow_base = W_OI.dtype in (torch.bfloat16, torch.float16) and A_RI.dtype == torch.float32
        if narrow_base and A_RI.device.type in narrow.ON and not is_traced():
            return on_factor(W_OI, factor(A_RI, W_OI.dtype))
        return torch.cat([wide(W_OI[rows]) @ A_RI.t() for rows in self._blocks()])

    def _factored_norm(self, square_O: Tensor, WA_OR: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(device := self.lora_A.device.type):
            with torch.autocast(device, enabled=False):
                return self._factored_norm(square_O, WA_OR)
        A_RI, B_OR, s = self.lora_A.detach(), self.lora_B.detach(), self.scaling
        WA_OR = self._on_factor(A_RI) if WA_OR is None else WA_OR
        half_OR = torch.addmm(WA_OR, B_OR, A_RI @ A_RI.t(), beta=2 * s, alpha=s * s)
        new_O = (half_OR * B_OR).sum(1).add_(square_O)
        if is_traced():
            return new_O.clamp_min(0).sqrt()
        m_O: Tensor | None = self._parameters.get("magnitude")  # none while the layer is made
        if device in narrow.ON and m_O is not None:  # a device that is waited for is one that stands still
            self._steady, self._m_version = self._rows.steady(_steps[0]), m_O._version
            self._rows.ask(_steps[0], new_O, square_O, m_O)
            if self._steady:
                self._alive = True
                return new_O.sqrt_()
        sound_O = new_O > (CANCELS_ON if device in narrow.ON else CANCELS) * square_O
        self._alive = bool(sound_O.all())
        if self._alive:  # the usual case
            return new_O.sqrt_()
        norm_O = new_O.clamp_min(0).sqrt()
        rows = (~sound_O & (square_O > 0)).nonzero()[:, 0]
        if len(rows):
            norm_O[rows] = torch.cat([magnitude(self._direction(some)) for some in rows.split(1024)])
        return norm_O

    def _direct_norm(self) -> Tensor:
        """||V|| of each row through V itself, block of rows by block: the oracle, and part of the graph."""
        return torch.cat([magnitude(self._direction(rows)) for rows in self._blocks()])

    def _forget(self) -> None:
        self._square_O: Tensor | None = None
        self._norm_O: Tensor | None = None
        self._alive = False  # is it known that no row of V is zero?
        self._steady, self._rows, self._m_version = False, Rows(), -1
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._weight_stamp: tuple[Any, ...] = ()
        self._norm_stamp: tuple[Any, ...] = ()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()  # the module moves to another device or type
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> Any:
        """What is copied and pickled: all but what can be computed again."""
        self._forget()
        return super().__getstate__()


class MagnitudeLinear(AdaptedLinear):
    """Trains the magnitude alone: W' = m W0 / ||W0|| (table 6: what is not given a direction update).

    A row of zeros has no direction and stays zero.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.norm: Tensor
        self.register_buffer("norm", magnitude(self.base_weight()), persistent=False)
        self.magnitude = _initial(self.norm)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """m W0 / ||W0||, (out, in)."""
        return scale(self.magnitude, self.norm, False)[:, None] * self.base_weight()

    def factors(self) -> FactorsOf:
        """(A, B, 1, m), A and B of rank 0: there is no direction update."""
        like = self.magnitude  # on its device
        return like.new_zeros(0, self.in_features), like.new_zeros(self.out_features, 0), 1.0, like

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        base = self._base(x)
        again = base if self.offset is None else base - self.kind.across(self.offset)
        g_O = scale(self.magnitude, self.norm, False)
        return torch.addcmul(base, again, self.kind.across(g_O - 1)).to(base.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor as whole numbers: equal to themselves also where a number is nan, and few to compare."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.int64 if flat.nbytes % 8 == 0 else torch.uint8)


def _initial(norm_O: Tensor) -> nn.Parameter:
    """The magnitude that training begins with; raises ValueError if a row's norm is not a finite number."""
    if norm_O.device.type != "meta" and not bool(torch.isfinite(norm_O).all()):
        rows = (~torch.isfinite(norm_O)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"{len(rows)} rows of the base weight, the first is {rows[0]}, have a norm that is not finite: the weight "
            "holds inf, nan, or numbers whose squares overflow float32; load the base again or in a wider type"
        )
    return nn.Parameter(norm_O.clone())


def hold(layer: nn.Module, settings: Method, scaling: float) -> AdaptedLinear:
    """A layer for the factors and the magnitude of a file, to be filled; of no rank: for a magnitude alone."""
    if settings.rank is None:
        return MagnitudeLinear(layer)
    made = DoraLinear(layer, settings, torch.Generator())
    made.scaling = scaling  # as the file says it: alpha / rank may differ in the last bit
    return made


def prepare(model: nn.Module, method: Method, generator: torch.Generator) -> None:
    """Freeze the model, adapt its target modules with `DoraLinear` and the magnitude modules with `MagnitudeLinear`."""

    def make(name: str, layer: nn.Module, settings: Method) -> AdaptedLinear:
        if name.rpartition(".")[2] in method.magnitude_modules:
            return MagnitudeLinear(layer)
        return DoraLinear(layer, settings, generator)

    wrap(model, method, make)
    for name, layer in adapted(model):
        m_O: Any = layer.magnitude
        if m_O.device.type != "meta" and len(zero := (m_O == 0).nonzero()[:, 0].tolist()):
            warnings.warn(
                f"'{name}': {len(zero)} rows of the base weight are zero ({', '.join(map(str, zero[:5]))}, ...): they "
                "have no direction and a magnitude of 0 to begin with",
                stacklevel=4,
            )
