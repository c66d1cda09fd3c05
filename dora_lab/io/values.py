"""Values of JSON, and text that somebody typed, in the type that an annotation names: `int | None`, `tuple[str, ...]`.

Known are bool, int, float, str, `Literal`, homogeneous tuples, classes, and each of them or None. Dataclasses are read
from JSON objects and written as such, field by field; a field whose metadata has "since" may be missing.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dora_lab.io.text import did_you_mean

_NAMES = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}


def parts(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name to resolved type, in the order of the fields."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def nested(kind: Any) -> Any:
    """The dataclass that a field holds, or None."""
    return next((part for part in parts(kind) if is_dataclass(part)), None)


def plain(value: Any, *, omit_defaults: bool) -> Any:
    """A dataclass as JSON values, tuples as lists; omit_defaults: without later fields that are at their default."""
    if is_dataclass(value) and not isinstance(value, type):
        named = ((item, getattr(value, item.name)) for item in fields(value))
        return {
            item.name: plain(inner, omit_defaults=omit_defaults)
            for item, inner in named
            if not (omit_defaults and "since" in item.metadata and inner == item.default)
        }
    return list(value) if isinstance(value, tuple) else value


def read(cls: Any, values: Any, prefix: str = "") -> Any:
    """The dataclass that `plain` wrote; ValueError, with the dotted path, for a key that is unknown or missing."""
    where = prefix.rstrip(".") or "spec"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a JSON object, got {values!r}")
    known = {item.name: item for item in fields(cls)}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field '{prefix}{key}'; {did_you_mean(str(key), known)}")
    given: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        if name in values:
            inner = values[name]
            given[name] = read(nested(kind), inner, f"{prefix}{name}.") if nested(kind) and inner is not None else inner
        elif "since" not in known[name].metadata:
            raise ValueError(f"missing field '{prefix}{name}'; a spec names every field, add it")
    return cls(**given)


def coerce(kind: Any, value: Any, path: str) -> Any:
    """`value` in that type (a list as a tuple, a whole number as a float); ValueError, naming `path`, if it is none."""
    optional = type(None) in parts(kind)
    if value is None and optional:
        return None
    (kind,) = (part for part in parts(kind) if part is not type(None))
    origin = get_origin(kind)
    if origin is Literal and value in get_args(kind):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(coerce(get_args(kind)[0], inner, f"{path}[{i}]") for i, inner in enumerate(value))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    # bool is a kind of int in Python, never here
    if origin is None and kind is not float and isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
        return value
    raise ValueError(f"{path} = {value!r}: expected {_name(kind)}{' or None' if optional else ''}")


def parse(kind: Any, value: Any) -> Any:
    """Text as that type would read it; anything else, and text that does not parse, is left to `coerce`."""
    if not isinstance(value, str):
        return value
    if type(None) in parts(kind) and value.lower() in ("none", "null"):
        return None
    (kind,) = (part for part in parts(kind) if part is not type(None))
    if get_origin(kind) is tuple:
        return tuple(parse(get_args(kind)[0], piece.strip()) for piece in value.split(",") if piece.strip())
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return kind(value) if kind in (int, float) else value
    except ValueError:
        return value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings (a spec as `to_dict` writes it, a record) by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {_name(get_args(kind)[0])}"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
