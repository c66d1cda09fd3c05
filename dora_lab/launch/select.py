"""Those specs of an experiment that a command line selects and changes. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from dora_lab.models import shapes
from dora_lab.models.base import hash_model
from dora_lab.spec import Spec, SpecError, derive, did_you_mean, leaves, spec_id, to_dict, validate
from dora_lab.tasks import llava, mini_clips, mini_pictures, sources


def chosen(
    module: ModuleType,
    tier: str | None,
    only: Sequence[str] = (),
    changes: Sequence[str] = (),
    data_dir: Path | None = None,
    model_dir: Path | None = None,
    tell: Callable[[str], object] = lambda text: None,
) -> list[Spec]:
    """The specs of an experiment after --only, --data-dir, --model-dir and --with; each valid, no two the same.

    Where a folder takes the place of several models, the settings of one of them are kept; `tell` hears which.
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
        specs = _of_one_model(specs, Path(model_dir), tell)
        model = {"model.name": Path(model_dir).resolve().name, "model.revision": hash_model(model_dir)[:12]}
        specs = [derive(spec, model) for spec in specs]
    values = pairs(changes, "--with")
    specs = [derive(spec, {path: text for path, text in values.items() if _has(spec, path)}) for spec in specs]
    for spec in specs:
        validate(spec)
    if len({spec_id(spec) for spec in specs}) < len(specs):
        raise SpecError("some specs became the same run; select one of them with --only")
    return specs


def _of_one_model(specs: list[Spec], folder: Path, tell: Callable[[str], object]) -> list[Spec]:
    """The specs of the one model among several that a folder is nearest to: by its name, by its shape, or the first."""
    names = list(dict.fromkeys(spec.model.name for spec in specs))
    if len(names) < 2:
        return specs
    known = shapes.printed_name(folder.resolve().name)
    alike = [name for name in names if known is not None and shapes.printed_name(name) == known]
    why = "by its name"
    if not alike:
        with contextlib.suppress(ValueError):  # of another family than those whose shapes are known
            shape = shapes.of_folder(folder)
            alike = [name for name in names if (key := shapes.printed_name(name)) and shapes.PAPER[key][0] == shape]
        why = "by its shape" if alike else "the first: it is none of them by name or shape"
    chosen_name = (alike or names)[0]
    tell(
        f"{folder} takes the place of {len(names)} models, with the settings of {chosen_name} ({why}); "
        f"--only model.name=... takes another's: {', '.join(names)}"
    )
    return [spec for spec in specs if spec.model.name == chosen_name]


def _with_data(spec: Spec, data_dir: Path) -> Spec:
    """The spec on a folder of real data: its tasks are those that have a test file, all their items are taken, unless
    it was made for such a folder."""
    if spec.data.name in (*mini_pictures.SOURCES, *mini_clips.SOURCES, *llava.WRITTEN):
        raise SpecError(
            f"--data-dir {data_dir}: {spec.tier} runs read pictures of their own; choose --tier paper for yours"
        )
    if spec.data.name in sources.OWN:
        identity = sources.data_identity(spec.data, spec.data.name, data_dir)
        return replace(spec, data=replace(spec.data, **identity))
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


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Values by field, the last of those given for one; raises SpecError as `pair`."""
    return dict(pair(text, option) for text in texts)


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
