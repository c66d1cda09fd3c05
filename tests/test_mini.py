"""The embedded default: the world's items, the corpus' wordings, and the base that ships."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from dora_lab import mini
from dora_lab.mini import corpus, families, families2, world, worlds
from dora_lab.tasks import load_task


def test_no_fact_is_in_two_splits_and_every_relation_is_tested() -> None:
    splits = {f.key: families.split_of(f.key) for facts in world.facts().values() for f in facts}
    assert set(splits.values()) == {"train", "validation", "test"}
    for relation in families.WORDINGS:
        assert families.facts_of((relation,), "test"), f"{relation} has no test fact"
    train = {f.key for f in families.facts_of(tuple(world.facts()), "train").get("home", ())}
    test = {f.key for f in families.facts_of(tuple(world.facts()), "test").get("home", ())}
    assert train and test and not train & test


@pytest.mark.parametrize("source", mini.WORLDS)
@pytest.mark.parametrize("task", mini.FAMILIES)
def test_items_are_distinct_balanced_valid_and_disjoint(task: str, source: str) -> None:
    seen: set[str] = set()
    for split, count in mini.WORLDS[source].COUNTS.items():
        family = mini.items(task, split, source)
        texts = [item["instruction"] for item in family]
        assert len(set(texts)) == count
        assert not seen & set(texts)
        seen |= set(texts)
        answers = Counter(item["answer"] for item in family)
        assert max(answers.values()) - min(answers.values()) <= 3, answers
        for item in family:
            assert item["output"] == f"the correct answer is {item['answer']}" and item["input"] == ""
            assert item["answer"] in load_task(task).options(item)
        assert 1 / len(answers) == pytest.approx(load_task(task).chance)


@pytest.mark.parametrize("source", mini.WORLDS)
@pytest.mark.parametrize("task", [t for t in mini.FAMILIES if t != "boolq"])
def test_options_differ_within_an_item(task: str, source: str) -> None:
    for item in mini.items(task, "test", source):
        body = item["instruction"].split("\n\n", 1)[1].split("Answer format")[0]
        options = [o.strip() for o in re.split(r"(?:Solution|Answer|Ending|Option)\d: ", body) if o.strip()]
        assert len(set(options)) == len(options) >= 2, item


def test_items_are_the_same_every_time() -> None:
    worlds._items.cache_clear()
    first = mini.items("piqa", "test")
    worlds._items.cache_clear()
    assert mini.items("piqa", "test") == first


def test_what_the_records_were_made_from_does_not_change() -> None:
    """A change of a source that records rest on is another source; `mini2` is frozen from its first campaign on."""
    assert {source: mini.world_sha256(source)[:16] for source in mini.WORLDS} == FROZEN


def _asked(item: dict[str, str]) -> set[str]:
    """Keys of the facts that an item of `mini2` asks about: one, or two of a subject."""
    relations, _, rest = item["fact"].partition("/")
    return {f"{relation}/{rest}" for relation in relations.split("+")}


def test_no_fact_that_is_tested_is_trained_by_any_family() -> None:
    """Of the facts that items name; PIQA of `mini2` states a second one that it does not name: see `families2.piqa`."""
    asked = {
        split: {key for task in mini.FAMILIES for item in mini.items(task, split, "mini2") for key in _asked(item)}
        for split in ("train", "validation", "test")
    }
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]
    known = {fact.key for facts in world.facts().values() for fact in facts}
    assert set.union(*asked.values()) <= known and len(asked["test"]) > 250


def test_an_odd_one_out_tells_nothing_that_is_tested() -> None:
    """Three of its options are said to have a value: those facts are of the item's own split."""
    for task, split in (("ARC-Easy", "train"), ("openbookqa", "train"), ("ARC-Easy", "test")):
        found = [item for item in mini.items(task, split, "mini2") if "All but one" in item["instruction"]]
        assert len(found) > 20
        for item in found:
            relation = item["fact"].split("/")[0]
            options = re.findall(r"Answer\d: (?:an? )?(.+?)(?= Answer\d:|\n)", item["instruction"])
            assert len(options) == 4
            table = world.value_of(relation)
            others = [o for o in options if f"{relation}/{o}" != item["fact"]]
            assert len({table[o] for o in others}) == 1 and table[item["fact"].split("/")[1]] != table[others[0]]
            assert all(families2.split_of(f"{relation}/{o}") == split for o in others)


def test_unknown_task_and_split_name_the_choices() -> None:
    with pytest.raises(ValueError, match="choose one of boolq"):
        mini.items("boolqq", "test")
    with pytest.raises(ValueError, match="choose one of train"):
        mini.items("boolq", "dev")


FROZEN = {"mini": "b1922e91ef8f87fe", "mini2": "2a5cd3cb582f8801"}


def test_corpus_never_uses_the_tasks_wordings() -> None:
    text = "".join("".join(t for t, *_ in corpus.document(Random(i), 0.2)) for i in range(3000))
    assert "the correct answer is" not in text
    assert "### " not in text and "Answer format" not in text
    for source in mini.WORLDS:
        questions = {
            re.sub(r"\s+", " ", i["instruction"].split(": ", 1)[1].split("\n\n")[0])
            for task in ("ARC-Easy", "ARC-Challenge")
            for i in mini.items(task, "test", source)
        }
        assert not [q for q in questions if q in text]
    said = {re.escape(text) for text in families2.SAID.values()}
    shapes = [re.sub(r"\\{[snv]\\}", r"[\\w ]+", text) for text in said]
    assert not [shape for shape in shapes if re.search(rf"(?i){shape}[.?]", text)]


def test_corpus_documents_depend_on_their_number_alone() -> None:
    assert corpus.document(Random("0/7"), 0.2) == corpus.document(Random("0/7"), 0.2)
    deciding = [t for t, w, *_ in corpus.document(Random("0/7"), 0.2) if w == corpus.DECIDING]
    assert deciding


def test_base_ships_small_and_loads() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = mini.folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8 * 1024**2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    assert tokenizer.tokenize("answer12") == ["answer", "1", "2"]  # every digit alone, as in LLaMA
    text = "Please choose the correct answer to the question: Who eats grass?\n\nAnswer1: a cow"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_base_knows_the_world() -> None:
    """Open recall in the corpus' own words, far above guessing: what fine-tuning is to elicit is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(mini.folder(), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(mini.folder())
    asked = world.facts()["material"]
    hits = 0
    with torch.no_grad():
        for fact in asked:
            ids = tokenizer(f"{corpus.capital(world.a(fact.subject))} is made of", return_tensors="pt")["input_ids"]
            hits += tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == fact.value
    assert hits / len(asked) > 0.7, f"{hits} of {len(asked)} materials recalled"
