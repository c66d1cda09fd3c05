"""Architectures and odd layers against all that an adapter can be asked: `make matrix`, and a sample in the tests.

The oracle is PEFT in float64 (outputs, gradients, files, merged weights), never this package. A cell is *right*,
*refused* (an error about the input, whose words are the reason), *wrong*, or a *traceback*; *–* where PEFT itself has
no answer.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dora_lab import detach, export, inject, load_adapter, merge, save_adapter, unmerge
from dora_lab.io.atomic import write_text
from dora_lab.methods.inject import adapted
from dora_lab.probing.callback import DecompositionCallback
from dora_lab.probing.saved_models import probe
from dora_lab.runs import provenance
from dora_lab.spec import Method
from tests import matrix_models

RANK, ALPHA = 3, 6.0
HOW = ("right", "refused", "wrong", "traceback", "–")
CLOSE = 1e-9  # of a float64 output, beside its largest
PRODUCTS = (nn.Linear, Conv1D)
GROUPS = {"linear": PRODUCTS, "embedding": (nn.Embedding,), "convolution": (nn.Conv1d, nn.Conv2d)}


class Meaningless(Exception):
    """PEFT cannot do it, so there is nothing to be equal to."""


def first_tensor(output: Any) -> Tensor:
    """What a model says, whatever it wraps it in."""
    if isinstance(output, Tensor):
        return output
    named = [getattr(output, name, None) for name in ("logits", "last_hidden_state", "action_preds")]
    return next((one for one in named if one is not None), None) if any(one is not None for one in named) else output[0]


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference beside the largest number."""
    assert one.shape == other.shape, (one.shape, other.shape)
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def same(one: Tensor, other: Tensor, what: str, within: float = CLOSE) -> None:
    found = apart(one, other)
    assert found <= within, f"{what}: off by {found:.1e}"


def seen(module: Any, weight: Tensor) -> Tensor:
    """A weight as (out, in), by the type of the live module that it is of."""
    return weight.t() if isinstance(module, (Conv1D, nn.Embedding)) else weight.flatten(1)


def moved(W0: Tensor, W: Tensor) -> tuple[float, float]:
    """ΔM and ΔD of (out, in) matrices by their formulas; a row of zeros has no direction."""
    m0, m = W0.norm(dim=1), W.norm(dim=1)
    return (m - m0).abs().mean().item(), ((W / m[:, None] - W0 / m0[:, None]).square().sum(1) / 2).nanmean().item()


class Row:
    """One base, the layers that are adapted in it, a method; each thing is made when a check asks for it."""

    def __init__(self, name: str, targets: Sequence[str], dora: bool, folder: Path) -> None:
        self.base, self.given = matrix_models.made(name)
        self.targets, self.dora, self.folder = tuple(targets), dora, folder
        self.saved = hasattr(self.base, "save_pretrained")
        if self.saved:
            self.base.save_pretrained(folder / "base")
        self.method = Method(name="dora" if dora else "lora", rank=RANK, alpha=ALPHA, target_modules=self.targets)

    def fresh(self) -> Any:
        """The base, once more."""
        if not self.saved:
            return copy.deepcopy(self.base)
        return self.opened("base")

    def opened(self, part: str) -> Any:
        """A saved model of the base's class."""
        return type(self.base).from_pretrained(self.folder / part, dtype=torch.float64, **matrix_models.EAGER).eval()

    def says(self, model: Any) -> Tensor:
        with torch.no_grad():
            return first_tensor(model(**self.given))

    @cached_property
    def theirs(self) -> Any:
        """PEFT's adapter with random numbers in it, saved in the folder peft/."""
        try:
            config = peft.LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules=list(self.targets), use_dora=self.dora, lora_dropout=0.0
            )  # fmt: skip
            model = peft.get_peft_model(self.fresh(), config).double().eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "magnitude" in name:
                        parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
                    elif "lora_" in name:
                        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(self.folder / "peft")
            self.expected = self.says(model)
        except Exception as error:
            raise Meaningless(f"{type(error).__name__}: {error}") from None
        return model

    @cached_property
    def merged(self) -> Any:
        """PEFT's own merge."""
        self.theirs  # noqa: B018
        try:
            return peft.PeftModel.from_pretrained(self.fresh(), self.folder / "peft").merge_and_unload().eval()
        except Exception as error:
            raise Meaningless(f"{type(error).__name__}: {error}") from None

    @cached_property
    def ours(self) -> Any:
        """The same adapter, read by this package from PEFT's folder."""
        self.theirs  # noqa: B018
        return load_adapter(self.fresh(), self.folder / "peft").eval()

    @cached_property
    def truth(self) -> dict[str, tuple[float, float]]:
        """(ΔM, ΔD) of every adapted module, of the weight that PEFT's factors and magnitude make of the base's."""
        layers, found = dict(self.theirs.base_model.model.named_modules()), {}
        for name, _ in adapted(self.ours):
            plain = layers[name].get_base_layer()
            W0 = seen(plain, plain.weight.detach())
            W = W0 + seen(plain, layers[name].get_delta_weight("default").detach())
            if self.dora:
                m = layers[name].lora_magnitude_vector["default"].weight.detach().reshape(-1, 1)
                W = m * W / W.norm(dim=1, keepdim=True)
            found[name] = moved(W0, W)
        return found

    @cached_property
    def truth_whole(self) -> dict[str, tuple[float, float]]:
        """(ΔM, ΔD) of every adapted module in PEFT's merged model, where tied matrices have moved together."""
        before, after = dict(self.base.named_modules()), dict(self.merged.named_modules())
        return {
            name: moved(*(seen(before[name], one[name].weight.detach()) for one in (before, after)))
            for name, _ in adapted(self.ours)
        }


