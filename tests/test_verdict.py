"""The rule that decides: against brute force, and how often it is wrong and right where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dora_lab.paper import verdict
from dora_lab.paper.verdict import Contrast, contrast, decide, p_value

TASKS, ITEMS, FACTS = 4, 100, 20


def _facts(seed: int = 0) -> dict[str, np.ndarray]:
    return {f"task {t}": np.repeat(np.arange(FACTS), ITEMS // FACTS) + 1000 * t for t in range(TASKS)}


def _drawn(rng: np.random.Generator, seeds: int, effect: float, seed_sd: float, fact_sd: float) -> Contrast:
    """Differences in points: of the seed, of the fact, and what is left (22, as measured between two trained runs)."""
    facts = _facts()
    of_seed = rng.normal(0, seed_sd, (seeds, 1))
    values = {
        task: (effect + of_seed + rng.normal(0, fact_sd, FACTS)[number % 1000] + rng.normal(0, 22, (seeds, ITEMS)))
        / 100
        for task, number in facts.items()
    }
    return contrast([(1.0, values)], facts, ratio=False)


def test_without_facts_it_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    first, second = ({f"t{t}": rng.random((6, 8)) for t in range(3)} for _ in range(2))
    facts = {task: np.zeros(8, int) for task in first}  # one fact alone: no share of its own
    found = contrast([(1, first), (-1, second)], facts, ratio=False)
    means = [np.mean([values[task].mean(1) for task in facts], axis=0) for values in (first, second)]
    theirs = stats.ttest_rel(*means)
    assert found.value == pytest.approx(100 * (means[0] - means[1]).mean())
    assert found.p() == pytest.approx(theirs.pvalue) and found.df == pytest.approx(5)
    assert found.interval() == pytest.approx([100 * end for end in theirs.confidence_interval(0.95)])


def test_the_facts_share_is_the_variance_of_their_means() -> None:
    """Seeds that agree to the digit: what is left is that other facts could have been asked."""
    rng = np.random.default_rng(2)
    of_fact = rng.normal(size=50)
    values = {"t": np.tile(np.repeat(of_fact, 4), (5, 1))}
    found = contrast([(1, values)], {"t": np.repeat(np.arange(50), 4)}, ratio=False)
    assert found.sd == pytest.approx(100 * of_fact.std(ddof=1) / np.sqrt(50))
    assert found.df == pytest.approx(49) and found.facts == 50 and found.items == 200


def test_a_fact_that_two_tasks_ask_about_is_one() -> None:
    rng = np.random.default_rng(3)
    values = {"a": rng.random((4, 10)), "b": rng.random((4, 10))}
    same = contrast([(1, values)], {"a": np.arange(10), "b": np.arange(10)}, ratio=False)
    apart = contrast([(1, values)], {"a": np.arange(10), "b": 10 + np.arange(10)}, ratio=False)
    twice = contrast([(1, {"a": values["a"], "b": values["a"]})], {t: np.arange(10) for t in "ab"}, ratio=False)
    once = contrast([(1, {"a": values["a"]})], {"a": np.arange(10)}, ratio=False)
    assert (same.facts, apart.facts) == (10, 20) and same.value == apart.value
    assert twice.sd == pytest.approx(once.sd) and twice.df == pytest.approx(once.df)


def test_likelihoods_are_compared_as_ratios() -> None:
    rng = np.random.default_rng(4)
    one = {"t": rng.random((6, 40)) + 0.5}
    other = {"t": one["t"] * 1.1}
    found = contrast([(1, other), (-1, one)], {"t": np.arange(40)}, ratio=True)
    assert found.value == pytest.approx(100 * np.log(1.1)) and found.sd == pytest.approx(0, abs=1e-9)


def test_the_interval_covers_as_it_says_beside_a_crossed_bootstrap() -> None:
    rng = np.random.default_rng(5)
    facts = _facts()
    values = {
        task: rng.normal(0.01, 0.2, (20, ITEMS)) + rng.normal(0, 0.1, FACTS)[n % 1000] for task, n in facts.items()
    }
    found = contrast([(1, values)], facts, ratio=False)
    means_SC = {task: v.reshape(20, FACTS, -1).mean(2) for task, v in values.items()}
    drawn = []
    for _ in range(3000):
        seeds = rng.integers(0, 20, 20)
        picks = [m[seeds][:, rng.integers(0, FACTS, FACTS)].mean() for m in means_SC.values()]
        drawn.append(100 * np.mean(picks))
    assert found.sd == pytest.approx(np.std(drawn), rel=0.15)


@pytest.mark.parametrize(("seeds", "allowed"), [(3, 0.07), (5, 0.055), (20, 0.04)])
def test_where_nothing_is_it_seldom_says_holds(seeds: int, allowed: float) -> None:
    rng = np.random.default_rng(seeds)
    said = []
    for seed_sd, fact_sd in ((1.0, 0.0), (2.3, 5.0)):
        found = [_drawn(rng, seeds, 0.0, seed_sd, fact_sd) for _ in range(250)]
        said += [decide(one, "superior", 1.0, one.p()) for one in found]
    assert np.mean([text.startswith("holds") for text in said]) <= allowed
    assert np.mean([text.startswith("does not hold") for text in said]) <= allowed


def test_twenty_seeds_find_a_point_and_tell_an_equal_from_an_unknown() -> None:
    rng = np.random.default_rng(6)
    there = [_drawn(rng, 20, 1.0, 1.0, 0.0) for _ in range(200)]
    said = [decide(one, "superior", 1.0, one.p()) for one in there]
    assert np.mean([text.startswith("holds") for text in said]) > 0.75
    none = [_drawn(rng, 20, 0.0, 0.3, 0.0) for _ in range(200)]
    said = [decide(one, "superior", 1.0, one.p()) for one in none]
    assert np.mean([text == "equivalent" for text in said]) > 0.7
    edge = [_drawn(rng, 20, -1.0, 0.3, 0.0) for _ in range(400)]  # inferior by the margin: 5 % may pass
    passed = [decide(one, "not inferior", 1.0, p_value(one, "not inferior", 1.0)) == "not inferior" for one in edge]
    assert np.mean(passed) <= 0.075


def _at(value: float, sd: float) -> Contrast:
    return Contrast(value=value, sd=sd, df=19.0, per_seed=(value,) * 20, facts=1, items=1)


@pytest.mark.parametrize(
    ("value", "sd", "hypothesis", "said"),
    [
        (2.0, 0.4, "superior", "holds"), (-2.0, 0.4, "superior", "does not hold"),
        (0.5, 0.1, "superior", "holds, inside the margin"), (0.1, 0.3, "superior", "equivalent"),
        (0.1, 2.0, "superior", "undecided"), (0.0, 0.4, "not inferior", "not inferior"),
        (-0.5, 0.4, "not inferior", "undecided"), (-3.0, 0.4, "not inferior", "does not hold"),
        (0.0, 0.3, "equivalent", "equivalent"), (3.0, 0.3, "equivalent", "does not hold"),
        (0.9, 0.6, "equivalent", "undecided"),
    ],
)  # fmt: skip
def test_verdicts(value: float, sd: float, hypothesis: str, said: str) -> None:
    found = _at(value, sd)
    assert decide(found, hypothesis, 1.0, p_value(found, hypothesis, 1.0)) == said


def test_an_adjusted_p_decides_and_one_seed_decides_nothing() -> None:
    assert decide(_at(2.0, 0.9), "superior", 0.5, _at(2.0, 0.9).p()) == "holds"
    assert decide(_at(2.0, 0.9), "superior", 0.5, 0.08) == "undecided"
    alone = contrast([(1, {"t": np.ones((1, 5))})], {"t": np.arange(5)}, ratio=False)
    assert alone.interval() is None and decide(alone, "superior", 1.0, alone.p()) == "undecided"
    with pytest.raises(ValueError, match="not one of"):
        decide(alone, "better", 1.0, None)


def test_conditions_of_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="same tasks, seeds and items"):
        contrast([(1, {"t": np.ones((2, 5))}), (-1, {"t": np.ones((2, 6))})], {"t": np.arange(5)}, ratio=False)


def test_benjamini_hochberg_by_hand() -> None:
    assert verdict.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert verdict.benjamini_hochberg([]) == []
