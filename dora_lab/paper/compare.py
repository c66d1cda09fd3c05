"""A user's own runs against the committed ones, run by run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_lab.runs.record import iter_runs
from dora_lab.runs.streams import read_rows


@dataclass(frozen=True)
class _Score:
    spec_id: str
    setting: str  # experiment, tier, model and data
    method: str
    protocol: str
    by_task: dict[str, tuple[float, int]]  # accuracy (fraction), items

    @property
    def average(self) -> float:
        return sum(value for value, _ in self.by_task.values()) / len(self.by_task)

    @property
    def variance(self) -> float:
        return sum(v * (1 - v) / n for v, n in self.by_task.values() if n) / len(self.by_task) ** 2


def compare(local_root: Path, committed_root: Path, experiment: str | None = None) -> tuple[str, bool]:
    """A user's runs against the committed records, run by run of the same spec_id, summarised per method.

    Training on another CPU adds up floats in another order, which can flip single items; so besides "agree exactly"
    (every task of every run equal) there is "within tolerance": the method's averages differ by at most two binomial
    standard errors of the difference of two such averages (items counted once, not once per seed, since all seeds
    answer the same items). Beyond that they "differ"; without a local run they are "missing". Committed runs on data, a
    model or a tier that none of the user's runs is about are left out: nobody asked for them.

    Args: the roots are results folders (with `runs/` in them); experiment: one name, None = all of the committed ones.
    Returns (text for a terminal, ok); ok means that every committed method has all its runs and none differs.
    """
    packages: dict[str, dict[str, str]] = {}
    local, committed = _scores(local_root, experiment, packages), _scores(committed_root, experiment, packages)
    if not committed:
        return f"No complete committed runs in {committed_root}: there is nothing to compare with.", False
    asked = {score.setting for score in local.values()}
    by_method: dict[tuple[str, str, str], list[_Score]] = defaultdict(list)
    for score in committed.values():
        if not asked or score.setting in asked:
            by_method[score.setting, score.method, score.protocol].append(score)
    if not by_method:
        return f"No complete committed run in {committed_root} is about {', '.join(sorted(asked))}.", False
    lines = [f"{'method':<18} {'protocol':<14} {'runs':>5} {'local':>7} {'committed':>10} {'tolerance':>10}  agreement"]
    counts: dict[str, int] = defaultdict(int)
    before = ""
    for (setting, method, protocol), scores in sorted(by_method.items()):
        if setting != before:
            lines.append(f"{setting}:")
        before = setting
        pairs = [(local[s.spec_id, protocol], s) for s in scores if (s.spec_id, protocol) in local]
        status, ours, theirs, tolerance = _agreement(pairs, len(scores))
        counts[status] += 1
        cells = [f"{100 * v:.2f}" if v is not None else "–" for v in (ours, theirs, tolerance)]
        lines.append(
            f"{method:<18} {protocol:<14} {len(pairs)}/{len(scores):<3} {cells[0]:>7} {cells[1]:>10} "
            f"{cells[2]:>10}  {status}"
        )
    extra = len({spec_id for spec_id, _ in set(local) - set(committed)})
    if extra:
        lines.append(f"{extra} of your runs have no committed record and are not compared.")
    ok = not counts["differ"] and not counts["missing"]
    lines.append(
        "Average accuracy in percent over tasks and the runs that both have; tolerance: two binomial standard "
        "errors of the difference."
    )
    lines.append(
        ("The numbers agree with the committed records" if ok else "The numbers do not all agree")
        + ": "
        + ", ".join(f"{n} {status}" for status, n in sorted(counts.items()) if n)
        + "."
    )
    if counts["differ"] and packages:
        lines += _package_differences(packages)
    return "\n".join(lines), ok


def _agreement(
    pairs: Sequence[tuple[_Score, _Score]], wanted: int
) -> tuple[str, float | None, float | None, float | None]:
    if not pairs:
        return "missing", None, None, None
    ours, theirs = (sum(pair[side].average for pair in pairs) / len(pairs) for side in (0, 1))
    tolerance = 2 * math.sqrt(sum(a.variance + b.variance for a, b in pairs) / len(pairs))
    if any(set(a.by_task) != set(b.by_task) for a, b in pairs):
        return "differ", ours, theirs, tolerance
    if len(pairs) < wanted:
        return "missing", ours, theirs, tolerance
    if all(a.by_task == b.by_task for a, b in pairs):
        return "agree exactly", ours, theirs, tolerance
    return ("within tolerance" if abs(ours - theirs) <= tolerance else "differ"), ours, theirs, tolerance


def _scores(root: Path, experiment: str | None, packages: dict[str, dict[str, str]]) -> dict[tuple[str, str], _Score]:
    found: dict[tuple[str, str], _Score] = {}
    for path, record in iter_runs(Path(root), experiment):
        if record["status"] != "complete":
            continue
        packages[str(root)] = dict(record.get("packages") or {})
        method, rank = record["spec"]["method"]["name"], record["spec"]["method"].get("rank")
        for row in read_rows(path, "eval"):
            if row["metric"] == "accuracy" and row["value"] is not None:
                key = record["spec_id"], row["protocol"]
                name = method if rank is None else f"{method} rank {rank}"
                spec = record["spec"]
                data = spec["data"].get("eval_name") or spec["data"]["name"]
                setting = f"{spec['experiment']}, tier {spec['tier']}, model {spec['model']['name']}, data {data}"
                found.setdefault(key, _Score(record["spec_id"], setting, name, row["protocol"], {}))
                found[key].by_task[row["task"]] = (float(row["value"]), int(row["n"]))
    return found


def _package_differences(packages: dict[str, dict[str, str]]) -> list[str]:
    if len(packages) != 2:
        return []
    ours, theirs = packages.values()
    changed = [
        f"{name} {ours.get(name, '–')} (committed: {theirs.get(name, '–')})"
        for name in sorted(set(ours) | set(theirs))
        if ours.get(name) != theirs.get(name)
    ]
    return [f"Packages that differ: {', '.join(changed)}."] if changed else []
