"""What is registered before the runs: how it is read, and how an experiment's runs answer it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dora_lab.house import REGISTERED
from dora_lab.launch.experiments import load_experiment
from dora_lab.paper.judged import judge
from dora_lab.paper.registered import Registered, registered
from dora_lab.report.items import clusters, item_values
from dora_lab.runs.item_values import number_of, pack
from dora_lab.spec import Spec, to_dict

PLAN: dict[str, Any] = {
    "experiment": "commonsense", "tier": "mini", "data": "mini2", "metric": "choice_nll", "margin": 5, "seeds": 4,
    "claims": [
        {"name": "above", "statement": "DoRA beats LoRA", "hypothesis": "superior", "primary": True,
         "terms": [[1, "dora", 8], [-1, "lora", 8]]},
        {"name": "half", "statement": "half is not worse", "hypothesis": "not inferior", "primary": True,
         "terms": [[1, "dora", 4], [-1, "lora", 8]]},
        {"name": "ft", "statement": "as FT", "hypothesis": "equivalent", "primary": False,
         "terms": [[1, "dora", 8], [-1, "ft", None]]},
    ],
}  # fmt: skip


def _write(folder: Path, plan: dict[str, Any]) -> Path:
    (folder / "commonsense.md").write_text(f"# Why\n\n```json\n{json.dumps(plan)}\n```\n\nprose\n")
    return folder


def test_a_file_is_read_and_hashed(tmp_path: Path) -> None:
    plan = registered("commonsense", _write(tmp_path, PLAN))
    assert isinstance(plan, Registered) and plan.seeds == 4 and plan.claims[2].terms[1].rank is None
    assert registered("ranks", tmp_path) is None
    (tmp_path / "commonsense.md").write_text((tmp_path / "commonsense.md").read_text() + "\n")
    again = registered("commonsense", tmp_path)
    assert again is not None and again.sha256 != plan.sha256 and again.claims == plan.claims


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "f1"}, "metric 'f1' is not one of"), ({"seeds": 1}, "seeds at least 2"),
        ({"claims": [PLAN["claims"][0] | {"hypothesis": "better"}]}, "hypothesis 'better' is not one of"),
        ({"claims": [PLAN["claims"][0] | {"terms": [[1, "dora", 8]]}]}, "do not add up to 0"),
        ({"claims": PLAN["claims"][:1] * 2}, "two claims have one name"),
        ({"claims": [PLAN["claims"][0] | {"terms": [[1, "dora", 8, {"method.detachnorm": False}], [-1, "lora", 8]]}]},
         "'method.detachnorm' is no field of a spec; did you mean 'method.detach_norm'"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"commonsense\.md: .*{said}.*mend the json block"):
        registered("commonsense", _write(tmp_path, PLAN | change))
    (tmp_path / "commonsense.md").write_text("prose alone")
    assert registered("commonsense", tmp_path) is None
    (tmp_path / "commonsense.md").write_text("```json\n{}\n```\n" * 2)
    with pytest.raises(ValueError, match="2 fenced json blocks, expected one"):
        registered("commonsense", tmp_path)


def _evals(seeds: int = 4) -> pd.DataFrame:
    """NLL of DoRA 20 % below LoRA's, at half the rank the same, FT's as DoRA's; items in pairs of one fact."""
    rng, rows = np.random.default_rng(0), []
    for task in ("boolq", "piqa"):
        base = rng.random(40) + 0.5
        for seed in range(seeds):
            noise = rng.normal(1, 0.01, 40)
            for method, rank, factor in (("lora", 8, 1.0), ("dora", 8, 0.8), ("dora", 4, 1.0), ("ft", None, 0.8)):
                values = base * noise * factor * rng.normal(1, 0.002)
                per_item = {"choice_nll": pack("choice_nll", values)}
                per_item["fact"] = pack("fact", [number_of(f"f{i // 2}") for i in range(40)])
                rows.append(
                    {"experiment": "commonsense", "tier": "mini", "data": "mini2", "split": "test",
                     "protocol": "loglikelihood", "seed": seed, "method": method, "rank": rank,
                     "label": f"{method} {rank}", "task": task, "n": 40,
                     "value": 0.5, "correct": "01" * 20, "per_item": per_item, "spec_id": f"{method}{rank}{seed}"}
                )  # fmt: skip
    return pd.DataFrame(rows).astype({"rank": "Int64"})


def test_claims_are_judged_by_the_metric_that_carries_them(tmp_path: Path) -> None:
    plan = registered("commonsense", _write(tmp_path, PLAN))
    assert plan is not None
    rows = judge(plan, _evals()).set_index(["claim", "metric"])
    above = rows.loc[("above", "choice_nll")]
    assert above["verdict"] == "holds" and above["effect"] == pytest.approx(-100 * np.log(0.8), abs=1)
    assert above["facts"] == 20 and above["items"] == 80 and above["seeds"] == "4/4" and above["family"] == "primary"
    assert rows.loc[("half", "choice_nll"), "verdict"] == "not inferior"
    assert rows.loc[("ft", "choice_nll"), "verdict"] == "equivalent"
    assert rows.loc[("ft", "choice_nll"), "family"] == "exploratory"
    primary = rows[rows["family"] == "primary"]
    assert primary["p_adjusted"].max() == pytest.approx(max(primary["p"].max(), 2 * primary["p"].min()))
    assert not rows.loc[("above", "accuracy"), "carries"]


