"""Are the numbers right on the device: every method against float64 on the processor, against PEFT's, and the probe.

Fresh random inputs every time; an error is ‖a - b‖ / ‖b‖, the worst over output and gradients, on two layers (with a
bias and without). TF32 is off. Kernels, resume and `shard` are tried in processes of their own (`child`).
Shape suffixes: O = out features, I = in features, R = rank, T = tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import secrets
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_lab.methods.catalog import entry_of
from experiments.gpu import child, lab
from experiments.gpu.models import SEVEN, llama, put_on, stir
from experiments.gpu.visit import Visit

TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3, "autocast": 8e-3}  # a step of the type at most
START = {
    "float32": 1e-6,
    "bfloat16": 0.0,
    "float16": 0.0,
    "autocast": 0.0,
}  # before training: in one type the bias is added later
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "autocast": torch.float32}
RANK, DROPOUT = 16, 0.3
CASES: dict[str, dict[str, Any]] = {
    "lora, dropout": {"name": "lora", "dropout": DROPOUT},
    "dora, published dropout": {"name": "dora", "dropout": DROPOUT},
    "dora, branch dropout": {"name": "dora", "dropout": DROPOUT, "dropout_form": "branch"},
    "dora, norm in the graph": {"name": "dora", "detach_norm": False},
    "dora, magnitudes alone": {"name": "dora", "target_modules": ("first",), "magnitude_modules": ("second",)},
}


class Two(nn.Module):
    """Two linear layers, called one by one."""

    def __init__(self, width: int = 384) -> None:
        super().__init__()
        self.first = nn.Linear(width, 320)
        self.second = nn.Linear(width, 448, bias=False)


def run(visit: Visit) -> None:
    """All cells; what runs in processes of its own is started first and waited for last."""
    with contextlib.ExitStack() as stack:
        waiting = child.started(visit, stack)
        cases = {name: {"name": name} for name in lab.methods()} | CASES
        for label, precision in itertools.product(cases, TOLERANCE):
            check = functools.partial(against_float64, visit, cases[label], precision)
            visit.cell("right", f"{label}: {precision}", 1, check)
        for dropout in (0.0, DROPOUT):
            visit.cell("right", f"PEFT's DoRA, dropout {dropout:g}", 2, functools.partial(_peft, visit, dropout))
        for name in ("ours/lora", "ours/dora", "ours/dora-magnitudes"):
            visit.cell("right", f"probe: {name}", 3, functools.partial(_probe, visit, name))
        for each in waiting:
            each.finish(visit)


def method(fields: dict[str, Any]) -> Any:
    """The method of a case, with a small adapter on both layers where it has one."""
    adapter = {"rank": RANK, "alpha": 2.0 * RANK, "target_modules": ("first", "second")}
    read = entry_of(fields["name"]).fields
    return lab.Method(**{name: value for name, value in adapter.items() if name in read} | fields)


def against_float64(visit: Visit, fields: dict[str, Any], precision: str, fused: bool = False) -> dict[str, Any]:
    """Errors of output, gradients and merged layer of one method in one precision; with `fused`, by the kernels."""
    seed = secrets.randbelow(2**31)
    torch.manual_seed(seed)
    dtype = STORED[precision]
    model = Two().to(visit.device, dtype)
    truth = copy.deepcopy(model).cpu().double()
    plain = copy.deepcopy(model)
    for one in (model, truth):
        lab.inject(one, method(fields), seed=0)
    lab.narrow.FUSED = fused and lab.narrow.THERE
    starts = _start(visit, model, plain, precision)
    stir(model, 0.02)
    if fused and fields["name"] == "dora":
        _strange(model, nothing=not fields.get("dropout"))
    truth.load_state_dict({name: value.double().cpu() for name, value in model.state_dict().items()})
    errors = {"start": starts}
    for name in ("first", "second"):
        layers = (getattr(model, name), getattr(truth, name))
        for what, error in _layer_errors(visit, *layers, fields, precision).items():
            errors[what] = max(error, errors.get(what, 0.0))
    worst, tolerance = max(errors.values()), TOLERANCE[precision]
    about = {"seed": seed, "errors": errors, "worst": worst, "tolerance": tolerance}
    return about | {"ok": worst <= tolerance and starts <= START[precision]}


@torch.no_grad()
def _strange(model: Any, nothing: bool) -> None:
    """What the kernels decide by themselves: an m of zero, a V that is small beside W0 and, if asked for, none."""
    for layer in (model.first, model.second):
        layer.magnitude[7] = 0
        layer.weight[3] = (-0.92 * layer.scaling * layer.lora_B[3] @ layer.lora_A).to(layer.weight.dtype)
        if nothing:
            layer.weight[5], layer.lora_B[5] = 0, 0


@torch.no_grad()
def _start(visit: Visit, model: Any, plain: Any, precision: str) -> float:
    """How far the adapted layers are from their base before training."""
    x = torch.randn(6, 50, plain.first.in_features, device=visit.device, dtype=plain.first.weight.dtype)
    model.eval()
    with _precision(visit, precision):
        errors = [apart(getattr(model, name)(x), getattr(plain, name)(x)) for name in ("first", "second")]
    model.train()
    return max(errors)


def _layer_errors(visit: Visit, layer: Any, truth: Any, fields: dict[str, Any], precision: str) -> dict[str, float]:
    width, out = layer.in_features, layer.out_features
    narrow = STORED[precision]
    x = torch.randn(6, 50, width, device=visit.device, dtype=narrow).requires_grad_()
    state = torch.randint(0, 2**31, ()).item()
    torch.manual_seed(state)
    with _precision(visit, precision):
        y = layer(x)
    upstream = torch.randn(6, 50, out, device=visit.device, dtype=y.dtype)
    wide_x = x.detach().cpu().double().requires_grad_()
    if fields.get("dropout"):
        torch.manual_seed(state)
        kept = _kept(x, fields["name"], torch.bfloat16 if precision == "autocast" else narrow).cpu().double()
        expected = _by_hand(truth, wide_x, kept / (1 - fields["dropout"]), fields)
    elif fields.get("detach_norm", True):
        expected = truth(wide_x)
    else:
        expected = _of_rounded_product(truth, wide_x, y.dtype)
    found = _gradients(layer, x, y, upstream)
    wanted = _gradients(truth, wide_x, expected, upstream.cpu().double())
    return {name: apart(found[name], wanted[name]) for name in wanted} | _merged(visit, layer, truth, x, precision)


@torch.no_grad()
def _merged(visit: Visit, layer: Any, truth: Any, x: Tensor, precision: str) -> dict[str, float]:
    """The error of the plain layer that an adapted one is merged into."""
    if not hasattr(layer, "merge"):
        return {}
    with _precision(visit, precision):
        seen = layer.merge()(x)
    return {"merged": apart(seen, truth.eval()(x.cpu().double()))}


def _precision(visit: Visit, precision: str) -> Any:
    return torch.autocast(visit.device, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


def _kept(x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Where dropout left its input, drawn again as the layer drew it: 1 and 0, of x's shape."""
    if dtype != torch.float32:
        ones = torch.ones(x.shape, device=x.device, dtype=dtype).reshape(-1, x.shape[-1])
        return torch.native_dropout(ones, DROPOUT, True)[1].view(x.shape)
    if name == "lora":
        return (F.dropout(torch.ones_like(x), DROPOUT) > 0).to(x.dtype)
    ones = torch.ones(x.shape, device=x.device, dtype=dtype).reshape(-1, x.shape[-1])
    return lab.products._drop(ones, DROPOUT)[1].view(x.shape)


