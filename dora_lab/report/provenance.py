"""Where a table or figure comes from, in words and as metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from dora_lab.report.labels import MISSING


@dataclass(frozen=True)
class Provenance:
    """Where a table or figure comes from: experiments, tiers, spec ids of its runs, code commits, runs left out."""

    experiments: tuple[str, ...]
    tiers: tuple[str, ...]
    runs: tuple[str, ...]
    commits: tuple[str, ...]
    modified: bool
    statuses: Mapping[str, int]

    def caption(self) -> str:
        """One line for a reader: experiment, tier, number of complete runs, commit."""
        commits = ", ".join(c if c.startswith("files ") else c[:10] for c in self.commits[:3]) or "unknown"
        if len(self.commits) > 3:
            commits += f" and {len(self.commits) - 3} more"
        changed = " with uncommitted changes" if self.modified else ""
        if self.commits and not self.tiers:
            where = ", ".join(name if "/" in name else f"experiments/{name}.py" for name in self.experiments)
            return f"Measured by {where}, code {commits}{changed}."
        if not self.experiments:
            return "From what is printed; no run is in it."
        return (
            f"Experiment {', '.join(self.experiments) or MISSING}, tier {', '.join(self.tiers) or MISSING}, "
            f"{len(self.runs)} complete run{'' if len(self.runs) == 1 else 's'}, code {commits}{changed}."
        )

    def incomplete(self) -> str | None:
        """One line on the runs that are not in it, None if there are none."""
        total = sum(self.statuses.values())
        if not total:
            return None
        parts = ", ".join(f"{number} {status}" for status, number in self.statuses.items())
        return f"{total} run{' is' if total == 1 else 's are'} not complete and left out: {parts}."


def provenance(data: pd.DataFrame, statuses: Mapping[str, int] | None = None) -> Provenance:
    """Provenance of the runs in a frame; `statuses` (default: the frame's own) counts the incomplete ones."""

    def values(column: str) -> tuple[str, ...]:
        return tuple(sorted(str(value) for value in data[column].dropna().unique()))

    return Provenance(
        values("experiment"),
        values("tier"),
        values("spec_id"),
        values("commit"),
        bool(data["modified"].fillna(False).astype(bool).any()),
        dict(statuses if statuses is not None else data.attrs.get("statuses", {})),
    )
