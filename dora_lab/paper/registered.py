"""What was written down before the runs: claims, numbers of seeds, metric and margins, in `experiments/registered`.

A registered file is prose with one fenced json block, which is read here. Its SHA-256 goes into the records of its
experiment's runs; that it is older than they are, the repository's history shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_lab.house import REGISTERED
from dora_lab.io.files import hash_bytes, parse_json
from dora_lab.paper.verdict import HYPOTHESES, MARGINS
from dora_lab.spec import did_you_mean, words

_BLOCK = re.compile(r"^```json\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A condition of a contrast, with its coefficient: a method at a rank, as the experiment's specs name them.

    where: what else sets it apart: dotted fields of a spec, and their values as JSON has them.
    """

    coefficient: float
    method: str
    rank: int | None
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A registered claim: that the contrast of `terms`, made so that more is better, is what `hypothesis` says."""

    name: str
    statement: str
    terms: tuple[Term, ...]
    hypothesis: str
    primary: bool  # of the family that is adjusted by Holm


@dataclass(frozen=True)
class Registered:
    """One registered file."""

    experiment: str
    tier: str
    data: str
    metric: str  # carries the verdicts; the other one is printed beside it
    margin: float  # points, or percent of a likelihood
    seeds: int  # each condition needs seeds 0 .. seeds - 1
    claims: tuple[Claim, ...]
    sha256: str
    tasks: tuple[str, ...] = ()  # that are scored; none: all
    beside: tuple[str, ...] = ()  # experiments whose runs are conditions too
    also: Mapping[str, float] = field(default_factory=dict)  # metrics that carry verdicts, too: their margins

    @property
    def carrying(self) -> tuple[str, ...]:
        """The metrics whose primary claims are one family."""
        return (self.metric, *self.also)


def registered(experiment: str, folder: Path = REGISTERED) -> Registered | None:
    """What is registered for an experiment, None if nothing is, or prose alone (its claims are judged elsewhere).

    Raises ValueError, naming file and field, for a file that cannot be read so.
    """
    file = folder / f"{experiment}.md"
    if not file.is_file():
        return None
    blocks = _BLOCK.findall(file.read_text(encoding="utf-8"))
    if not blocks:
        return None
    if len(blocks) != 1:
        raise ValueError(f"{file}: {len(blocks)} fenced json blocks, expected one")
    try:
        return _read(parse_json(blocks[0]), hash_bytes(file.read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: {what}; mend the json block") from None


def _read(values: Mapping[str, Any], sha256: str) -> Registered:
    metric, margin, given = values["metric"], float(values["margin"]), values.get("also", {})
    also = {str(name): float(given[name]) if isinstance(given, Mapping) else MARGINS.get(name, 0.0) for name in given}
    if strange := [name for name in (metric, *also) if name not in MARGINS]:
        raise ValueError(f"metric {strange[0]!r} is not one of {', '.join(MARGINS)}")
    claims = tuple(_claim(claim) for claim in values["claims"])
    if len({claim.name for claim in claims}) < len(claims):
        raise ValueError("two claims have one name")
    if min(margin, *also.values()) <= 0 or int(values["seeds"]) < 2:
        raise ValueError("margin must be above 0 and seeds at least 2")
    return Registered(
        values["experiment"],
        values["tier"],
        values["data"],
        metric,
        margin,
        int(values["seeds"]),
        claims,
        sha256,
        tuple(values.get("tasks", ())),
        tuple(values.get("beside", ())),
        also,
    )


def _claim(values: Mapping[str, Any]) -> Claim:
    if values["hypothesis"] not in HYPOTHESES:
        raise ValueError(f"hypothesis {values['hypothesis']!r} is not one of {', '.join(HYPOTHESES)}")
    terms = tuple(Term(float(c), str(method), rank, *where) for c, method, rank, *where in values["terms"])
    if strange := sorted({name for term in terms for name in term.where} - {"experiment", *words()}):
        raise ValueError(f"{values['name']}: {strange[0]!r} is no field of a spec; {did_you_mean(strange[0], words())}")
    if abs(sum(term.coefficient for term in terms)) > 1e-9:
        raise ValueError(f"the coefficients of {values['name']} do not add up to 0: {json.dumps(values['terms'])}")
    return Claim(values["name"], values["statement"], terms, values["hypothesis"], bool(values["primary"]))
