"""What a run is called in tables and figures.

The runs that an experiment names itself (its *declared* specs) are called by what they are among these: DoRA, DoRA† at
half of the one other rank, DoRA r=8 in a sweep. Any other run is called by the declared one that it is nearest to and
what sets it apart. So a run beside the others never changes how these are called, and who asks for "DoRA" gets the runs
whose spec says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dora_lab.report.labels import HALF_RANK, METHODS

GROUP = ["experiment", "tier", "model", "data", "eval_data", "split"]  # what never shares a column or a panel
_LOOSE = ("experiment", "tier", "split")
Columns = dict[str, Any]  # a spec flattened with dots, and the short names of `frames`

# How a run may be one of the declared but for its seed: wholly; on other data or another model; with other training
# too, where no run of the group is nearer.
_LIKE = (
    lambda field: field != "seed",
    lambda field: field.startswith(("method.", "optim.")),
    lambda field: field.startswith("method."),
)


def add_labels(runs: Sequence[Columns], declared: Sequence[Mapping[str, Any]] = ()) -> None:
    """Set `label` of each run; runs that differ in more than the seed get different ones. Without `declared` the runs
    of a group are called by what they are among each other."""
    named = [dict(spec) for spec in declared]
    for members in _grouped(named, GROUP):
        _among_each_other(members)
    for members in _grouped(runs, GROUP):
        # those on other data, or of another model, only where the experiment names none on these
        known = next((like for names in (GROUP, _LOOSE) if (like := _sharing(named, members[0], names))), [])
        _as_declared(members, known)
        _tell_variants_apart(members)


def _sharing(named: Sequence[Columns], run: Columns, names: Sequence[str]) -> list[Columns]:
    return [spec for spec in named if all(spec[name] == run[name] for name in names)]


def _as_declared(members: Sequence[Columns], known: Sequence[Columns]) -> None:
    for like in _LIKE:
        labels: dict[str, set[str]] = defaultdict(set)
        for spec in known:
            labels[_mark(spec, like)].add(spec["label"])
        found = [labels.get(_mark(run, like), set()) for run in members]
        trained = [names for run, names in zip(members, found, strict=True) if "optim.learning_rate" in run]
        if any(len(names) == 1 for names in trained or found):  # a base alone is alike whatever the training is
            for run, names in zip(members, found, strict=True):
                run["label"] = next(iter(names)) if len(names) == 1 else _beside(run, known, like)
            return
    _among_each_other(members)


def _mark(run: Mapping[str, Any], like: Callable[[str], bool]) -> str:
    """What two runs share that are alike; a field that is not set is not there."""
    return repr(sorted((field, repr(run[field])) for field in _fields(run) if like(field) and run[field] is not None))


def _fields(run: Mapping[str, Any]) -> list[str]:
    return [field for field in run if "." in field]


def _beside(run: Columns, known: Sequence[Columns], like: Callable[[str], bool]) -> str:
    """The plain name of the method, and in what a run differs from the nearest declared one of its method."""
    name = METHODS[run["method"]].label if run["method"] in METHODS else run["method"]
    differences = [_differing(run, spec) for spec in known if spec["method"] == run["method"]]
    fields = [field for field in min(differences, key=len, default=[]) if like(field)]
    rank = f" r={run['rank']}" if "method.rank" in fields else ""
    others = ", ".join(f"{field}={run.get(field)}" for field in fields if field != "method.rank")
    return name + rank + (f" ({others})" if others else "")


def _differing(run: Columns, spec: Columns) -> list[str]:
    """The fields in which a run differs from a declared one, but for those that keep groups apart anyway."""
    apart = {"model.name", "model.revision", "data.name", "data.eval_name", "data.sha256", "evaluation.split"}
    fields = sorted({*_fields(run), *_fields(spec)} - apart)
    return [field for field in fields if run.get(field) != spec.get(field)]


def _among_each_other(members: Sequence[Columns]) -> None:
    ranks = {run["rank"] for run in members if run["rank"] is not None}
    half = max(ranks) / 2 if ranks and ranks <= {max(ranks), max(ranks) / 2} else None
    own_ranks = defaultdict(set)
    for run in members:
        own_ranks[run["method"]].add(run["rank"])
    for run in members:
        name = METHODS[run["method"]].label if run["method"] in METHODS else run["method"]
        if run["rank"] is not None and run["rank"] == half:
            name += HALF_RANK
        elif half is None and len(own_ranks[run["method"]]) > 1:
            name += f" r={run['rank']}"
        run["label"] = name


def _tell_variants_apart(members: Sequence[Columns]) -> None:
    """Runs under one label must differ in the seed alone; where they do not, the fields that differ join the label."""
    for runs in _grouped(members, ["label"]):
        fields = sorted({field for run in runs for field in _fields(run)})
        differing = [field for field in fields if len({repr(run.get(field)) for run in runs}) > 1]
        # a probe changes nothing that is trained: seeds with and without one are of one cell, one seed twice is not
        plain = [field for field in differing if not field.startswith("probe.")]
        if len({repr([run.get(field) for field in ("seed", *plain)]) for run in runs}) == len(runs):
            differing = plain
        for run in runs:
            if differing:
                run["label"] += f" ({', '.join(f'{field}={run.get(field)}' for field in differing)})"


def _grouped(runs: Sequence[Columns], names: Sequence[str]) -> list[list[Columns]]:
    found: dict[tuple[Any, ...], list[Columns]] = defaultdict(list)
    for run in runs:
        found[tuple(run[name] for name in names)].append(run)
    return list(found.values())
