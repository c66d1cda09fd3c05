"""The decomposition while training: a callback for `transformers.Trainer` that anybody can attach.

At given fractions of the training it writes one row per watched matrix: how far its magnitude and its direction have
moved from where they began (section 3.2, equations 3 and 4). It changes nothing: no weight, no mode, no random state.

Full fine-tuning, this lab's adapters and PEFT's LoRA and DoRA are understood; the columns are those of `measure`. With
DDP the first process measures and writes; with FSDP2 (`fully_shard`) every process takes part in gathering one matrix
at a time, and the first writes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_lab import distributed
from dora_lab.decompose import Change, change, factored_change, row, squares, wide
from dora_lab.methods.contract import AdaptedLinear, FactorsOf
from dora_lab.methods.layers import Opaque, kind_of
from dora_lab.spec import did_you_mean

LLAMA_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """A watched layer, whoever adapted it."""

    name: str  # of the module in the base model
    W0_OI: Callable[[], Tensor]  # the frozen base weight; of a layer that is trained itself, its weight now
    factors: Callable[[], FactorsOf] | None = None
    dense: Callable[[], Tensor] | None = None  # the effective weight, where there are no factors to be had
    trained: Tensor | None = None  # the weight itself, where it is what is trained


class DecompositionCallback(TrainerCallback):
    """Writes a row (see `measure`) with `step` and `fraction` for every watched matrix at every fraction.

    write: takes one row, e.g. ``lambda row: run.append("probe", row)``.
    fractions: of all optimiser steps, each in (0, 1]; the step is the nearest, and at least the first.
    kinds: leaf names of the watched modules; all linear, all present.
    initial: gives the initial weight (out, in) by its parameter name ("model.layers.0.self_attn.q_proj.weight"), e.g.
        ``safetensors.safe_open(file, "pt").get_tensor``. Not needed for adapted layers, whose base weight is frozen.
        Without it the weights of layers that are trained themselves are copied when training begins, which costs their
        size in memory, and training cannot be resumed.

    Warns when DoRA's directions have moved and no magnitude of a layer has: a trainer that does not train it.

    Raises ValueError for a wrong fraction; when training begins, for a kind that matches nothing or nothing linear, and
    for a resumed training whose initial weights are not to be had.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        kinds: Sequence[str] = LLAMA_KINDS,
        initial: Callable[[str], Tensor] | None = None,
    ) -> None:
        if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
            raise ValueError(f"fractions {wrong} are not in (0, 1]")
        self.write = write
        self.fractions = tuple(fractions)
        self.kinds = tuple(kinds)
        self.initial = initial
        self._copies: dict[str, Tensor] = {}  # module name to W0, of layers that are themselves trained
        self._squares: dict[str, Tensor] = {}  # module name to |W0|^2 of each row, of frozen bases

    def begin(self, model: nn.Module, step: int = 0) -> None:
        """Note where every watched matrix starts; `step` > 0 says that training is being resumed."""
        self._copies, self._squares = {}, {}
        for layer in _watched(model, self.kinds):
            if layer.trained is None or self.initial is not None:
                continue
            if step > 0:
                raise ValueError(
                    f"training resumes at step {step} and '{layer.name}' is trained itself: its initial weight is "
                    "gone; give DecompositionCallback(initial=...)"
                )
            self._copies[layer.name] = layer.trained.detach().clone()  # of a sharded weight, this process's part

    @torch.no_grad()
    def measure(self, model: nn.Module) -> list[dict[str, Any]]:
        """One row per watched matrix, now; `begin` has to be called before.

        Keys: see `measure`, from `module` on; delta_m_in and delta_d_in are delta_m and delta_d with one magnitude per
        input feature, the other axis.

        With sharded weights every process has to call this; all but the first get no rows.
        """
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        layers = _watched(model, self.kinds)
        if not first and not distributed.is_sharded(model):
            return []
        rows = []
        for layer in layers:
            found = self._change(layer, first)
            if found is not None:
                across = row(layer.name, found[2], "in", None)
                sides = {f"{name}_in": across[name] for name in ("delta_m", "delta_d")}
                rows.append(row(layer.name, found[0], "out", found[1]) | sides)
        return rows

    def _change(self, layer: Layer, first: bool) -> tuple[Change, Tensor | None, Change] | None:
        """The change of a layer, its magnitude, if it has one, and the change by the other axis.

        None where this process only helps to gather.
        """
        W0_OI = self._start(layer) if layer.trained is not None else layer.W0_OI()
        if layer.factors is None:
            W_OI = layer.dense() if layer.dense is not None else layer.W0_OI()
            W0_OI = W0_OI.to(W_OI.device)
            return (change(W0_OI, W_OI), None, change(W0_OI, W_OI, axis="in")) if first else None
        A_RI, B_OR, s, m_O = layer.factors()
        if not first:
            return None
        if layer.name not in self._squares:
            self._squares[layer.name] = squares(W0_OI)
        found = factored_change(W0_OI, A_RI, B_OR, s, m_O, self._squares[layer.name])
        W_OI = torch.addmm(wide(W0_OI), B_OR.to(wide(W0_OI)), A_RI.to(wide(W0_OI)), alpha=s)
        if m_O is not None:
            W_OI *= (m_O / found.norm.masked_fill(found.norm == 0, 1.0)).to(W_OI)[:, None]
        return found, m_O, change(W0_OI, W_OI, axis="in")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer."""
        self.begin(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer after every optimiser step."""
        due = [fraction for fraction in self.fractions if probe_step(fraction, state.max_steps) == state.global_step]
        if not due:
            return
        rows = self.measure(kwargs["model"])
        for fraction in due:
            for found in rows:
                self.write({"step": state.global_step, "fraction": fraction, **found})
        if still := [found["module"] for found in rows if found["magnitude_still"]]:
            warnings.warn(
                f"step {state.global_step}: no magnitude of '{still[0]}' ({len(still)} such layers) has moved, though "
                "its directions have: is the magnitude trained?",
                stacklevel=2,
            )

    def _start(self, layer: Layer) -> Tensor:
        if self.initial is not None:
            return self.initial(f"{layer.name}.weight")
        if layer.name not in self._copies:
            raise ValueError(f"'{layer.name}' has no initial weight; call begin(model) before training")
        return _whole(self._copies[layer.name])


