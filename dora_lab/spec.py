"""What a run is: frozen values with an identity computed from their content (standard library only).

A spec holds everything that can change a result and nothing that cannot (paths, device, logging, number of jobs).
`spec_id` is 12 hex digits of the SHA-256 of the canonical JSON. A field added after the first schema carries
``field(metadata={"since": n})`` with a default that means "as before" and is left out of the canonical JSON while it
has that default, so the ids of old runs stay.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints


class SpecError(ValueError):
    """A spec that cannot be: says which field (dotted path), what was wrong and what to do."""


class _Checked:
    """Base of the spec classes: values are checked and brought to their field's type when constructed."""

    def __post_init__(self) -> None:
        prefix = "" if isinstance(self, Spec) else f"{type(self).__name__.lower()}."
        for name, kind in _types(type(self)).items():
            object.__setattr__(self, name, _coerce(kind, getattr(self, name), prefix + name))


@dataclass(frozen=True, kw_only=True)
class Model(_Checked):
    """The base model that is fine-tuned."""

    name: str  # "mini" = the embedded base; else a hub id, or the id of a local folder
    revision: str | None = None  # hub commit, or the fingerprint of a local folder; None for the embedded base
    dtype: str = "float32"  # torch dtype name of the frozen weights
    # own: the tokenizer's pad token, else <unk>, else its end; zero: the token of id 0, as released (in Llama 3 an
    # ordinary one). Padding is masked everywhere: neither reaches a result
    pad: Literal["own", "zero"] = field(default="own", metadata={"since": 3})
    adapter: str | None = field(default=None, metadata={"since": 3})  # folder name or hub id of a saved adapter on it
    adapter_revision: str | None = field(default=None, metadata={"since": 3})  # hub commit, or the folder's fingerprint


@dataclass(frozen=True, kw_only=True)
class Data(_Checked):
    """What is trained and evaluated on."""

    name: str  # "mini" = the embedded world; "commonsense_170k" = hub; "llm_adapters" = a folder in that layout
    tasks: tuple[str, ...]  # evaluated tasks, by their folder names: "boolq", ..., "ARC-Easy", ...
    sha256: str | None = None  # content hash of a local data folder
    revision: str | None = None  # hub commit
    train_items: int | None = None  # items in all; None = all there are
    validation_items: int = 0  # items held out of the training items, in all
    test_items: int | None = None  # items per task; None = all there are
    template: Literal["clean", "published"] = "clean"  # prompt template; published = byte for byte as released
    cutoff: int = 256  # tokens per training item
    train_on_prompt: bool = False  # True: loss on the prompt's tokens too
    eval_name: str | None = None  # data source of the evaluation (as `name`); None = the same
    # what an item of more than `cutoff` tokens loses; prompt: the head of its prompt, never of its answer; right: its
    # last tokens, as released
    truncation: Literal["prompt", "right"] = field(default="prompt", metadata={"since": 3})
    # end-of-sequence token after the answer; if_shorter: only where fewer than `cutoff` tokens stand, as released
    eos: Literal["always", "if_shorter"] = field(default="always", metadata={"since": 3})
    # validation items; per_task: evenly from each task's file; mixed: as released, `train_test_split(seed=42)` of all
    holdout: Literal["per_task", "mixed"] = field(default="per_task", metadata={"since": 3})
    pad_to_multiple_of: int = field(default=1, metadata={"since": 3})  # length of a training batch; 8 as released


@dataclass(frozen=True, kw_only=True)
class Method(_Checked):
    """How it is fine-tuned: `name` is a file in `dora_lab/adapters`."""

    name: str  # "base" (no training), "ft", "lora", "dora", ...
    rank: int | None = None  # r of B (out, r) and A (r, in); None where the method has none
    alpha: float | None = None  # the update is (alpha / rank) B A
    dropout: float = 0.0  # probability in [0, 1)
    dropout_form: Literal["published", "branch"] = "published"  # what DoRA drops: see adapters/dora.py
    target_modules: tuple[str, ...] = ()  # leaf module names, e.g. "q_proj"
    detach_norm: bool = True  # DoRA: norm as a constant in the gradient (eq. 11); False: eq. 6
    rslora: bool = field(default=False, metadata={"since": 2})  # True: the scale is alpha / sqrt(rank)
    # "pattern=value": rank or alpha of the modules whose name ends with the pattern (a regular expression, as in PEFT)
    rank_pattern: tuple[str, ...] = field(default=(), metadata={"since": 2})
    alpha_pattern: tuple[str, ...] = field(default=(), metadata={"since": 2})
    # DoRA: leaf names of modules of which the magnitude alone is trained (table 6)
    magnitude_modules: tuple[str, ...] = field(default=(), metadata={"since": 2})


