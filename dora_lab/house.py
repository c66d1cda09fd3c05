"""Where the lab's own files lie: beside the package in a clone, in its folder `shipped` where it came as a wheel."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "shipped").is_dir()  # from a wheel: pyproject.toml maps the folders below into it
HOUSE = PACKAGE / "shipped" if INSTALLED else PACKAGE.parent
EXPERIMENTS = HOUSE / "experiments"
REGISTERED = EXPERIMENTS / "registered"  # what was written down before an experiment's runs
CLAIMS = EXPERIMENTS / "claims.csv"
ANALYSIS = HOUSE / "analysis"
RESULTS = HOUSE / "results"  # the committed records
LOCAL = Path("results") if INSTALLED else RESULTS / "local"  # a user's own runs: never among the committed ones


def cache() -> Path:
    """Where what can be made or fetched again lies, beside other programs' caches; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora_lab"
