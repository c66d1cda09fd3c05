"""What is wrong with a training before its first step, from the spec and the number of steps alone (no torch)."""

from __future__ import annotations

from dora_lab.spec import Optim, SpecError


def rate_reached(optim: Optim, steps: int) -> float:
    """The highest learning rate of `steps` optimiser steps: the peak, where they outlast the warm-up.

    The first step of a warm-up has rate 0, the k-th (from 0) k / `warmup_steps` of the peak.
    """
    warmup = optim.warmup(steps)
    return optim.learning_rate * (1.0 if steps > warmup else (steps - 1) / warmup)


def refuse_in_vain(optim: Optim, steps: int) -> str | None:
    """Raises SpecError where nothing would be learnt, or nothing kept, after `steps` steps of training.

    Returns what a reader of the run should know: that the peak of the learning rate is not reached; else None.
    """
    reached = rate_reached(optim, steps)
    where = f"optim.warmup_steps = {optim.warmup_steps}: training has {steps} step{'s' * (steps > 1)}"
    if reached == 0:
        raise SpecError(f"{where}, all of learning rate 0; set fewer warm-up steps, or train longer (optim.epochs)")
    if optim.keep == "best_loss" and optim.eval_steps is not None and optim.eval_steps > steps:
        raise SpecError(
            f"optim.eval_steps = {optim.eval_steps}: training has {steps} steps, so no validation loss to keep the "
            "best weights by; lower it, or set optim.keep to last"
        )
    if reached < optim.learning_rate:
        return f"{where}, the learning rate reaches {reached:g} of optim.learning_rate = {optim.learning_rate:g}"
    return None
