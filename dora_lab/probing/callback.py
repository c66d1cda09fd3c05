"""The decomposition while training: a callback for `transformers.Trainer` that anybody can attach.

At given fractions of the training it writes one row per watched matrix: how far its magnitude and its direction have
moved from where they began (section 3.2, equations 3 and 4). It changes nothing: no weight, no mode, no random state.

Full fine-tuning, this lab's adapters and PEFT's are understood (see `watched`); the columns are those of `measure`.
With DDP the first process measures and writes; with FSDP2 (`fully_shard`) every process takes part in gathering one
matrix at a time, and the first writes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_lab import distributed
from dora_lab.decompose import Change, change, factored_change, row, squares, wide
from dora_lab.probing.watched import Layer, unwatched, watched

LLAMA_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class DecompositionCallback(TrainerCallback):
    """Writes a row (see `measure`) with `step` and `fraction` for every watched matrix at every fraction.

    write: takes one row, e.g. ``lambda row: run.append("probe", row)``.
    fractions: of all optimiser steps, each in (0, 1]; the step is the nearest, and at least the first.
    kinds: leaf names of the watched modules; all matrices, all present. None: whatever is trained, embeddings and the
        head only if they are adapted or trained beside an adapter.
    initial: gives the initial weight, as the model stores it, by its parameter name
        ("model.layers.0.self_attn.q_proj.weight"), e.g. ``safetensors.safe_open(file, "pt").get_tensor``. Not needed
        for layers whose base weight is frozen. Without it the weights of layers that are trained themselves are copied
        when training begins, which costs their size in memory, and training cannot be resumed; the same goes for
        adapters of PEFT that take what they begin with out of the base weight (PiSSA, OLoRA, CorDA).

    Warns when DoRA's directions have moved and no magnitude of a layer has: a trainer that does not train it.

    Raises ValueError for a wrong fraction; when training begins, for a kind that matches nothing or no matrix, for
    adapters that cannot be measured, and where initial weights are not to be had (a resumed training; adapters that
    change the base weight for good, as KaSA).
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        kinds: Sequence[str] | None = None,
        initial: Callable[[str], Tensor] | None = None,
    ) -> None:
        if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
            raise ValueError(f"fractions {wrong} are not in (0, 1]")
        self.write = write
        self.fractions = tuple(fractions)
        self.kinds = None if kinds is None else tuple(kinds)
        self.initial = initial
        self._copies: dict[str, Tensor] = {}  # module name to W0, of layers that are themselves trained
        self._squares: dict[str, Tensor] = {}  # module name to |W0|^2 of each row, of frozen bases

    def begin(self, model: nn.Module, step: int = 0) -> None:
        """Note where every watched matrix starts; `step` > 0 says that training is being resumed."""
        self._copies, self._squares = {}, {}
        if self.kinds is None and (left := unwatched(model)):
            warnings.warn(f"probe: '{left[0]}' ({len(left)} such) is trained, but no matrix: no rows", stacklevel=2)
        tried = False
        for layer in watched(model, self.kinds):
            if layer.base is not None:
                continue
            if self.initial is not None:
                if not tried:  # names that do not fit are told now, not in the midst of training
                    self._start(layer)
                    tried = True
                continue
            if layer.lost is not None:
                raise ValueError(
                    f"probe: '{layer.name}': {layer.lost}, so what it was before is not in the model; give "
                    "DecompositionCallback(initial=...)"
                )
            if step > 0:
                raise ValueError(
                    f"training resumes at step {step} and '{layer.name}' is trained itself: its initial weight is "
                    "gone; give DecompositionCallback(initial=...)"
                )
            assert layer.copied is not None
            self._copies[layer.name] = layer.copied()  # of a sharded weight, this process's part

    @torch.no_grad()
    def measure(self, model: nn.Module) -> list[dict[str, Any]]:
        """One row per watched matrix, now; `begin` has to be called before.

        Keys: see `measure`, from `module` on; delta_m_in and delta_d_in are delta_m and delta_d with one magnitude per
        input feature, the other axis.

        With sharded weights every process has to call this; all but the first get no rows.
        """
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        layers = watched(model, self.kinds)
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
        W0_OI = self._start(layer)
        if layer.factors is None:
            W_OI = layer.now()
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
        if layer.base is not None:
            return layer.base()
        if self.initial is not None:
            return layer.seen(self.initial(f"{layer.name}.weight"))
        if layer.name not in self._copies:
            raise ValueError(
                f"'{layer.name}' has no initial weight; call begin(model) before training, and after freezing what "
                "is not trained at all"
            )
        return layer.seen(distributed.whole(self._copies[layer.name]).detach())


def probe_step(fraction: float, max_steps: int) -> int:
    """The optimiser step, 1 .. max_steps, at which `fraction` in (0, 1] of the training is measured."""
    return max(1, math.floor(fraction * max_steps + 0.5))