def test_fewer_seeds_than_registered_are_no_verdict(tmp_path: Path) -> None:
    plan = registered("commonsense", _write(tmp_path, PLAN))
    assert plan is not None
    assert set(judge(plan, _evals(3))["verdict"]) == {"3 of 4"}
    nothing = judge(plan, _evals().iloc[:0])
    assert set(nothing["verdict"]) == {"0 of 4"} and nothing["effect"].isna().all()
    evals = _evals()
    evals.loc[evals["label"] == "ft <NA>", "seed"] += 4  # beyond the plan's number: not its runs
    assert set(judge(plan, pd.concat([_evals(), evals.assign(seed=evals["seed"] + 4)]))["n"]) == {4}


def test_a_run_that_lacks_a_task_is_no_seed_and_leaves_the_other_tasks_no_verdict(tmp_path: Path) -> None:
    plan = registered("commonsense", _write(tmp_path, PLAN))
    asked = registered("commonsense", _write(tmp_path, PLAN | {"tasks": ["boolq", "piqa"]}))
    assert plan is not None and asked is not None
    evals = _evals()
    lacking = evals[(evals["task"] != "piqa") | (evals["label"] != "dora 8") | (evals["seed"] > 0)]
    none = evals[(evals["task"] != "piqa") | (evals["label"] != "dora 8")]
    row = judge(plan, lacking).set_index(["claim", "metric"]).loc[("above", "choice_nll")]
    assert (row["verdict"], row["items"]) == ("3 of 4", 80)
    for plans, left in ((plan, none), (asked, none), (asked, evals[evals["task"] != "piqa"])):
        assert judge(plans, left).set_index(["claim", "metric"]).loc[("above", "choice_nll"), "verdict"] == "0 of 4"


def test_a_hypothesis_without_runs_is_still_one_of_its_family(tmp_path: Path) -> None:
    plan = registered("commonsense", _write(tmp_path, PLAN))
    assert plan is not None
    rows = judge(plan, _evals().query("rank != 4 or method != 'dora'")).set_index(["claim", "metric"])
    assert rows.loc[("half", "choice_nll"), "verdict"] == "0 of 4"
    row = rows.loc[("above", "choice_nll")]
    assert row["p_adjusted"] == pytest.approx(2 * row["p"])


def test_conditions_of_other_experiments_stand_beside(tmp_path: Path) -> None:
    """`detach` beside `commonsense`: of one method and rank, told apart by a field of the spec."""
    terms = [[1, "dora", 8, {"method.detach_norm": True}], [-1, "dora", 8, {"method.detach_norm": False}]]
    claim = PLAN["claims"][0] | {"terms": terms}
    evals = _evals().assign(**{"method.detach_norm": True})
    other = _evals().query("method == 'lora'").assign(experiment="detach", method="dora", spec_id="x")
    both = pd.concat([evals, other.assign(**{"method.detach_norm": False})])
    for beside, verdict in (([], "0 of 4"), (["commonsense"], "holds")):
        plan = PLAN | {"experiment": "detach", "beside": beside, "claims": [claim]}
        (tmp_path / "detach.md").write_text(f"```json\n{json.dumps(plan)}\n```\n")
        found = registered("detach", tmp_path)
        assert found is not None
        row = judge(found, both).set_index("metric").loc["choice_nll"]
        assert row["verdict"] == verdict
    assert row["effect"] == pytest.approx(-100 * np.log(0.8), abs=1)


def test_two_settings_of_one_cell_are_refused(tmp_path: Path) -> None:
    plan = registered("commonsense", _write(tmp_path, PLAN))
    assert plan is not None
    with pytest.raises(ValueError, match="two settings of dora rank 8"):
        judge(plan, pd.concat([_evals(), _evals().query("method == 'dora'").assign(label="other")]))


def test_values_and_clusters_of_a_row() -> None:
    row = {"spec_id": "x", "task": "boolq", "n": 3, "correct": "101"}
    assert item_values(row, "accuracy").tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="run x, task boolq: no choice_nll of single items"):
        item_values(row, "choice_nll")
    with pytest.raises(ValueError, match="expected 4 characters"):
        item_values(row | {"n": 4}, "accuracy")
    alone = [clusters(row | {"task": task}) for task in ("boolq", "piqa")]
    assert len({*alone[0].tolist(), *alone[1].tolist()}) == 6 and max(map(max, alone)) < 0


@pytest.mark.parametrize("file", sorted(REGISTERED.glob("*.md")), ids=lambda file: file.stem)
def test_every_condition_has_the_seeds_that_are_registered(file: Path) -> None:
    """In the specs of the experiment and of those beside it: a claim about runs that nobody makes is never judged."""
    plan = registered(file.stem)
    if plan is None:
        return
    modules = [load_experiment(name) for name in (plan.experiment, *plan.beside)]
    if any(getattr(module, "RATES", None) == {} for module in modules):
        pytest.skip("its rates are not chosen yet")
    made = [spec for module in modules for spec in module.specs(plan.tier)]
    made = [spec for spec in made if spec.data.name == plan.data and spec.evaluation.split == "test"]
    for term in (term for claim in plan.claims for term in claim.terms):
        seeds = Counter(
            spec.seed
            for spec in made
            if (spec.method.name, spec.method.rank) == (term.method, term.rank)
            and all(asked(spec, field) == value for field, value in term.where.items())
        )
        seeds = {seed: count for seed, count in seeds.items() if seed < plan.seeds}
        assert seeds == dict.fromkeys(range(plan.seeds), 1), term


def asked(spec: Spec, field: str) -> object:
    """The value of a dotted field, as JSON has it."""
    value: object = to_dict(spec)
    for name in field.split("."):
        value = value[name]  # type: ignore[index]
    return value
