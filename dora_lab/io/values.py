"""Values of JSON, and text that somebody typed, in the type that an annotation names: `int | None`, `tuple[str, ...]`.

Known are bool, int, float, str, `Literal`, homogeneous tuples, classes, and each of them or None.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}


def parts(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


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
