"""Verify the published first: a released adapter on its base, by the paper's protocol, beside the paper's own numbers.

Re-runs of one setting have given 53.6 to 77.5, while the released adapter gives the printed 77.5: whoever gets the
printed numbers from it knows that model, data and evaluation are right before a GPU trains for a day. The weights and
the items are the same as the authors', so the numbers have to be, but for a few items that rounding decides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from dora_lab.io.errors import LoadError
from dora_lab.launch.run import run_spec
from dora_lab.launch.runtime import AS_THE_TIER_SAYS, Paths, Runtime
from dora_lab.models.base import adapter_folder
from dora_lab.runs.record import run_path
from dora_lab.runs.survey import verified
from dora_lab.spec import Method, Model, Spec, SpecError
from dora_lab.tasks import llava, sources

EXPERIMENT = "published"  # of the runs; no experiment has this name, so no table takes them for trained ones


@dataclass(frozen=True)
class Adapter:
    """What an adapter's own configuration says of it."""

    method: str  # "LoRA" or "DoRA"
    rank: int | None  # None: not the same in all layers


def spec_of(protocol: Spec, base: Model, data_dir: Path) -> Spec:
    """The run that evaluates `base` with its adapter as `protocol` (a spec of the paper tier) evaluates its models.

    It is asked every task whose files are in `data_dir`: of LLaVA's, or else in the layout of LLM-Adapters.
    """
    name, tasks, sha256 = "llm_adapters", sources.tasks_in, sources.hash_data
    if protocol.data.name == llava.NAME:
        name, tasks, sha256 = llava.NAME, llava.tasks_in, llava.hash_files_of
    data = replace(
        protocol.data, name=name, eval_name=None, tasks=tuple(tasks(data_dir)), sha256=sha256(data_dir), revision=None,
        train_items=None, validation_items=0,
    )  # fmt: skip
    longer = [text for text in protocol.evaluation.task_new_tokens if text.rpartition("=")[0] in data.tasks]
    return replace(
        protocol,
        experiment=EXPERIMENT,
        seed=0,
        model=base,
        data=data,
        method=Method(name="base"),
        optim=None,
        probe=None,
        evaluation=replace(protocol.evaluation, task_new_tokens=tuple(longer)),
    )


def evaluate(spec: Spec, paths: Paths, runtime: Runtime = AS_THE_TIER_SAYS) -> tuple[Adapter, Path]:
    """Run `spec` (skipped where it is complete); returns what the adapter is and the run's directory.

    Raises StoreError for a run that was complete and has changed since, see `survey.verified`.
    """
    if "generate" not in spec.evaluation.protocols:
        raise SpecError("evaluation.protocols: the paper's numbers are of generated answers; leave 'generate' in it")
    found = describe(adapter_folder(spec.model, paths.adapter_dir))
    run_spec(spec, paths, runtime)
    path = run_path(paths.results, spec)
    verified(path)
    return found, path


def describe(folder: Path) -> Adapter:
    """Method and rank from ``adapter_config.json``, PEFT's or the authors'; raises LoadError for one without."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        rank = config["r"]
        dora = config.get("use_dora") or config.get("peft_type") == "DORA"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise LoadError(f"{file}: no adapter configuration with a rank 'r' ({error}); fetch it again") from None
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise LoadError(f"{file}: r = {rank!r} is no rank; fetch it again")
    others = config.get("rank_pattern") or {}
    alike = isinstance(others, dict) and all(other == rank for other in others.values())
    return Adapter("DoRA" if dora else "LoRA", rank if alike else None)
