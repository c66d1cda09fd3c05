"""Each row of `image_text_quoted` differs in one thing from a row of `image_text`, and each claim is of such a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import frame
from analysis.tables import image_text_quoted as table
from dora_lab import paper
from dora_lab.spec import leaves, spec_id, to_dict
from experiments import image_text, image_text_quoted

RESULTS = Path(__file__).parents[1] / "results"
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


def test_each_row_of_the_table_is_of_its_runs_alone(tmp_path: Path) -> None:
    """By what no row is chosen by: seeds, and the parameters that are trained."""
    assert table.build(tmp_path) == []
    (tmp_path / "runs").symlink_to(RESULTS / "runs")
    (file,) = (path for path in table.build(tmp_path) if path.suffix == ".csv")
    rows = pd.read_csv(file)
    assert [*rows["name"]] == ["LoRA, matched", *image_text_quoted.ROWS, "LoRA, quoted"]
    assert [*rows["seeds"]] == [10] * 6 and [*rows["learning_rate"]] == [0.0019] * 3 + [0.0052, 0.003, 0.0052]
    frozen = rows["name"].str.contains("frozen|quoted")
    assert rows["percent"].round(2).map({9.92: False, 9.7: True}).eq(frozen).all()
    made = frame(RESULTS, "image_text_quoted")
    slower = made[(made["optim.learning_rate"] == 0.003) & (made["task"] == "nlvr2")]
    assert rows.set_index("name").loc["LoRA as quoted, slower", "nlvr2"] == pytest.approx(100 * slower["value"].mean())
