"""Is every row of a DoRA layer far from where it needs a closer look? Asked of a GPU without waiting for the answer.

A row needs one where V is much smaller than W0 (the expanded square of its norm has lost its digits), where V is zero
or where m is. To look for such rows at every step is to wait for the device at every step, which then has nothing to do
until the next start. But rows come there step by step. So the answer is fetched when it is there, some steps later, has
margins for what a row moves in the meantime, and holds for some steps. A layer that is not known to be steady is looked
at closely, as is one that anything but an optimiser's step has written into.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

EVERY = 8  # optimiser steps between two questions
HOLDS = 24  # optimiser steps that an answer holds for, from its question on
SHARE = 0.05  # of ||W0||^2, that each ||V||^2 is at least
GAIN = 0.01  # that each |m| / ||V|| is at least


class _Question(NamedTuple):
    step: int
    numbers: Tensor  # on the processor, there when `arrived` is
    arrived: Any


class Rows:
    """What is known of the rows of one layer; `step` is the number of optimiser steps so far."""

    def __init__(self) -> None:
        self._asked: _Question | None = None
        self._far = -HOLDS - 1  # the last step as of which all rows were seen to be far
        self._last: int | None = None  # the step of the last look

    def steady(self, step: int) -> bool:
        """May rows be left without a closer look at this step? False too where no step was made since the last one."""
        moved, self._last = self._last is not None and step > self._last, step
        if (asked := self._asked) is not None and (asked.arrived is None or asked.arrived.query()):
            share, gain = asked.numbers.tolist()
            self._asked, self._far = None, asked.step if share > SHARE and gain > GAIN else -HOLDS - 1
        return moved and step - self._far <= HOLDS

    def ask(self, step: int, V_square_O: Tensor, W_square_O: Tensor, m_O: Tensor) -> None:
        """Ask, if it is time; nan, of a row that is zero, is not far from anything."""
        if self._asked is not None or step - self._far < EVERY:
            return
        numbers = torch.stack([(V_square_O / W_square_O).min(), (m_O / V_square_O.sqrt()).abs().min()])
        if numbers.device.type != "cuda":
            self._asked = _Question(step, numbers.cpu(), None)
            return
        there = torch.empty(2, dtype=numbers.dtype, pin_memory=True)
        there.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(numbers.device))
        self._asked = _Question(step, there, arrived)
