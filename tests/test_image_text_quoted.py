"""Each row of `image_text_quoted` differs in one thing from a row of `image_text`, and each claim is of such a pair."""

from __future__ import annotations

from typing import Any

import pytest

from dora_lab import paper
from dora_lab.spec import leaves, spec_id, to_dict
from experiments import image_text, image_text_quoted

MADE = [*image_text.confirmation(), *image_text_quoted.specs("mini")]
PLAN = paper.registered("image_text_quoted")
APART = {
    "dropout": {"method.dropout"},
    "norms": {"method.also_train"},
    # its visual embedding keeps its rate, which is a share of the other one
    "scale": {"method.alpha", "optim.learning_rate", "optim.groups"},
    "slower": {"optim.learning_rate", "optim.groups"},
}


def _flat(spec: Any) -> dict[str, Any]:
    return dict(leaves(to_dict(spec)))


@pytest.mark.parametrize("name", APART)
def test_a_claim_is_about_ten_seeds_of_two_rows_that_differ_in_what_it_says(name: str) -> None:
    assert PLAN is not None
    claim = next(claim for claim in PLAN.claims if claim.name == name)
    sides = []
    for term in claim.terms:
        rows = [spec for spec in map(_flat, MADE) if spec["method.name"] == term.method]
        rows = [row for row in rows if row["method.rank"] == term.rank and row["data.name"] == PLAN.data]
        mine = [row for row in rows if all(row[field] == value for field, value in term.where.items())]
        assert sorted(row["seed"] for row in mine) == list(range(PLAN.seeds))
        sides.append({row["seed"]: row for row in mine})
    for seed in range(PLAN.seeds):
        one, other = sides[0][seed], sides[1][seed]
        fields = {field for field in (*one, *other) if not field.startswith("probe")}
        assert {field for field in fields if one[field] != other[field]} == {"experiment", *APART[name]}


def test_no_run_is_made_twice() -> None:
    assert len({spec_id(spec) for spec in MADE}) == len(MADE)
