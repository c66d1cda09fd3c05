"""Experiments by name: each is a file in experiments/ with `TIERS` and `specs(tier)`. Imports no torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

from dora_lab.house import EXPERIMENTS, HOUSE
from dora_lab.spec import Spec, SpecError, did_you_mean


def experiment_names() -> list[str]:
    """Names of the files in experiments/ that have runs; one that only measures (speed.py) has no `specs`.

    Raises SpecError where there is no experiment: a copy of the package without the folders that belong to it.
    """
    files = EXPERIMENTS.glob("[!_]*.py")
    names = sorted(file.stem for file in files if "\ndef specs(" in file.read_text(encoding="utf-8"))
    if not names:
        raise SpecError(f"{EXPERIMENTS} has no experiments: install dora-lab's wheel, or work in a clone of it")
    return names


def published_specs() -> list[Spec]:
    """The specs of tier paper of all experiments: the published protocol, any seed."""
    modules = [load_experiment(name) for name in experiment_names()]
    return [spec for module in modules if "paper" in module.TIERS for spec in module.specs("paper")]


def declared_specs() -> list[Spec]:
    """The specs of all experiments, and of runs that are kept but not made again: what runs are called by."""
    modules = [load_experiment(name) for name in experiment_names()]
    listed = [spec for module in modules for tier in module.TIERS for spec in module.specs(tier)]
    return listed + [spec for module in modules if hasattr(module, "earlier") for spec in module.earlier()]


def experiment_name(text: str, known: Iterable[str] = ()) -> str:
    """The experiment that a person means, hyphens read as underscores; of `known`, or else of those in experiments/.

    Raises SpecError listing the names there are.
    """
    name, choices = text.replace("-", "_"), sorted({*known} or {*experiment_names()})
    if name not in choices:
        raise SpecError(f"unknown experiment '{text}'; {did_you_mean(name, choices)}")
    return name


def load_experiment(name: str) -> ModuleType:
    """The experiment's module; raises SpecError listing the names there are."""
    name = experiment_name(name)
    house_first()  # an experiment may take from another one
    found = importlib.util.spec_from_file_location(f"experiments.{name}", EXPERIMENTS / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def house_first() -> None:
    """Let `experiments` and `analysis` be imported: they are no installed packages, whose names others may have."""
    if str(HOUSE) not in sys.path:
        sys.path.insert(0, str(HOUSE))
