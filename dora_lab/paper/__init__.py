"""Claims against runs: verdicts for what the paper says, and our committed numbers against a user's own.

- `claims`: the rows of `experiments/claims.csv`, the paper's numbers and directional claims and those of others.
- `registered`, `judge`: what was written down before an experiment's runs, and what they say; `verdict` is the rule.
  `predicted`: the same of a number that was said to lie somewhere.
- `verdicts`: each directional claim against the frames of `report.frame`; `layer_correlation` is what figure 2 shows.
- `cells`: every number that the paper prints against runs of the same protocol, and against re-runs by others;
  `summary` counts them.
- `compare`: a user's runs against the committed ones, a `Comparison`.

Nothing here imports torch.
"""

from __future__ import annotations

from dora_lab.paper.cells import CELL_VERDICTS, cells, summary
from dora_lab.paper.claims import CLAIMS, claims
from dora_lab.paper.compare import STEPS, Comparison, compare
from dora_lab.paper.directions import layer_correlation, protocols, verdicts
from dora_lab.paper.judged import judge
from dora_lab.paper.registered import registered

__all__ = [
    "CELL_VERDICTS",
    "CLAIMS",
    "STEPS",
    "Comparison",
    "cells",
    "claims",
    "compare",
    "judge",
    "layer_correlation",
    "protocols",
    "registered",
    "summary",
    "verdicts",
]
