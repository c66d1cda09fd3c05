"""The inputs of a run as they are on this machine now, and whether a run that was begun may go on with them (no torch).

Hashes of local inputs, commits of the hub's: cheap for the embedded ones, so a complete run can be recognised as one of
other inputs without loading torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from dora_lab import distributed
from dora_lab.io.errors import LoadError
from dora_lab.launch.runtime import Paths
from dora_lab.models.base import adapter_identity, model_identity
from dora_lab.runs import checkpoints, packs, provenance
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import ResumeError, StoreError
from dora_lab.runs.record import read_record, run_path
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError
from dora_lab.tasks.sources import data_identity


def fingerprints(spec: Spec, paths: Paths) -> dict[str, Any]:
    """What identifies model, data and adapter: by input, its name, revision and SHA-256."""
    model, data = spec.model, spec.data
    found = {
        "model": {"name": model.name, **model_identity(model, paths.model_dir)},
        "data": {"name": data.name, **data_identity(data, data.name, paths.data_dir)},
    }
    if data.eval_name:
        found["eval_data"] = {"name": data.eval_name, **data_identity(data, data.eval_name, paths.data_dir)}
    if model.adapter:
        found["adapter"] = {"name": model.adapter, **adapter_identity(model, paths.adapter_dir)}
    return found


def is_complete(spec: Spec, paths: Paths) -> bool:
    """Whether the run of `spec` is there, complete and of the inputs as they are now.

    Raises StoreError where it is packed and its part cannot be read: made again it would stand beside the packed one.
    """
    path = run_path(paths.results, spec)
    try:
        record = read_record(path)
    except StoreError:
        packs.packed(path)
        return False
    if record["status"] != "complete":
        return False
    then = record.get("inputs") or {}
    return all(then.get(name) == found for name, found in fingerprints(spec, paths).items())


@contextlib.contextmanager
def begun_is_kept(run: RunDir) -> Iterator[None]:
    """Inputs that are not found now are no failure of a run that had them before: it waits for them."""
    begun = "inputs" in read_record(run.path)
    try:
        yield
    except (LoadError, ItemError) as error:
        if begun:
            raise ResumeError(str(error)) from error
        raise


def go_on_with(run: RunDir, found: Mapping[str, Any], **here: Any) -> None:
    """Refuse to go on with other inputs, note what else is other: the record of a run has to be true of all of it.

    Args: found: `fingerprints`; here: further fields of the record that can change numbers (device, threads).
    Raises ResumeError, naming each field, for other inputs.
    """
    if not distributed.first():
        return
    now = {"code": provenance.code(), "packages": provenance.packages(), **here}
    then = read_record(run.path)
    known = {name: value for name, value in (then.get("inputs") or {}).items() if name in found}
    if differing := checkpoints.differences(known, {name: found[name] for name in known}, "inputs."):
        raise ResumeError(
            f"{run.path} was begun with something else: {'; '.join(differing)}. Put it back, or remove the folder to "
            "start anew"
        )
    before = {name: then[name] for name in now if name in then}  # a run of an earlier version said less
    if changed := checkpoints.differences(before, {name: now[name] for name in before}):
        run.note(f"went on with other code, packages or machine: {'; '.join(changed)}")
    run.record(**now, machine=provenance.machine())