def _by_hand(truth: Any, x: Tensor, mask: Tensor, fields: dict[str, Any]) -> Tensor:
    """The layer's equations with a given mask, by autograd."""
    bias = 0.0 if truth.bias is None else truth.bias
    dropped = x * mask
    low = truth.scaling * F.linear(F.linear(dropped, truth.lora_A), truth.lora_B)
    base = F.linear(x, truth.weight)
    if fields["name"] == "lora":
        return base + low + bias
    V_OI = truth.weight + truth.scaling * truth.lora_B @ truth.lora_A
    g_O = truth.magnitude / lab.magnitude(V_OI).detach()
    if fields.get("dropout_form") == "branch":
        return g_O * (base + low) + bias
    return base + (g_O - 1) * F.linear(dropped, truth.weight) + g_O * low + bias


def _of_rounded_product(truth: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer's equations with the norm in the graph, of a base product that is rounded as the base's own is.

    Where V is small beside W0, x W0^T and s B A x cancel, and its rounding is a large part of what is left. Through the
    norm the gradient of m goes into those of A and B, where such a row outweighs the others: 4 of 20 draws in bfloat16
    were above the tolerance for that alone.
    """
    bias = 0.0 if truth.bias is None else truth.bias
    base = F.linear(x, truth.weight, truth.bias)
    base = base + (base.to(dtype).double() - base).detach() - bias
    V_OI = truth.weight + truth.scaling * truth.lora_B @ truth.lora_A
    zero_O = V_OI.detach().square().sum(1) == 0
    g_O = truth.magnitude / V_OI.square().sum(1).masked_fill(zero_O, 1.0).sqrt()
    low = truth.scaling * F.linear(F.linear(x, truth.lora_A), truth.lora_B)
    return g_O.masked_fill(zero_O, 1.0) * (base + low) + bias


def _gradients(layer: Any, x: Tensor, y: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    named = {"dx": x} | {f"d {name}": p for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y} | dict(zip(named, torch.autograd.grad(y, list(named.values()), upstream), strict=True))


def apart(found: Tensor, expected: Tensor) -> float:
    """‖a - b‖ / ‖b‖ in float64; infinite where a number is not one."""
    difference = (found.detach().cpu().double() - expected.detach().cpu().double()).norm()
    error = (difference / expected.detach().cpu().double().norm()).item()
    return error if error == error else float("inf")


def _peft(visit: Visit, dropout: float) -> dict[str, Any]:
    """Our DoRA and PEFT's in float32, with the same dropout mask."""
    import peft

    seed = secrets.randbelow(2**31)
    torch.manual_seed(seed)
    ours, theirs = (Two().to(visit.device) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    lab.inject(ours, method({"name": "dora", "dropout": dropout}), seed=0)
    stir(ours, 0.02)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=["first", "second"], use_dora=True
    )  # fmt: skip
    peft.get_peft_model(theirs, config)  # type: ignore[arg-type]
    errors: dict[str, float] = {}
    for name in ("first", "second"):
        mine, twin = getattr(ours, name), getattr(theirs, name)
        with torch.no_grad():
            for part in ("lora_A", "lora_B"):
                getattr(twin, part)["default"].weight.copy_(getattr(mine, part))
            twin.lora_magnitude_vector["default"].weight.copy_(mine.magnitude.view_as(_m(twin)))
        x = torch.randn(6, 50, mine.in_features, device=visit.device, requires_grad=True)
        found: list[dict[str, Tensor]] = []
        state = torch.randint(0, 2**31, ()).item()
        upstream = torch.randn(6, 50, mine.out_features, device=visit.device)
        for layer in (mine, twin):
            torch.manual_seed(state)
            parts = (x, *_factors(layer))
            y = layer(x)
            gradients = torch.autograd.grad(y, parts, upstream)
            found.append(dict(zip(("y", "dx", "dA", "dB", "dm"), (y, *gradients), strict=True)))
        for what in found[0]:
            error = apart(found[0][what].reshape(-1), found[1][what].reshape(-1))
            errors[what] = max(error, errors.get(what, 0.0))
    worst, tolerance = max(errors.values()), TOLERANCE["float32"]
    about = {"seed": seed, "peft": peft.__version__, "errors": errors, "worst": worst, "tolerance": tolerance}
    return about | {"ok": worst <= tolerance}


def _m(layer: Any) -> Tensor:
    return layer.lora_magnitude_vector["default"].weight


def _factors(layer: Any) -> tuple[Tensor, ...]:
    if hasattr(layer, "magnitude"):
        return layer.lora_A, layer.lora_B, layer.magnitude
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, _m(layer)


def _probe(visit: Visit, name: str) -> dict[str, Any]:
    """Rows of the live probe on the device and of the same weights on the processor."""
    model = llama(visit, torch.float32, layers=1)
    callback = lab.DecompositionCallback(lambda row: None)
    with put_on(model, name, SEVEN, visit.size.rank, 2.0 * visit.size.rank):
        rows: Callable[[], list[dict[str, Any]]] = lambda: callback.measure(model)  # noqa: E731
        callback.begin(model)
        there = rows()
        model.cpu()
        callback.begin(model)
        here = rows()
    worst = max(
        abs(one[key] - other[key]) / max(abs(other[key]), 1e-9)
        for one, other in zip(there, here, strict=True)
        for key in ("delta_m", "delta_d", "relative_change", "delta_m_in", "delta_d_in")
    )
    return {"rows": len(there), "worst": worst, "tolerance": 1e-4, "ok": worst <= 1e-4}