@dataclass(frozen=True, kw_only=True)
class Optim(_Checked):
    """The optimisation (AdamW)."""

    learning_rate: float  # peak, after warm-up
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after warm-up; linear and cosine end at zero
    warmup_steps: int  # optimiser steps
    batch_size: int  # items per optimiser step (effective)
    micro_batch_size: int  # items per forward; divides batch_size
    epochs: float  # passes over the training items
    weight_decay: float = 0.0  # decoupled, AdamW's
    max_grad_norm: float = 1.0  # gradients are clipped to this Euclidean norm; 0 = not clipped
    keep: Literal["last", "best_loss"] = "last"  # which weights are evaluated; best_loss needs eval_steps
    eval_steps: int | None = None  # optimiser steps between validation losses; None = never


@dataclass(frozen=True, kw_only=True)
class Probe(_Checked):
    """When magnitude and direction are recorded while training."""

    fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # of all optimiser steps, each in (0, 1], increasing


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Checked):
    """How answers are scored."""

    protocols: tuple[str, ...] = (
        "generate",
    )  # "generate" (the paper's), "loglikelihood", "builtin" (lm-eval's own tasks)
    split: Literal["test", "validation"] = "test"  # which items
    num_beams: int = 1  # beams of "generate"; 1 = greedy
    max_new_tokens: int = 32  # tokens of "generate"
    batch_size: int = 32  # items per forward (padding can change the last bits of a logit)
    # the adapter while evaluating; exact: merged into float32, where that costs only last bits, else unmerged; merged:
    # into whatever `model.dtype` is, rounded, as released
    weights: Literal["exact", "merged", "unmerged"] = field(default="exact", metadata={"since": 3})


@dataclass(frozen=True, kw_only=True)
class Spec(_Checked):
    """One run, whole."""

    experiment: str  # name of a file in `experiments/`
    tier: Literal["mini", "paper"]
    seed: int  # every random number of the run comes from it; >= 0
    model: Model
    data: Data
    method: Method
    optim: Optim | None  # None for method "base", which is not trained
    probe: Probe | None  # None: no probe
    evaluation: Evaluation


Checked = TypeVar("Checked", bound=_Checked)


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Words for an error message: the nearest of `choices` if one is near, and all of them."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + "choices: " + (", ".join(known) or "none")


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a `rank_pattern` names a module, as in PEFT: the pattern is the end of its name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def to_dict(spec: Spec) -> dict[str, Any]:
    """The spec as plain JSON values (tuples become lists), every field present; `from_dict` reads it back."""
    return _plain(spec, omit_defaults=False)