def probe_step(fraction: float, max_steps: int) -> int:
    """The optimiser step, 1 .. max_steps, at which `fraction` in (0, 1] of the training is measured."""
    return max(1, math.floor(fraction * max_steps + 0.5))


def _watched(model: nn.Module, kinds: Sequence[str]) -> list[Layer]:
    """The layers with a leaf name in `kinds`, in the model's order."""
    found: list[Layer] = []
    linear: set[str] = set()
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        layer = _layer(name.removeprefix(PEFT_PREFIX), module, kind in kinds)
        if layer is not None:
            linear.add(kind)
            found += [layer] if kind in kinds else []
        elif kind in kinds:
            raise ValueError(f"probe: '{name}' is a {type(module).__name__}, neither nn.Linear nor adapted")
    for kind in kinds:
        if kind not in {layer.name.rpartition(".")[2] for layer in found}:
            raise ValueError(f"probe: no module is named '{kind}'; {did_you_mean(kind, linear)}")
    return found


def _layer(name: str, module: Any, wanted: bool) -> Layer | None:
    if isinstance(module, AdaptedLinear):
        return _ours(name, module)
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        return _peft(name, module) if wanted else Layer(name, lambda: module.base_layer.weight)
    if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):  # PEFT's copy that is trained
        (active,) = module.active_adapters if hasattr(module, "active_adapters") else [module.active_adapter]
        before, after = module.original_module, module.modules_to_save[active]
        return Layer(name, lambda: _whole(before.weight), dense=lambda: _whole(after.weight))
    if type(module) is not nn.Linear and not (
        nn.Linear in type(module).__mro__ and distributed.is_sharded(module, recurse=False)
    ):
        return None
    return Layer(name, lambda: _whole(module.weight), trained=module.weight)


def _ours(name: str, layer: AdaptedLinear) -> Layer:
    def base() -> Tensor:
        return layer.base_weight() if layer.weight is None else layer.kind.matrix(_whole(layer.weight))

    if (found := layer.factors()) is None:
        return Layer(name, base, dense=layer.effective_weight)
    A, B, s, m = found
    return Layer(name, base, lambda: (_whole(A), _whole(B), s, None if m is None else _whole(m)))


def _peft(name: str, layer: Any) -> Layer:
    """PEFT's LoRA and DoRA on a linear layer, Conv1D or embedding."""
    active = list(layer.active_adapters)
    if len(active) != 1 or layer.merged:
        raise ValueError(f"probe: '{name}' has the adapters {active}, merged: {layer.merged}; one, unmerged, is needed")
    key, kind = active[0], kind_of(layer.base_layer)

    def base() -> Tensor:
        if isinstance(kind, Opaque):
            return kind.dense(layer.base_layer)
        return kind.matrix(_whole(layer.base_layer.weight))

    def factors() -> FactorsOf:
        if key in layer.lora_embedding_A:
            A, B = _whole(layer.lora_embedding_A[key]), _whole(layer.lora_embedding_B[key])
        else:
            A, B = _whole(layer.lora_A[key].weight), _whole(layer.lora_B[key].weight)
        m = layer.lora_magnitude_vector[key].weight if key in layer.lora_magnitude_vector else None
        return A.flatten(1), B.flatten(1), layer.scaling[key], None if m is None else _whole(m).reshape(-1)

    return Layer(name, base, factors)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded: then every process has to come by here."""
    return distributed.whole(tensor).detach()
