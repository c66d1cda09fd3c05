"""Experiments by name, and those of their specs that a command line selects and changes.

An experiment is a file in experiments/ with `TIERS` and `specs(tier)`. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from dora_lab.models.base import hash_model
from dora_lab.spec import Spec, SpecError, derive, did_you_mean, leaves, spec_id, to_dict, validate
from dora_lab.tasks import sources

HOUSE = Path(__file__).resolve().parents[2]
EXPERIMENTS = HOUSE / "experiments"


def experiment_names() -> list[str]:
    """Names of the files in experiments/ that have runs; one that only measures (speed.py) has no `specs`."""
    files = EXPERIMENTS.glob("[!_]*.py")
    return sorted(file.stem for file in files if "\ndef specs(" in file.read_text(encoding="utf-8"))


def published_specs() -> list[Spec]:
    """The specs of tier paper of all experiments: the published protocol, any seed."""
    modules = [load_experiment(name) for name in experiment_names()]
    return [spec for module in modules if "paper" in module.TIERS for spec in module.specs("paper")]


def all_specs(name: str) -> list[Spec]:
    """The specs of every tier of an experiment."""
    module = load_experiment(name)
    return [spec for tier in module.TIERS for spec in module.specs(tier)]


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
    if str(HOUSE) not in sys.path:  # an experiment may take from another one, and they are no installed package
        sys.path.insert(0, str(HOUSE))
    found = importlib.util.spec_from_file_location(f"experiments.{name}", EXPERIMENTS / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def chosen(
    module: ModuleType,
    tier: str | None,
    only: Sequence[str] = (),
    changes: Sequence[str] = (),
    data_dir: Path | None = None,
    model_dir: Path | None = None,
) -> list[Spec]:
    """The specs of an experiment after --only, --data-dir, --model-dir and --with; each valid, no two the same.

    Raises SpecError for an unknown tier or field, a selection that matches nothing, or two specs that became one.
    """
    asked: str = tier or module.TIERS[0]
    if asked not in module.TIERS:
        raise SpecError(f"unknown tier '{asked}'; {did_you_mean(asked, module.TIERS)}")
    specs: list[Spec] = module.specs(asked)
    # selected by what the experiment says, before folders take the place of its models: four models become one
    for field, text in (pair(selection, "--only") for selection in only):
        kept = [
            spec for spec in specs if any(_same(_value(to_dict(spec), field), wanted) for wanted in text.split(","))
        ]
        if not kept:
            there = sorted({str(_value(to_dict(spec), field)) for spec in specs})
            raise SpecError(f"--only {field}={text} matches no spec; values there: {', '.join(there)}")
        specs = kept
    if data_dir is not None:
        specs = [_with_data(spec, data_dir) for spec in specs]
    if model_dir is not None:
        model = {"model.name": Path(model_dir).resolve().name, "model.revision": hash_model(model_dir)[:12]}
        specs = [derive(spec, model) for spec in specs]
    values = dict(pair(change, "--with") for change in changes)
    specs = [derive(spec, {path: text for path, text in values.items() if _has(spec, path)}) for spec in specs]
    for spec in specs:
        validate(spec)
    if len({spec_id(spec) for spec in specs}) < len(specs):
        raise SpecError("some specs became the same run; select one of them with --only")
    return specs


def _with_data(spec: Spec, data_dir: Path) -> Spec:
    """The spec on a folder of real data: its tasks are those that have a test file, all their items are taken, unless
    it was made for such a folder."""
    names = sources.tasks_in(data_dir)
    if not names:
        sources.hash_data(data_dir)  # says what a folder of data looks like
        raise SpecError(f"{data_dir}: no <task>/test.json to evaluate on")
    if spec.data.name == "llm_adapters":  # made for such a folder: what it takes of it stays
        if missing := sorted({*spec.data.tasks} - {*names}):
            raise SpecError(f"{data_dir} has no test items of {', '.join(missing)}; change --with data.tasks=...")
        return replace(spec, data=replace(spec.data, sha256=sources.hash_data(data_dir)))
    # a training mix from elsewhere stays; only its evaluation comes from the folder
    elsewhere = spec.data.name not in ("mini", "llm_adapters")
    data = replace(
        spec.data,
        name=spec.data.name if elsewhere else "llm_adapters",
        eval_name="llm_adapters" if elsewhere else None,
        tasks=tuple(names),
        sha256=sources.hash_data(data_dir),
        train_items=spec.data.train_items if elsewhere else None,
        test_items=None,
    )
    return replace(spec, data=data)


def _has(spec: Spec, path: str) -> bool:
    """Whether the spec has the section of a dotted path: a base model has no optim, so nothing of it can be changed."""
    return getattr(spec, path.partition(".")[0], spec) is not None


def pair(text: str, option: str) -> tuple[str, str]:
    """Field and value of "FIELD=VALUE"; raises SpecError, naming the option it was given to."""
    field, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"{option} {text}: expected FIELD=VALUE, for example optim.learning_rate=0.001")
    return field, value


def _value(tree: Mapping[str, Any], field: str) -> str:
    """The value at a dotted path as text; a section stands for its name, a bare field for the one place it has."""
    fields = leaves(tree)
    found = [path for path in fields if path in (field, f"{field}.name") or path.endswith(f".{field}")]
    exact = [path for path in found if path in (field, f"{field}.name")]
    if len(exact or found) > 1:
        raise SpecError(f"--only {field} is ambiguous: {', '.join(found)}")
    if not found:
        if tree.get(field.partition(".")[0], "") is None:
            return "none"
        raise SpecError(f"--only {field}: no such field; {did_you_mean(field, fields)}")
    value = fields[(exact or found)[0]]
    return "none" if value is None else str(value)


def _same(value: str, wanted: str) -> bool:
    """Whether two texts say the same, as numbers (16 and 16.0) where they are."""
    try:
        return value == wanted or float(value) == float(wanted)
    except ValueError:
        return False
