"""The embedded default: the world's items, the corpus' wordings, and the base that ships."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import product
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
    """Of the facts that items name; what their texts tell besides is read off the texts below."""
    asked = {
        split: {key for task in mini.FAMILIES for item in mini.items(task, split, "mini2") for key in _asked(item)}
        for split in ("train", "validation", "test")
    }
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]
    known = {fact.key for facts in world.facts().values() for fact in facts}
    assert set.union(*asked.values()) <= known and len(asked["test"]) > 250


@cache
def _answered() -> dict[tuple[str, str], set[str]]:
    """Question and right answer, of every wording of every fact and pair: keys of the facts that they say together."""
    said: dict[tuple[str, str], set[str]] = {}
    for relation, forms in families2.WORDINGS.items():
        for fact in world.facts()[relation]:
            fill, noun = corpus.scene(fact, Random(0)), corpus.subject(relation, fact.subject)
            for judged in (*(form[0] for form in forms), f"is it true that {families2.SAID[relation]}"):
                said.setdefault((judged.format(**fill), "true"), set()).add(fact.key)
            for form in forms:
                said.setdefault((corpus.capital(form[1].format(**fill)), fill["v"]), set()).add(fact.key)
                said.setdefault((corpus.capital(form[2].format(**fill)), noun), set()).add(fact.key)
    for first, second, ask in families2.BOTH:
        for one, two in zip(world.facts()[first], world.facts()[second], strict=True):
            asked = ask.format(v=corpus.show(first, one.value), w=corpus.show(second, two.value))
            said.setdefault((asked, world.a(one.subject)), set()).update((one.key, two.key))
    for relation, value, _, ask in families2.LAWS:
        for fact in world.facts()[relation]:
            if fact.value == value:
                said.setdefault((ask, world.a(fact.subject)), set()).add(fact.key)
    return said


def _key(relation: str, noun: str, value: str) -> str:
    """The key of a fact that was read in a text, after a look whether the world has it."""
    subject = re.sub("^an? ", "", noun)
    assert world.value_of(relation)[subject] == value, f"{relation}: {subject} is not {value}"
    return f"{relation}/{subject}"


GAPS = {  # how Winogrande's sentence ends once its gap is filled: {r} the right option, the group its value
    "duty": (r"so {r} has to (.+)\.", r"so the one hired to (.+) is {r}\."),
    "workplace": (r"so we meet {r} in the (.+)\.", r"so {r} goes to the (.+)\."),
    "taste": (r"likes food that tastes (.+), so .+ the {r} is best\.", r"found only the {r} (.+)\."),
    "thing_water": (r"fell into the river, and the {r} will (.+) there\.", r"After the flood .+ made the {r} (.+)\."),
    "thing_fire": (r"fell into the fire, and the {r} will (.+) there\.", r"in flames, it made the {r} (.+)\."),
    "thing_drop": (r"fell down, and the {r} will (.+)\.", r"let go of .+, which made the {r} (.+)\."),
    "eats": (r"found (.+), but only the {r} was hungry for it\.", r"There was (.+) for .+ and the {r} ate it all\."),
}


def _told(task: str, item: dict[str, str]) -> set[str]:
    """Keys of the facts that an item's text tells with its right answer: read off the text, not off `fact`."""
    question, _, body = item["instruction"].split(": ", 1)[1].partition("\n\n")
    if task == "boolq":
        asked = item["instruction"].split("question: ")[1].split("?\n")[0]
        return _answered()[asked, "true"] if item["answer"] == "true" else set()
    if task == "winogrande":
        question, _, body = item["instruction"].split(": ", 1)[1].partition("\n\nOption1")
        body = "Option1" + body
    body = re.split(r"\s+Answer format", body)[0]
    options = dict(re.findall(r"(\w+\d): (.+?)(?=\s+[A-Z]\w+\d: |$)", body))
    right = options[corpus.capital(item["answer"])]
    if task == "piqa":
        if taken := re.fullmatch(r"Take (.+), it is in the (.+)\.", right):
            (goal,), (noun, place), joined = re.findall(r"How do you (.+)\?", question), taken.groups(), "use_kept"
            return {_key("use", noun, goal), _key("kept", noun, place), _key(joined, goal, place)}
        noun, place = re.findall(r"Ask (.+), go to the (.+)\.", right)[0]
        (goal,) = re.findall(r"You need someone to (.+)\. What do you do\?", question)
        return {_key("duty", noun, goal), _key("workplace", noun, place), _key("duty_place", goal, place)}
    if task == "social_i_qa":
        for event in world.value_of("feel"):
            told = re.escape(event).replace(r"\{A\}", r"(?P<A>\w+)", 1).replace(r"\{A\}", r"(?P=A)")
            told = told.replace(r"\{B\}", r"(?P<B>\w+)", 1).replace(r"\{B\}", r"(?P=B)")
            if found := re.match(rf"{told}\. ", question):
                said = {r: world.value_of(r)[event] for r in corpus.SOCIAL}
                return {f"{r}/{event}" for r, v in said.items() if re.fullmatch(_named(v, found.groupdict()), right)}
        return set()
    if task == "hellaswag":
        activity, _, context = question.partition(": ")
        steps = corpus.script(activity)
        told = [re.sub(r"^\w+ ", "", sentence) for sentence in context.split(". ")[:-1]] + [right.rstrip(".")]
        assert [steps.index(step) for step in told] == list(range(steps.index(told[0]), steps.index(right[:-1]) + 1))
        return {f"then/{activity}|{steps.index(step)}" for step in told if step != steps[0]}
    if task == "winogrande":
        jobs = {f"{name}": noun for name, noun in re.findall(r"(\w+) works as (an? \w+)", question)}
        filled = question.replace("_", right)
        shapes = [(r, re.search(form.format(r=right), filled)) for r, forms in GAPS.items() for form in forms]
        return {_key(r, jobs.get(right, right), found[1]) for r, found in shapes if found}
    if task == "openbookqa":
        question = question.split(". ", 1)[1]
    if odd := re.fullmatch(r"All but one answer the question: (.+) Which one does not\?", question):
        return set[str]().union(*(_answered()[odd[1], option] for option in options.values() if option != right))
    return _answered()[question, right]


