"""Faults that a run must survive, each as a function that injects it once: the registry and the campaign's arithmetic.

A fault is a function ``(folder, rng) -> str`` marked with ``@fault(number, name)`` in a module of this package. It is
given an empty folder and a source of randomness, does the harm, asserts that it was survived as required (a clear
message, an exit status that is not 0 or a named recovery, nothing lost) and returns in one line what the user sees.
It raises AssertionError where the fault was not survived, and Skipped where this machine cannot inject it.

Modules import each other as ``tests.faults...``; `tests/test_faults.py` runs a small sample, ``make torture`` a
campaign.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

Inject = Callable[[Path, random.Random], str]


class Skipped(Exception):
    """The fault cannot be injected on this machine; says what is missing."""


@dataclass(frozen=True)
class Fault:
    """One kind of harm."""

    number: str  # "1" .. "25", or a word ("SIGTERM", "extra"); several faults may share a number
    name: str  # what happens, in a few words; (number, name) is unique
    inject: Inject


FAULTS: list[Fault] = []
NUMBERS = tuple(str(number) for number in range(1, 26))  # each must have a fault


def fault(number: str | int, name: str) -> Callable[[Inject], Inject]:
    """Decorator: put the function into FAULTS."""

    def register(inject: Inject) -> Inject:
        found = Fault(str(number), name, inject)
        if any((other.number, other.name) == (found.number, found.name) for other in FAULTS):
            raise ValueError(f"fault {number} '{name}' is registered twice")
        FAULTS.append(found)
        return inject

    return register


def all_faults() -> list[Fault]:
    """The faults of every module of this package, by number (words last), then in the order they were written."""
    for module in sorted(found.name for found in iter_modules(__path__)):
        if not module.startswith("_"):
            import_module(f"{__name__}.{module}")
    return sorted(FAULTS, key=lambda one: int(one.number) if one.number.isdigit() else len(NUMBERS) + 1)
