"""The decomposition while training: a callback for `transformers.Trainer` that anybody can attach.

At given fractions of the training it writes one row per watched matrix: how far its magnitude and its direction have
moved from where they began (section 3.2, equations 3 and 4). It changes nothing: no weight, no mode, no random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_lab.adapters import AdaptedLinear
from dora_lab.decompose import delta_d, delta_m, relative_change
from dora_lab.spec import did_you_mean

LLAMA_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class DecompositionCallback(TrainerCallback):
    """Writes a row (see `measure`) with `step` and `fraction` for every watched matrix at every fraction.

    write: takes one row, e.g. ``lambda row: run.append("probe", row)``.
    fractions: of all optimiser steps, each in (0, 1]; the step is the nearest, and at least the first.
    kinds: leaf names of the watched modules; all linear, all present.
    initial: gives the initial weight (out, in) by its parameter name ("model.layers.0.self_attn.q_proj.weight"), e.g.
        ``safetensors.safe_open(file, "pt").get_tensor``. Not needed for adapted layers, whose base weight is frozen.
        Without it the weights of other layers are copied when training begins, which costs their size in memory, and
        training cannot be resumed.

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

    def begin(self, model: nn.Module, step: int = 0) -> None:
        """Note where every watched matrix starts; `step` > 0 says that training is being resumed."""
        self._copies = {}
        for name, module in _watched(model, self.kinds):
            if isinstance(module, AdaptedLinear) or self.initial is not None:
                continue
            if step > 0:
                raise ValueError(
                    f"training resumes at step {step} and '{name}' is trained itself: its initial weight is gone; "
                    "give DecompositionCallback(initial=...)"
                )
            self._copies[name] = module.weight.detach().clone()

    @torch.no_grad()
    def measure(self, model: nn.Module) -> list[dict[str, Any]]:
        """One row per watched matrix, now; `begin` has to be called before.

        Keys: module (its name), layer (the first number in that name, None if there is none), kind (leaf name),
        delta_m (units of the weight), delta_d (in [0, 2]), relative_change (Frobenius norm of W - W0 over that of W0),
        delta_m_in and delta_d_in (the same two with one magnitude per input feature, the other axis).
        """
        rows = []
        for name, module in _watched(model, self.kinds):
            adapted = isinstance(module, AdaptedLinear)
            W_OI = module.effective_weight() if adapted else module.weight
            W0_OI = module.weight if adapted else self._start(name).to(W_OI.device)
            parts = name.split(".")
            rows.append(
                {
                    "module": name,
                    "layer": next((int(part) for part in parts if part.isdigit()), None),
                    "kind": parts[-1],
                    "delta_m": delta_m(W0_OI, W_OI),
                    "delta_d": delta_d(W0_OI, W_OI),
                    "relative_change": relative_change(W0_OI, W_OI),
                    "delta_m_in": delta_m(W0_OI.t(), W_OI.t()),
                    "delta_d_in": delta_d(W0_OI.t(), W_OI.t()),
                }
            )
        return rows

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
            for row in rows:
                self.write({"step": state.global_step, "fraction": fraction, **row})

    def _start(self, name: str) -> Tensor:
        if self.initial is not None:
            return self.initial(f"{name}.weight")
        if name not in self._copies:
            raise ValueError(f"'{name}' has no initial weight; call begin(model) before training")
        return self._copies[name]


def probe_step(fraction: float, max_steps: int) -> int:
    """The optimiser step, 1 .. max_steps, at which `fraction` in (0, 1] of the training is measured."""
    return max(1, math.floor(fraction * max_steps + 0.5))


def _watched(model: nn.Module, kinds: Sequence[str]) -> list[tuple[str, Any]]:
    """(name, module) of the modules with a leaf name in `kinds`, in the model's order."""
    found: list[tuple[str, Any]] = []
    linear: set[str] = set()
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, AdaptedLinear) or type(module) is nn.Linear:
            linear.add(kind)
            found += [(name, module)] if kind in kinds else []
        elif kind in kinds:
            raise ValueError(f"probe: '{name}' is a {type(module).__name__}, neither nn.Linear nor adapted here")
    for kind in kinds:
        if kind not in {name.rpartition(".")[2] for name, _ in found}:
            raise ValueError(f"probe: no module is named '{kind}'; {did_you_mean(kind, linear)}")
    return found
