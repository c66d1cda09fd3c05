"""record.json as it is read back: where runs lie, what each was, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dora_lab.io.files import parse_whole
from dora_lab.runs import packs
from dora_lab.runs.errors import StoreError
from dora_lab.spec import Spec, SpecError, did_you_mean, from_dict, spec_id

SCHEMA = 1
ENDINGS = ("complete", "failed", "interrupted")
REQUIRED = ("spec", "spec_id", "status", "error")
OBJECTS = ("code", "inputs", "machine", "packages", "params", "seconds", "files")  # where they are there and not null


def run_path(root: Path, spec: Spec) -> Path:
    """Where the run of `spec` lies under the results folder `root`; whether or not it exists."""
    if not spec.experiment.isidentifier():  # it names a folder
        raise SpecError(f"experiment = {spec.experiment!r}: must be the name of a Python file, without .py")
    return Path(root) / "runs" / spec.experiment / spec_id(spec)


def read_record(path: Path) -> dict[str, Any]:
    """The record of the run directory `path`; raises StoreError if there is none, or it is damaged or too new."""
    file = Path(path) / "record.json"
    try:
        content = packs.read(Path(path), file.name)
        if content is None:
            raise StoreError(f"{file} does not exist; is this a run directory?")
        record = parse_whole(content)
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} is not JSON ({error}); restore it or remove the run directory") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else None
        raise StoreError(f"{file}: schema {schema!r}, this version reads {SCHEMA}; update dora_lab")
    if missing := [name for name in REQUIRED if name not in record]:
        raise StoreError(f"{file}: field '{missing[0]}' is missing; restore it or remove the run directory")
    if record["status"] not in ("running", *ENDINGS):
        raise StoreError(f"{file}: unknown status {record['status']!r}; {did_you_mean(str(record['status']), ENDINGS)}")
    try:
        _, found = _spec(json.dumps(record["spec"]))
    except SpecError as error:
        raise StoreError(f"{file}: {error}; restore it, or update dora_lab") from None
    if found != record["spec_id"]:
        raise StoreError(f"{file}: spec_id {record['spec_id']!r:.40}, but its spec is {found}: restore it")
    for name in OBJECTS:
        if not isinstance(record.get(name) or {}, dict):
            raise StoreError(f"{file}: field '{name}' is no JSON object; restore it or remove the run directory")
    if wrong := [name for name, count in (record.get("params") or {}).items() if type(count) is not int]:
        raise StoreError(f"{file}: field 'params.{wrong[0]}' is no whole number; restore it")
    return record


def spec_of(record: Mapping[str, Any]) -> Spec:
    """The spec of a record, with the fields that came after it; raises SpecError where it holds none."""
    return _spec(json.dumps(record["spec"]))[0]


@lru_cache(maxsize=4096)  # a report reads each record some fifteen times
def _spec(text: str) -> tuple[Spec, str]:
    spec = from_dict(json.loads(text))
    return spec, spec_id(spec)


def misplaced(path: Path, record: Mapping[str, Any]) -> str | None:
    """Where the run directory `path` should lie, "<experiment>/<spec id>", if that is not where it lies."""
    path = Path(path).absolute()
    right = f"{record['spec']['experiment']}/{record['spec_id']}"
    return None if f"{path.parent.name}/{path.name}" == right else right