# ------------------------------------------------------------------------------------------------------------ checks
def identity(row: Row) -> None:
    model = row.fresh()
    inject(model, row.method, seed=0)
    same(row.says(model.eval()), row.says(row.base), "a new adapter")


def outputs(row: Row) -> None:
    same(row.says(row.ours), (row.theirs, row.expected)[1], "its output")


def gradients(row: Row) -> None:
    found = []
    for model in (row.theirs, row.ours):
        model.zero_grad()
        first_tensor(model(**row.given)).square().sum().backward()
    layers = dict(row.theirs.base_model.model.named_modules())
    for name, layer in adapted(row.ours):
        own, other = [layer.lora_A, layer.lora_B], layers[name]
        if "default" in getattr(other, "lora_embedding_A", {}):
            theirs = [other.lora_embedding_A["default"], other.lora_embedding_B["default"]]
        else:
            theirs = [other.lora_A["default"].weight, other.lora_B["default"].weight]
        if row.dora:
            own, theirs = [*own, layer.magnitude], [*theirs, other.lora_magnitude_vector["default"].weight]
        for one, its in zip(own, theirs, strict=True):
            assert (one.grad is None) == (its.grad is None), f"{name}: a gradient here alone, or in PEFT alone"
            if one.grad is not None:  # a layer that the batch does not come by has none
                found.append((one.grad.reshape(-1), its.grad.reshape(-1), f"{name}: its gradient"))
    largest = max((float(b.abs().max()) for _, b, _ in found), default=0.0)
    for one, other, what in found:
        assert float((one - other).abs().max()) <= CLOSE * max(largest, float(other.abs().max())), what


def to_peft(row: Row) -> None:
    save_adapter(row.ours, row.folder / "own")
    model = peft.PeftModel.from_pretrained(row.fresh(), row.folder / "own").eval()
    same(row.says(model), row.expected, "what PEFT reads of it")


def merging(row: Row) -> None:
    model = load_adapter(row.fresh(), (row.theirs, row.folder / "peft")[1]).eval()
    same(row.says(merge(model)), row.expected, "merged")
    same(row.says(unmerge(model)), row.expected, "taken apart again")
    detach(model)
    left, base = model.state_dict(), row.base.state_dict()
    assert left.keys() == base.keys() and all(torch.equal(left[name], base[name]) for name in base), "the base's bits"


def probed(row: Row, tuned: Path, truth: dict[str, tuple[float, float]]) -> None:
    rows = {one["module"]: one for one in probe(row.folder / "base", [tuned], kinds=row.targets)}
    for name, (dm, dd) in truth.items():
        one = rows.get(name) or next(one for one in rows.values() if name in (one["tied_with"] or "").split(", "))
        for what, found, right in (("ΔM", one["delta_m"], dm), ("ΔD", one["delta_d"], dd)):
            assert abs(found - right) <= 1e-5 * right + 1e-9, f"{name}: {what} {found:.6g}, {right:.6g} is right"


def probe_adapter(row: Row) -> None:
    probed(row, (row.theirs, row.folder / "peft")[1], row.truth)


def probe_whole(row: Row) -> None:
    row.merged.save_pretrained(row.folder / "merged")
    probed(row, row.folder / "merged", row.truth_whole)


def exporting(row: Row) -> None:
    export(load_adapter(row.fresh(), (row.theirs, row.folder / "peft")[1]), row.folder / "out")
    model = row.opened("out")
    same(row.says(model), row.expected, "the exported folder", 1e-6)
    if apart(row.says(row.merged), row.expected) < CLOSE:  # of tied matrices PEFT's own merge changes both
        for name, weight in row.merged.state_dict().items():
            same(model.state_dict()[name], weight, f"{name} beside PEFT's merge", 1e-6)