def _named(value: str, names: dict[str, str]) -> str:
    """A pattern for a value with the names of a scene; a name that the event does not say may be any."""
    return re.escape(value).replace(r"\{A\}", names["A"]).replace(r"\{B\}", names.get("B", r"\w+"))


@pytest.mark.parametrize("task", mini.FAMILIES)
def test_an_item_names_the_facts_that_it_tells(task: str) -> None:
    """But for what follows from them (the place for a use), and for the steps on the way to the one asked for."""
    follow = {"piqa": {"use_kept", "duty_place"}, "hellaswag": {"then"}}.get(task, set())
    for item in mini.items(task, "test", "mini2"):
        told, named = _told(task, item), _asked(item)
        if item["answer"] != "false" and "All but one" not in item["instruction"]:  # else it is asked for, but not told
            assert told and named <= told, item
            assert {key.split("/")[0] for key in told - named} <= follow, item


def test_no_text_tells_a_fact_that_is_tested_or_validated_elsewhere() -> None:
    """Whatever `fact` names: PIQA tells places, HellaSwag's contexts earlier steps, an odd one out the other three."""
    told: dict[str, dict[str, set[str]]] = {split: {} for split in ("train", "validation", "test")}  # split: key: tasks
    asked: dict[str, set[str]] = {split: set() for split in told}
    for split, task in product(told, mini.FAMILIES):
        for item in mini.items(task, split, "mini2"):
            asked[split] |= _asked(item)
            for key in _told(task, item):
                told[split].setdefault(key, set()).add(task)
    leaks = {
        f"told in {early} by {'+'.join(sorted(told[early][key]))}, of {late}: {key}"
        for early, late in (("train", "validation"), ("train", "test"), ("validation", "test"))
        for key in told[early].keys() & (told[late].keys() | asked[late])
    }
    assert not leaks, f"{len(leaks)} facts: {sorted(leaks)[:10]}"


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


FROZEN = {"mini": "b1922e91ef8f87fe", "mini2": "188bfb8cb48df5e1"}


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
