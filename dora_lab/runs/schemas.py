"""The files of a run as JSON Schema (2020-12), for programs that are not the lab.

Made from the fields of a spec and from what the readers ask of records and streams, so that they cannot say another
thing. A schema knows names and types. Ranges stand in its descriptions in words, `spec.validate` holds them; that
hashes are right and answers agree with values is checked by `streams.read_rows` and `dora-lab doctor`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dora_lab.runs.record import ENDINGS, OBJECTS, REQUIRED, SCHEMA
from dora_lab.runs.streams import OPTIONAL_FIELDS, REQUIRED_FIELDS, STREAMS
from dora_lab.spec import Spec, SpecError, did_you_mean

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NAMES = ("spec", "record", *STREAMS)
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def schema(name: str) -> dict[str, Any]:
    """The schema of a spec, of record.json, or of a line of a stream ("metrics", "probe", "timing", "eval").

    Raises SpecError for another name.
    """
    if name not in NAMES:
        raise SpecError(f"no file of a run is '{name}'; {did_you_mean(name, NAMES)}")
    inner = {"spec": _of_class(Spec), "record": _record()}.get(name) or _row(name)
    return {"$schema": DIALECT, "title": name} | inner


def _of_class(cls: Any) -> dict[str, Any]:
    """Every field of a dataclass; those that came later, with a default that means "as before", may be missing."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        "type": "object",
        "properties": {item.name: _of_type(hints[item.name]) | _default(item) for item in fields(cls)},
        "required": [item.name for item in fields(cls) if "since" not in item.metadata],
        "additionalProperties": False,
    }


def _default(item: Any) -> dict[str, Any]:
    if "since" not in item.metadata or item.default is MISSING:
        return {}
    return {"default": list(item.default) if isinstance(item.default, tuple) else item.default}


def _of_type(kind: Any) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _of_type(inner[0]) | {"description": "; ".join(map(_words, inner[1:]))}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_type(one) for one in inner]}
    if origin is tuple:
        return {"type": "array", "items": _of_type(inner[0])}
    return _of_class(kind) if is_dataclass(kind) else {"type": _TYPES[kind]}


def _words(note: Any) -> str:
    """What an annotation says of a field: a phrase, a phrase for each value, or what `validate` allows."""
    if isinstance(note, Mapping):
        return "; ".join(f"{value}: {phrase}" for value, phrase in note.items())
    return note if isinstance(note, str) else f"must be {note.words}"


def _record() -> dict[str, Any]:
    known: dict[str, Any] = {name: {"type": ["object", "null"]} for name in OBJECTS}
    known["params"] = {"type": ["object", "null"], "additionalProperties": {"type": "integer"}}
    known |= {
        "schema": {"const": SCHEMA},
        "spec": _of_class(Spec),
        "spec_id": {"type": "string", "pattern": "^[0-9a-f]{12}$"},
        "status": {"enum": ["running", *ENDINGS]},
        "error": {"type": ["string", "null"]},
    }
    return {"type": "object", "properties": known, "required": ["schema", *REQUIRED]}


def _row(stream: str) -> dict[str, Any]:
    wanted, optional = REQUIRED_FIELDS.get(stream, {}), OPTIONAL_FIELDS.get(stream, {})
    properties = {name: {"type": [_TYPES[kind] for kind in kinds]} for name, kinds in (wanted | optional).items()}
    return {"type": "object", "properties": properties, "required": list(wanted)}