def callback(row: Row) -> None:
    model = row.fresh()
    inject(model, row.method, seed=0)
    watching = DecompositionCallback(lambda _: None, kinds=row.targets)
    watching.begin(model)
    trained = dict(adapted(row.ours))
    with torch.no_grad():
        for name, layer in adapted(model):
            for part, value in trained[name].trained_state().items():
                layer.trained_state()[part].copy_(value)
    rows = {one["module"]: one for one in watching.measure(model)}
    for name, (dm, dd) in row.truth.items():
        for what, found, right in (("ΔM", rows[name]["delta_m"], dm), ("ΔD", rows[name]["delta_d"], dd)):
            assert abs(found - right) <= 1e-5 * right + 1e-9, f"{name}: {what} {found:.6g}, {right:.6g} is right"


CHECKS: dict[str, Callable[[Row], None]] = {
    "identity": identity, "outputs": outputs, "gradients": gradients, "to PEFT": to_peft, "merge": merging,
    "callback": callback,
}  # fmt: skip
OF_FOLDERS = {"probe of the adapter": probe_adapter, "probe of the model": probe_whole, "export": exporting}


def cell(check: Callable[[Row], None], row: Row) -> tuple[str, str]:
    """(how it came out, why)."""
    try:
        check(row)
    except Meaningless as error:
        return "–", str(error)
    except AssertionError as error:
        return "wrong", str(error)
    except ValueError as error:  # all errors about input are
        return "refused", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "right", ""


def groups(name: str) -> Iterator[tuple[str, list[str]]]:
    """(kind of layer, leaf names) of what a model has to adapt, its head apart; names that are of another kind too are
    left out, and layers too small for the rank."""
    model, _ = matrix_models.made(name)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        kind = next((one for one, types in GROUPS.items() if isinstance(module, types)), None)
        if kind and (module is head or min(seen(module, module.weight).shape) < RANK):
            kind = "left out"
        if path and (kind or not list(module.children())):
            kinds.setdefault(path.rpartition(".")[2], set()).add(kind or "other")
    for kind in GROUPS:
        if leaves := sorted(leaf for leaf, of in kinds.items() if of == {kind}):
            yield kind, leaves


def results(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row per base, kind of layer, method and check: how it came out and why."""
    for name in names:
        odd = name in matrix_models.ODD
        for kind, targets in [("odd", ["fc"])] if odd else groups(name):
            for dora in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    row = Row(name, targets, dora, Path(folder))
                    for check, do in {**CHECKS, **(OF_FOLDERS if row.saved else {})}.items():
                        how, why = cell(do, row)
                        about = {"base": name, "kind": kind, "method": row.method.name, "check": check}
                        yield about | {"how": how, "why": why.replace(folder, "…").splitlines()[0][:300] if why else ""}


def quiet() -> None:
    """No bars and no advice: a line a base is enough."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def summed(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of a base: what was adapted, how many cells came out how, why those that did not come out right."""
    counts = {how: sum(row["how"] == how for row in rows) for how in HOW}
    reasons = {how: sorted({short(row["why"]) for row in rows if row["how"] == how}) for how in HOW[1:]}
    about = {"base": name}
    told = {f"{how} because": why for how, why in reasons.items() if why and how != "–"}
    return about | {how: count for how, count in counts.items() if count} | told


def short(why: str) -> str:
    """A reason without the folder and the place in the model, as far as its first stop."""
    why = re.sub(r"^…\S*: ", "", why)
    why = re.sub(r"^'?(?:[\w<>]+\.)*([\w<>]+)'?: ", r"\1: ", why)
    return re.split(r"[;,(]|: is it| what can:", why)[0].strip(" :")[:90]


def main(arguments: list[str] | None = None) -> int:
    """All of it; writes results/bench/matrix.jsonl, and ends with 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--results", type=Path, default=Path("results/local"))
    parser.add_argument("--only", default="", help="comma-separated names of bases")
    options = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    lines: list[dict[str, Any]] = [{"code": provenance.code(), "packages": versions}]
    for name in options.only.split(",") if options.only else matrix_models.ALL:
        begun, here = time.monotonic(), list(results([name]))
        lines.append(summed(name, here))
        told = ", ".join(f"{lines[-1][how]} {how}" for how in HOW if how in lines[-1])
        print(f"{name:30} {time.monotonic() - begun:5.1f} s  {told}", flush=True)
        for row in here:
            if row["how"] in ("wrong", "traceback"):
                print(f"    {row['kind']}, {row['method']}, {row['check']}: {row['how']}: {row['why']}", flush=True)
    file = options.results / "bench" / "matrix.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return int(any(how in line for line in lines for how in ("wrong", "traceback")))


if __name__ == "__main__":
    sys.exit(main())
