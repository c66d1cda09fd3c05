"""Metrics against the values of their published scripts, item by item, and against definitions written out anew."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_lab.metrics import METRICS, ScoreError, score
from dora_lab.metrics.choice import pope
from dora_lab.metrics.cider import cider_d
from dora_lab.metrics.ptb import words
from dora_lab.metrics.vqa import normalise, soft_accuracy

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"
VQA = ("released", "both", "m4c")


def fixture(name: str) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, float]]:
    """(items, outputs by id, the reference's summary)"""
    data = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    assert len(data["items"]) >= 200
    return data["items"], {item["id"]: item["output"] for item in data["items"]}, data["summary"]


@pytest.mark.parametrize("rule", VQA)
def test_vqa_is_what_the_published_evaluators_say(rule: str) -> None:
    items, outputs, _ = fixture("vqa")
    for item in items:
        if rule in item["normalised"]:
            assert normalise(item["output"], rule) == item["normalised"][rule], item["id"]
    found = score(f"vqa_{rule}", items, outputs, "vqa.json")
    for item, value in zip(items, found.values, strict=True):
        assert value == pytest.approx(item["value"][rule], abs=1e-12), item
    assert set(found.values) == {0.0, 0.3, 0.6, 0.9, 1.0}
    assert found.summary["accuracy"] == pytest.approx(np.mean([item["value"][rule] for item in items]), abs=1e-12)


def test_the_three_rules_of_vqa_are_told_apart_by_the_fixture() -> None:
    items, _, _ = fixture("vqa")
    for first, second in (*pairwise(VQA), ("released", "m4c")):
        assert sum(item["value"][first] != item["value"][second] for item in items) >= 5, (first, second)


@pytest.mark.parametrize("matches", range(11))
def test_soft_accuracy_leaves_one_annotator_out(matches: int) -> None:
    annotators = ["dog"] * matches + [f"x{number}" for number in range(10 - matches)]
    each = [min(1, (matches - (answer == "dog")) / 3) for answer in annotators]
    for rule in VQA:
        assert soft_accuracy("dog", annotators, rule) == pytest.approx(sum(each) / 10, abs=1e-12)


def test_what_the_released_rule_of_vqa_misses_and_the_corrected_one_does_not() -> None:
    for annotators, answer in (
        (["two"] * 9 + ["2 dogs"], "two"),
        (["Yes."] * 10, "Yes."),
        (["The dog"] * 10, "the dog"),
    ):
        assert soft_accuracy(answer, annotators, "released") == 0.0
        assert soft_accuracy(answer, annotators, "both") == soft_accuracy(answer, annotators, "m4c") == 1.0
    assert normalise("." * 40, "both") == "." * 8  # re.UNICODE as a count


@pytest.mark.parametrize(
    ("annotators", "rule", "said"), [(["x"] * 3, "both", "3 annotators"), (["x"] * 10, "vqa", "unknown rule 'vqa'")]
)
def test_soft_accuracy_refuses_what_has_no_score(annotators: list[str], rule: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        soft_accuracy("x", annotators, rule)


def test_captions_are_split_into_the_words_of_the_reference() -> None:
    items, _, _ = fixture("cider_d")
    for item in items:
        for text, expected in zip([item["output"], *item["references"]], item["words"], strict=True):
            assert words(text) == expected, text


def test_hard_sentences_are_split_as_by_the_reference_but_for_those_that_are_known_to_differ() -> None:
    rows = json.loads((FIXTURES / "ptb.json").read_text(encoding="utf-8"))
    assert len(rows) > 200 and sum(not row["same"] for row in rows) == 4
    for row in rows:
        assert (words(row["text"]) == row["words"]) == row["same"], row["text"]


def test_cider_d_is_the_references_to_the_last_digit() -> None:
    items, outputs, summary = fixture("cider_d")
    found = score("cider_d", items, outputs, "cider_d.json")
    np.testing.assert_allclose(found.values, [item["value"] for item in items], rtol=0, atol=2e-15)
    assert found.summary["cider_d"] == pytest.approx(summary["cider_d"], abs=2e-15)
    assert min(found.values) == 0.0 and max(found.values) > 5


def brute_force(captions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr-D by the paper's formulas, on dense vectors over all n-grams."""
    scores = [0.0] * len(captions)
    texts = {text: words(text) for text in [*captions, *(text for image in references for text in image)]}
    for n in range(1, 5):
        grams = {text: [tuple(said[at : at + n]) for at in range(len(said) - n + 1)] for text, said in texts.items()}
        known = sorted({gram for found in grams.values() for gram in found})
        images = [{gram for text in image for gram in grams[text]} for image in references]
        idf = np.array([math.log(len(images) / max(1, sum(gram in image for image in images))) for gram in known])
        vectors = {text: np.array([found.count(gram) for gram in known]) * idf for text, found in grams.items()}
        for number, (caption, image) in enumerate(zip(captions, references, strict=True)):
            for text in image:
                c, r = vectors[caption], vectors[text]
                lengths = np.linalg.norm(c) * np.linalg.norm(r)
                longer = max(0, len(texts[caption]) - 1) - max(0, len(texts[text]) - 1)
                if lengths:
                    penalty = math.exp(-(longer**2) / 72)
                    scores[number] += 10 / 4 / len(image) * penalty * float(np.minimum(c, r) @ r) / lengths
    return scores


def test_cider_d_is_its_definition() -> None:
    items, _, _ = fixture("cider_d")
    some = items[:12]
    captions, references = [item["output"] for item in some], [item["references"] for item in some]
    assert cider_d(captions, references) == pytest.approx(brute_force(captions, references), abs=1e-12)


def test_cider_d_at_its_edges() -> None:
    captions = ["a red dog runs on grass", "", "x", "a red dog runs on grass"]
    references = [["a red dog runs on grass"], ["a cat"], ["x", "x"], ["no words in common here at all", "?!"]]
    found = cider_d(captions, references)
    assert found[0] == pytest.approx(10, abs=1e-12)  # alone with its words, and equal
    assert found[1] == 0.0 and found[3] == 0.0
    assert found[2] == pytest.approx(2.5, abs=1e-12)  # one word: no bigrams and longer
    assert cider_d(["a dog"], [["a dog"]]) == [0.0]  # a single image: every n-gram is in all of them
    assert cider_d(captions[:1] * 2, [["a red dog runs on grass"]] * 2) == [0.0, 0.0]
    assert cider_d([], []) == []
    with pytest.raises(ValueError, match="image 1: no reference"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        cider_d(["a"], [["a"], ["b"]])


@pytest.mark.parametrize("metric", ["science_qa", "mmbench", "pope_released"])
def test_letters_and_yes_and_no_are_read_as_the_published_scripts_do(metric: str) -> None:
    items, outputs, summary = fixture(metric.removesuffix("_released"))
    found = score(metric, items, outputs, "file.json")
    for item, value in zip(items, found.values, strict=True):
        assert value == item["value"], item
    assert {name: found.summary[name] for name in summary} == pytest.approx(summary, abs=1e-12)
    assert 0 < found.n_unread < len(items)


def test_pope_counts_apart_what_says_neither_yes_nor_no() -> None:
    items, outputs, _ = fixture("pope")
    released, strict = (score(f"pope_{rule}", items, outputs, "pope.json") for rule in ("released", "strict"))
    assert released.unread == strict.unread == tuple(pope(item["output"]) is None for item in items)
    for item, unread, then, now in zip(items, strict.unread, released.values, strict.values, strict=True):
        assert now == (0.0 if unread else then)
        assert not unread or then == (item["answer"] == "yes")
    said = [(pope(item["output"]), item["answer"]) for item in items if item["category"] == "popular"]
    tp, fp, fn = (said.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    fn += said.count((None, "yes"))
    assert strict.summary["f1_popular"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    means = [strict.summary[f"f1_{name}"] for name in ("random", "popular", "adversarial")]
    assert strict.summary["f1"] == pytest.approx(sum(means) / 3)  # type: ignore[arg-type]
    nobody = [{"id": "a", "answer": "no", "category": "random"}]
    assert score("pope_strict", nobody, {"a": "No"}, "x").summary == {"accuracy": 1.0, "f1": None, "f1_random": None}


def test_science_qa_has_the_questions_with_an_image_apart() -> None:
    items, outputs, _ = fixture("science_qa")
    found = score("science_qa", items, outputs, "x").summary
    assert found["accuracy_image"] == pytest.approx(np.mean([item["value"] for item in items if item["image"]]))
    assert found["accuracy_image"] != found["accuracy"]


def test_nlvr2_by_logits_and_whole_statements() -> None:
    rng = np.random.default_rng(0)
    items = [{"id": f"n{i}", "answer": ("true", "false")[i % 2], "statement": f"s{i // 4}"} for i in range(200)]
    logits = {item["id"]: dict(zip(("true", "false"), rng.normal(size=2).tolist(), strict=True)) for item in items}
    logits["n0"] = {"true": 1.5, "false": 1.5}
    found = score("nlvr2", items, logits, "x")
    right = [(logits[f"n{i}"]["true"] > logits[f"n{i}"]["false"]) == (i % 2 == 0) for i in range(1, 200)]
    assert found.values == (0.0, *map(float, right)) and found.unread == (True, *[False] * 199)
    assert found.summary["accuracy"] == pytest.approx(np.mean(found.values))
    assert found.summary["consistency"] == pytest.approx(np.mean(np.min(np.reshape(found.values, (50, 4)), axis=1)))


def test_gqa_and_the_raw_text() -> None:
    texts = {"yes": (1, 1), "Yes": (0, 1), "yes.": (0, 1), "YES..": (0, 1), "yes ": (0, 0), "": (0, 0), "no": (0, 0)}
    items = [{"id": text or "-", "answer": "yes"} for text in texts]
    outputs = {text or "-": text for text in texts}
    for place, metric in enumerate(("exact", "gqa")):
        assert score(metric, items, outputs, "x").values == tuple(float(both[place]) for both in texts.values())


TEN = ["x"] * 10
OPTIONS = {"A": "a cat", "B": "a dog"}


@pytest.mark.parametrize(
    ("metric", "items", "outputs", "said"),
    [
        ("vqa", [{"id": "a"}], {"a": ""}, "unknown metric 'vqa'; one of vqa_released"),
        ("exact", [], {}, "f.json: no items"),
        ("exact", [{"answer": "x"}], {}, "f.json, item 0, field 'id': expected a text, got None"),
        ("exact", [{"id": "a", "answer": "x"}] * 2, {"a": "x"}, "f.json, item 1, field 'id': 'a' is item 0, too"),
        ("exact", [{"id": "a", "answer": "x"}], {}, "f.json, item a: has no output"),
        ("exact", [{"id": "a", "answer": "x"}], {"a": "x", "b": "x"}, "f.json: has no item 'b'"),
        ("exact", [{"id": "a", "answer": "x"}], {"a": None}, "f.json, item a: its output is None"),
        ("exact", [{"id": "a", "answer": ""}], {"a": "x"}, "f.json, item a, field 'answer': expected a text, got ''"),
        ("vqa_m4c", [{"id": "a", "answers": TEN[1:]}], {"a": "x"}, "item a, field 'answers': expected a list of 10"),
        ("cider_d", [{"id": "a", "references": []}], {"a": "x"}, "item a, field 'references': expected a list of one"),
        ("nlvr2", [{"id": "a", "answer": "yes", "statement": "s"}], {"a": {}}, "'yes' is none of true, false"),
        ("nlvr2", [{"id": "a", "answer": "true", "statement": "s"}], {"a": "true"}, "expected finite logits"),
        ("nlvr2", [{"id": "a", "answer": "true", "statement": "s"}], {"a": {"true": math.nan, "false": 0.0}}, "finite"),
        ("pope_strict", [{"id": "a", "answer": "Yes", "category": "c"}], {"a": ""}, "'Yes' is none of yes, no"),
        ("science_qa", [{"id": "a", "answer": "C", "letters": "AB", "image": True}], {"a": ""}, "'C' is none of A, B"),
        ("science_qa", [{"id": "a", "answer": "A", "letters": "BA", "image": True}], {"a": ""}, "field 'letters'"),
        ("mmbench", [{"id": "a", "answer": "A", "options": OPTIONS, "index": 7}], {"a": "A"}, "7 has 2 options"),
        ("mmbench", [{"id": "a", "answer": "C", "options": OPTIONS, "index": 7}], {"a": "A"}, "'C' is none of A, B"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_in_one_line(
    metric: str, items: list[dict[str, Any]], outputs: dict[str, Any], said: str
) -> None:
    with pytest.raises(ScoreError) as error:
        score(metric, items, outputs, "f.json")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_labels_are_compared_sign_for_sign() -> None:
    items = [{"id": str(n), "answer": f"a{n % 3}", "labels": ["a0", "a1", "a2", "a3"]} for n in range(6)]
    said = dict(zip("012345", ("a0", "A1", "a2.", " a0", "a1", "a4"), strict=True))
    found = score("labelled", items, said, "here")
    assert found.values == (1, 0, 0, 0, 1, 0) and found.unread == (False, True, True, True, False, True)
    assert found.summary == {"accuracy": 1 / 3}
    for change, told in (
        ({"answer": "a4"}, "f.json, item 0, field 'answer': 'a4' is none of a0, a1, a2, a3"),
        ({"labels": ["a0"]}, "f.json, item 0, field 'labels': expected a list of two texts or more"),
    ):
        with pytest.raises(ScoreError, match=told):
            score("labelled", [items[0] | change, *items[1:]], said, "f.json")


def test_captions_are_scored_as_values_evaluator_reads_them() -> None:
    items = [{"id": name, "references": [text]} for name, text in (("a", "na\u00efve dogs at night"), ("b", "a dog"))]
    said = {"a": "na ve dogs at night", "b": "a cat"}
    plain, ascii_alone = (score(metric, items, said, "here").values for metric in ("cider_d", "cider_d_ascii"))
    assert ascii_alone[0] == pytest.approx(10) and plain[0] < 8 and plain[1] == ascii_alone[1]


def test_every_metric_is_tested_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for metric in METRICS:
        assert metric in text or metric.startswith("vqa_"), metric


def test_scoring_needs_no_torch() -> None:
    code = "import sys, dora_lab.metrics; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