def from_dict(values: Mapping[str, Any]) -> Spec:
    """The spec that `to_dict` wrote.

    Raises SpecError, with the dotted path and the nearest known name, for a key that is unknown, missing (only fields
    with a `since` mark may be) or of the wrong type. Ranges are `validate`'s: an old record stays readable.
    """
    return _read(Spec, values, "")


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings (a spec as `to_dict` writes it, a record) by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def canonical_json(spec: Spec) -> str:
    """The text that `spec_id` hashes: sorted keys, no spaces, ASCII; a field marked `since` left out at its default."""
    return json.dumps(
        _plain(spec, omit_defaults=True), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def spec_id(spec: Spec) -> str:
    """Identity of the run: the first 12 hex digits of the SHA-256 of `canonical_json`."""
    return hashlib.sha256(canonical_json(spec).encode("ascii")).hexdigest()[:12]


def derive(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """A new, validated spec with some fields changed, e.g. ``{"optim.learning_rate": "0.001", "seed": 3}``.

    Text is parsed by the field's type: numbers, ``true``/``false``, ``none`` where None is allowed, tuples as
    comma-separated text. Raises SpecError for an unknown path (with the nearest one) or a value that does not fit.
    """
    for path, value in changes.items():
        spec = _set(spec, path, value)
    validate(spec)
    return spec


def validate(spec: Spec) -> None:
    """Check ranges and combinations; raises SpecError with every field that is wrong, its value and what is allowed."""
    rules = [*_value_rules(spec), *_method_rules(spec)]
    if spec.optim is not None:
        rules += _optim_rules(spec, spec.optim)
    if spec.probe is not None:
        fractions = spec.probe.fractions
        ordered = bool(fractions) and all(0 < f <= 1 for f in fractions) and sorted(set(fractions)) == list(fractions)
        rules.append(("probe.fractions", fractions, ordered, "increasing numbers in (0, 1]"))
    wrong = [f"{path} = {value!r}: must be {allowed}" for path, value, ok, allowed in rules if not ok]
    if wrong:
        raise SpecError("spec refused: " + "; ".join(wrong))


Rule = tuple[str, object, bool, str]  # dotted path, value, whether it is right, what is allowed
PROTOCOLS = ("generate", "loglikelihood", "builtin")
NUMBER = r"(?=.*[1-9])\d+(\.\d+)?"  # above zero, as text
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _value_rules(spec: Spec) -> list[Rule]:
    data, evaluation = spec.data, spec.evaluation
    known = bool(evaluation.protocols) and all(name in PROTOCOLS for name in evaluation.protocols)
    once = len(set(evaluation.protocols)) == len(evaluation.protocols)
    rules: list[Rule] = [
        ("experiment", spec.experiment, spec.experiment.isidentifier(), "the name of a Python file, without .py"),
        ("seed", spec.seed, 0 <= spec.seed < 2**31, "in 0 .. 2^31 - 1"),
        ("model.name", spec.model.name, bool(spec.model.name), "not empty"),
        (
            "model.adapter",
            spec.model.adapter,
            not spec.model.adapter or spec.method.name == "base",
            "None for training",
        ),
        ("model.dtype", spec.model.dtype, spec.model.dtype in DTYPES, "one of " + ", ".join(DTYPES)),
        ("data.tasks", data.tasks, bool(data.tasks) and len(set(data.tasks)) == len(data.tasks), "distinct, not empty"),
        ("data.cutoff", data.cutoff, data.cutoff >= 1, "at least 1"),
        ("data.validation_items", data.validation_items, data.validation_items >= 0, "at least 0"),
        ("evaluation.protocols", evaluation.protocols, known and once, "distinct ones of " + ", ".join(PROTOCOLS)),
        (
            "evaluation.split",
            evaluation.split,
            evaluation.split == "test" or "builtin" not in evaluation.protocols,
            "test with protocol builtin, whose items are lm-eval's",
        ),
    ]
    counts = {
        "data.pad_to_multiple_of": data.pad_to_multiple_of,
        "data.train_items": data.train_items,
        "data.test_items": data.test_items,
        "evaluation.num_beams": evaluation.num_beams,
        "evaluation.max_new_tokens": evaluation.max_new_tokens,
        "evaluation.batch_size": evaluation.batch_size,
    }
    return rules + [(path, count, count is None or count >= 1, "at least 1") for path, count in counts.items()]


def _method_rules(spec: Spec) -> list[Rule]:
    method = spec.method
    untrained = method.name == "base"
    return [
        ("method.name", method.name, method.name.isidentifier(), "the name of a file in dora_lab/adapters"),
        ("method.rank", method.rank, method.rank is None or method.rank >= 1, "at least 1"),
        ("method.alpha", method.alpha, method.alpha is None or method.alpha > 0, "greater than 0"),
        ("method.alpha", method.alpha, (method.alpha is None) == (method.rank is None), "given exactly with a rank"),
        ("method.dropout", method.dropout, 0 <= method.dropout < 1, "in [0, 1)"),
        ("method.rank_pattern", method.rank_pattern, _are_pairs(method.rank_pattern, r"[1-9]\d*"), "pattern=rank each"),
        ("method.alpha_pattern", method.alpha_pattern, _are_pairs(method.alpha_pattern, NUMBER), "pattern=alpha each"),
        ("optim", spec.optim, (spec.optim is None) == untrained, "None for method base, given for every other"),
        ("probe", spec.probe, not (untrained and spec.probe), "None for method base"),
    ]


def _are_pairs(pairs: tuple[str, ...], value: str) -> bool:
    return all(re.fullmatch(f".+={value}", pair) for pair in pairs)


def _optim_rules(spec: Spec, optim: Optim) -> list[Rule]:
    micro = optim.micro_batch_size
    divides = micro >= 1 and optim.batch_size % micro == 0
    keeps = optim.keep == "last" or (optim.eval_steps is not None and spec.data.validation_items > 0)
    return [
        ("optim.learning_rate", optim.learning_rate, optim.learning_rate > 0, "greater than 0"),
        ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "at least 0"),
        ("optim.batch_size", optim.batch_size, optim.batch_size >= 1, "at least 1"),
        ("optim.micro_batch_size", micro, divides, f"a divisor of optim.batch_size = {optim.batch_size}"),
        ("optim.epochs", optim.epochs, optim.epochs > 0, "greater than 0"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("optim.max_grad_norm", optim.max_grad_norm, optim.max_grad_norm >= 0, "at least 0"),
        ("optim.eval_steps", optim.eval_steps, optim.eval_steps is None or optim.eval_steps >= 1, "at least 1 or None"),
        ("optim.keep", optim.keep, keeps, "last, unless optim.eval_steps and data.validation_items are given"),
    ]


@cache
def _types(cls: type) -> dict[str, Any]:
    """Field name to resolved type, in the order of the fields."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def _plain(value: Any, *, omit_defaults: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        named = ((item, getattr(value, item.name)) for item in fields(value))
        return {
            item.name: _plain(inner, omit_defaults=omit_defaults)
            for item, inner in named
            if not (omit_defaults and "since" in item.metadata and inner == item.default)
        }
    return list(value) if isinstance(value, tuple) else value


def _read(cls: type[Checked], values: Any, prefix: str) -> Checked:
    where = prefix.rstrip(".") or "spec"
    if not isinstance(values, Mapping):
        raise SpecError(f"{where}: expected a JSON object, got {values!r}")
    kinds = _types(cls)
    for key in values:
        if key not in kinds:
            raise SpecError(f"unknown field '{prefix}{key}'; {did_you_mean(str(key), kinds)}")
    known = {item.name: item for item in fields(cast(Any, cls))}
    given: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in values:
            if "since" in known[name].metadata and known[name].default is not MISSING:
                continue
            raise SpecError(f"missing field '{prefix}{name}'; a spec names every field, add it")
        nested = next((part for part in _parts(kind) if is_dataclass(part)), None)
        inner = values[name]
        given[name] = _read(cast(Any, nested), inner, f"{prefix}{name}.") if nested and inner is not None else inner
    return cls(**given)


def _parts(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """`value` in the field's type (a list as a tuple, a whole number as a float), or SpecError."""
    parts = _parts(kind)
    if value is None and type(None) in parts:
        return None
    (kind,) = (part for part in parts if part is not type(None))
    origin = get_origin(kind)
    if origin is Literal and value in get_args(kind):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(get_args(kind)[0], inner, f"{path}[{i}]") for i, inner in enumerate(value))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    # bool is a kind of int in Python, never here
    if origin is None and kind is not float and isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
        return value
    optional = " or None" if type(None) in parts else ""
    raise SpecError(f"{path} = {value!r}: expected {_type_name(kind)}{optional}")


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {_type_name(get_args(kind)[0])}"
    names = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _paths() -> list[str]:
    """Every dotted path that `derive` can set."""
    found = []
    for name, kind in _types(Spec).items():
        nested = next((part for part in _parts(kind) if is_dataclass(part)), None)
        optional = type(None) in _parts(kind)
        found += [name] if not nested or optional else []
        found += [f"{name}.{inner}" for inner in _types(cast(type, nested))] if nested else []
    return found


def _set(spec: Spec, path: str, value: Any) -> Spec:
    if path not in (known := _paths()):
        raise SpecError(f"unknown field '{path}'; {did_you_mean(path, known)}")
    outer, _, inner = path.partition(".")
    if not inner:
        return replace(spec, **{outer: _parse(_types(Spec)[outer], value, path)})
    part = getattr(spec, outer)
    if part is None:
        raise SpecError(f"cannot set '{path}': {outer} is None in this spec (method '{spec.method.name}')")
    return replace(spec, **{outer: replace(part, **{inner: _parse(_types(type(part))[inner], value, path)})})


def _parse(kind: Any, value: Any, path: str) -> Any:
    """Text as the field's type would read it; anything else, and text that does not parse, is left to `_coerce`."""
    if not isinstance(value, str):
        return value
    if type(None) in _parts(kind) and value.lower() in ("none", "null"):
        return None
    (kind,) = (part for part in _parts(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return tuple(_parse(inner, piece.strip(), path) for piece in value.split(",") if piece.strip())
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    if kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            return value
    return value
