"""What results/findings.md says, held to its tables: a sentence does not change itself when a run comes in."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

RESULTS = Path(__file__).parents[1] / "results"
TABLES = RESULTS / "tables"
TEXT = (RESULTS / "findings.md").read_text(encoding="utf-8").replace("−", "-")
NUMBER = r"-?\d+(?:\.\d+)?"
INTERVAL = re.compile(rf"\+?({NUMBER})(?:\s(?:%|points|of|NLL|accuracy))*\s\[({NUMBER}), ({NUMBER})\]")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.count("|") == 7 and not line.startswith(("| Claim", "| ---"))
]


@cache
def intervals() -> pd.DataFrame:
    """effect, low, high, verdict, n, p of every judged contrast: as a table has them."""
    judged = pd.read_csv(TABLES / "verdicts.csv")
    judged = judged[judged["experiment"].notna()].drop(columns="p").rename(columns={"p_adjusted": "p"})
    parts = [judged[["effect", "low", "high", "verdict", "n", "p", "claim", "experiment", "family", "carries"]]]
    for name in ("stability", "capacity"):
        found = pd.read_csv(TABLES / f"{name}.csv")
        n = found["seeds"].max()
        parts.append(found[found["verdict"].notna()].rename(columns={"value": "effect"}).assign(n=n, p=np.nan))
    decay = pd.read_csv(TABLES / "image_text_decay.csv")
    parts.append(decay[decay["window"] == "late"].rename(columns={"r": "effect"})[["effect", "low", "high"]])
    return pd.concat(parts, ignore_index=True)


def alike(said: str, number: float) -> bool:
    """Whether a number was printed from this one, to as many digits as it has."""
    digits = len(said.partition(".")[2])
    return abs(float(said) - number) <= 0.5001 * 10**-digits


def matching(said: tuple[str, ...]) -> pd.DataFrame:
    every = intervals()
    values = zip(every["effect"], every["low"], every["high"], strict=True)
    return every[[all(map(alike, said, found)) or all(map(alike, said, lost(found))) for found in values]]


def lost(found: tuple[float, float, float]) -> tuple[float, float, float]:
    """A gain, told as a loss."""
    effect, low, high = found
    return -effect, -high, -low


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_is_a_row_of_the_verdicts(row: list[str]) -> None:
    claim, verdict, effect, p, n, _ = row
    (said,) = INTERVAL.findall(effect)
    found = matching(said)
    found = found[(found["verdict"] == verdict) & (found["n"].astype(int) == int(n))]
    assert len(found), claim
    if p.startswith("<"):
        assert (found["p"] < float(p[2:])).any()
    else:
        assert found["p"].isna().all() if p == "–" else any(alike(p, known) for known in found["p"])


def test_every_interval_of_the_text_is_one_of_a_table() -> None:
    said = INTERVAL.findall(TEXT)
    assert len(said) >= len(ROWS) + 6
    assert [one for one in said if matching(one).empty] == []


def test_every_judged_primary_claim_has_its_row() -> None:
    every = intervals()
    primary = every["family"].eq("primary") & every["carries"].eq(True)
    judged = every[primary & ~every["verdict"].str.contains(" of ")]
    told = [INTERVAL.findall(row[2])[0] for row in ROWS]
    missing = [
        f"{row.experiment}: {row.claim}"
        for row in judged.itertuples()
        if not any(all(map(alike, one, (row.effect, row.low, row.high))) for one in told)
    ]
    assert missing == []


def test_what_is_not_judged_is_not_told_as_a_verdict() -> None:
    every = intervals()
    small = every[(every["experiment"] == "small") & (every["family"] == "primary")]
    for verdict in small["verdict"].unique():
        assert f"(tier `small`, {verdict} registered seeds: no verdict)" in TEXT
