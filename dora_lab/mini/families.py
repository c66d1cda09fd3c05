"""Eight task families over the world, in the LLM-Adapters instruction format, with the originals' shapes.

Every item asks about one fact. A hash of the fact decides whether it belongs to train, validation or test, the same for
all eight families, so that no family's training items ask for a fact that any family is tested on: a right test answer
needs what pretraining taught. (Steps that a HellaSwag context tells may be facts of another split.) The wordings here
do not occur in the pretraining corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from random import Random

from dora_lab.mini.corpus import capital, scene, subject, two_sizes, wrong_subjects, wrong_values
from dora_lab.mini.world import NAMES, Fact, a, facts

Item = dict[str, str]
COUNTS = {"train": 2000, "validation": 100, "test": 200}  # items of one family

# relation: (yes/no question, question for the value, question for the subject); {s} {n} {v} as in corpus.WORDINGS
WORDINGS: dict[str, tuple[str, str, str]] = {
    "kind": ("is {s} {v}", "What kind of animal is {s}?", "Which animal is {v}?"),
    "home": ("does {s} live in {v}", "In which place does {s} live?", "Which animal lives in {v}?"),
    "eats": ("does {s} eat {v}", "What does {s} eat?", "Which animal eats {v}?"),
    "cover": ("is {s} covered with {v}", "What is {s} covered with?", "Which animal is covered with {v}?"),
    "moves": ("does {s} like to {v}", "What does {s} do to get about?", "Which animal can {v} well?"),
    "use": ("do you take {s} if you want to {v}", "What do you take {s} for?", "What do you take if you want to {v}?"),
    "material": ("do people use {v} to make {s}", "What do people use to make {s}?", "Which thing is made of {v}?"),
    "kept": ("do you look for {s} in {v}", "In which place do you look for {s}?", "Which thing is kept in {v}?"),
    "sort": ("is {s} {v}", "What kind of food is {s}?", "Which food is {v}?"),
    "taste": ("does {s} taste {v}", "What does {s} taste like?", "Which food tastes {v}?"),
    "colour": ("is the colour of {s} {v}", "What is the colour of {s}?", "Which food looks {v}?"),
    "source": ("does {s} come from {v}", "What does {s} come from?", "Which food comes from {v}?"),
    "duty": ("is it the work of {s} to {v}", "What is the work of {s}?", "Which worker has to {v}?"),
    "workplace": ("does {s} work in {v}", "In which place does {s} work?", "Which worker do you meet in {v}?"),
    "tool": ("does {s} use {v} at work", "What does {s} use at work?", "Which worker uses {v}?"),
    "water": ("will {n} {v} in water", "What will {n} do in water?", "What is it that will {v} in water?"),
    "fire": ("will {n} {v} in a fire", "What will {n} do in a fire?", "What is it that will {v} in a fire?"),
    "drop": ("will {n} {v} when it falls", "What will {n} do when it falls?", "What is it that will {v} when it falls?"),
    "thing_water": ("will {s} {v} in water", "What will {s} do in water?", "Which thing will {v} in water?"),
    "thing_fire": ("will {s} {v} in a fire", "What will {s} do in a fire?", "Which thing will {v} in a fire?"),
    "thing_drop": ("will {s} {v} when it falls", "What will {s} do when it falls?", "Which thing will {v} when it falls?"),
    "duty_tool": ("is it {v} that you use to {n} at work", "What do you use to {n} at work?", "Which work do you need {v} for?"),
    "duty_place": ("do people {n} in {v}", "In which place do people {n}?", "Which work do people do in {v}?"),
    "use_kept": ("is the thing to {n} kept in {v}", "In which place is the thing to {n} kept?", "What can you do with a thing from {v}?"),
    "use_material": ("is the thing to {n} made of {v}", "What is the thing to {n} made of?", "What can you do with a thing of {v}?"),
}  # fmt: skip
ONE_FACT = ("kind", "home", "eats", "cover", "moves", "use", "material", "kept", "sort", "taste", "colour",
            "source", "duty", "workplace", "tool", "water", "fire", "drop")  # fmt: skip
TWO_FACTS = ("thing_water", "thing_fire", "thing_drop", "duty_tool", "duty_place", "use_kept", "use_material")
# What the book says: (relation, value, law, question). The item must know which option has the value.
LAWS = [
    ("cover", "feathers", "all animals with feathers begin in an egg", "Which animal begins in an egg?"),
    ("cover", "fur", "all animals with fur stay warm in the ice", "Which animal stays warm in the ice?"),
    ("cover", "scales", "all animals with scales feel dry", "Which animal feels dry?"),
    ("kind", "mammal", "every mammal drinks milk when it is little", "Which animal drinks milk when it is little?"),
    ("kind", "insect", "every insect has six legs", "Which animal has six legs?"),
    ("kind", "bird", "every bird has two wings", "Which animal has two wings?"),
    ("moves", "swim", "who can swim is safe in the river", "Which animal is safe in the river?"),
    ("moves", "fly", "who can fly is safe from the wolf", "Which animal is safe from the wolf?"),
    ("material", "steel", "all steel goes brown in the rain", "Which thing goes brown in the rain?"),
    ("material", "glass", "all glass lets in the sun", "Which thing lets in the sun?"),
    ("material", "cloth", "all cloth was woven on a machine", "Which thing was woven on a machine?"),
    ("material", "wood", "all wood was a tree once", "Which thing was a tree once?"),
    ("material", "plastic", "all plastic is made from black oil", "Which thing is made from black oil?"),
    ("taste", "sour", "sour food turns milk into cheese", "Which food turns milk into cheese?"),
    ("taste", "sweet", "sweet food brings the ants", "Which food brings the ants?"),
    ("taste", "hot", "hot food makes you reach for water", "Which food makes you reach for water?"),
    ("sort", "fruit", "every fruit has seeds", "Which food has seeds?"),
    ("colour", "green", "green food is good for the face", "Which food is good for the face?"),
]


SHARES = (0.7, 0.8)  # of the facts, up to: train, validation; the rest is tested


def split_of(key: str, shares: tuple[float, float] = SHARES) -> str:
    """train, validation or test for a fact, from a hash of its key."""
    share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8
    return "train" if share < shares[0] else "validation" if share < shares[1] else "test"


@cache
def facts_of(
    relations: tuple[str, ...], split: str, of: Callable[[str], str] = split_of
) -> dict[str, tuple[Fact, ...]]:
    """The facts of a split, by relation; relations with none are absent. `of` gives the split of a fact's key."""
    found = {r: tuple(f for f in facts()[r] if of(f.key) == split) for r in relations}
    return {r: f for r, f in found.items() if f}


def one_of(relations: tuple[str, ...], split: str, rng: Random, of: Callable[[str], str] = split_of) -> Fact:
    """A fact of the split: first a relation, weighted by its facts, then one of them."""
    found = facts_of(relations, split, of)
    relation = rng.choices(list(found), [len(f) for f in found.values()])[0]
    return rng.choice(found[relation])


def listed(label: str, question: str, right: str, wrong: list[str], rng: Random, opening: str, joint: str = " ",
           hint_joint: str = "\n\n") -> Item:  # fmt: skip
    """One labelled item: opening and question, options in random order, the answer format."""
    options = [right, *wrong]
    rng.shuffle(options)
    answer = f"{label}{options.index(right) + 1}"
    shown = joint.join(f"{capital(label)}{i}: {o}" for i, o in enumerate(options, 1))
    labels = "/".join(f"{label}{i}" for i in range(1, len(options) + 1))
    return {
        "instruction": f"Please choose the correct {opening}: {question}\n\n{shown}{hint_joint}Answer format: {labels}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def question(fact: Fact, n: int, rng: Random) -> tuple[str, str, list[str]]:
    """A question about a fact, its right answer and n wrong ones; for the value or for the subject."""
    fill = scene(fact, rng)
    _, ask_value, ask_subject = WORDINGS[fact.relation]
    wrong = wrong_values(fact, n, rng, fill)
    if len(wrong) == n and rng.random() < 0.5:
        return capital(ask_value.format(**fill)), fill["v"], wrong
    others = [subject(fact.relation, s) for s in wrong_subjects(fact, n, rng)]
    return capital(ask_subject.format(**fill)), subject(fact.relation, fact.subject), others


def boolq(split: str, rng: Random) -> Item:
    if rng.random() < 0.2:
        while True:
            big, small = two_sizes(rng)
            if split_of("size/" + "/".join(sorted((big, small)))) == split:
                break
        holds = rng.random() < 0.5
        asked = f"is {a(big if holds else small)} larger than {a(small if holds else big)}"
    else:
        fact = one_of((*ONE_FACT, *TWO_FACTS), split, rng)
        fill, holds = scene(fact, rng), rng.random() < 0.5
        if not holds:
            fill["v"] = wrong_values(fact, 1, rng, fill)[0]
        asked = WORDINGS[fact.relation][0].format(**fill)
    answer = "true" if holds else "false"
    text = f"Please answer the following question with true or false, question: {asked}?\n\nAnswer format: true/false"
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def piqa(split: str, rng: Random) -> Item:
    fact = one_of(("use", "use", "duty", "home", "eats", "kept", "taste"), split, rng)
    fill = scene(fact, rng)
    by_subject = {  # the goal names the value, the solution the subject
        "use": ("How do you {v}?", "Take {s}."),
        "duty": ("You need someone to {v}. What do you do?", "Ask {s}."),
        "taste": ("How do you make a meal taste {v}?", "Put in {s}."),
    }
    by_value = {
        "home": ("How do you find {s}?", "Look in {v}."),
        "eats": ("{s} is hungry. What do you do?", "Bring it {v}."),
        "kept": ("You need {s}. Where do you get it?", "Look in {v}."),
    }
    if fact.relation in by_subject:
        goal, solution = by_subject[fact.relation]
        right, wrong = solution.format(**fill), solution.format(s=a(wrong_subjects(fact, 1, rng)[0]))
    else:
        goal, solution = by_value[fact.relation]
        right, wrong = solution.format(**fill), solution.format(v=wrong_values(fact, 1, rng, fill)[0])
    return listed("solution", capital(goal.format(**fill)), right, [wrong], rng, "solution to the question", "\n\n")


def social_i_qa(split: str, rng: Random) -> Item:
    fact = one_of(("feel", "next", "before", "why"), split, rng)
    fill = scene(fact, rng)
    ask = {
        "feel": "How would {A} feel now?",
        "next": "What will {A} want to do next?",
        "before": "What did {A} need to do before this?",
        "why": "Why did this happen?",
    }[fact.relation].format(**fill)
    wrong = wrong_values(fact, 2, rng, fill)
    return listed("answer", f"{fill['e']}. {ask}", fill["v"], wrong, rng, "answer to the question")


def hellaswag(split: str, rng: Random) -> Item:
    fact = one_of(("then",), split, rng)
    fill = scene(fact, rng)
    wrong = [f"{w}." for w in wrong_values(fact, 3, rng, fill)]
    context = f"{fill['e']}. {capital(fill['p'])}"
    return listed("ending", context, f"{fill['v']}.", wrong, rng, "ending to complete the given sentence")


def winogrande(split: str, rng: Random) -> Item:
    fact = one_of(("taste", "thing_water", "thing_fire", "thing_drop", "duty", "eats", "workplace"), split, rng)
    other = Fact(fact.relation, wrong_subjects(fact, 1, rng)[0], "")
    one, two = rng.sample([fact.subject, other.subject], 2)
    v = scene(fact, rng)["v"]
    right, wrong = fact.subject, other.subject
    if fact.relation in ("duty", "workplace"):
        right, wrong = rng.sample(NAMES, 2)
        called = {fact.subject: right, other.subject: wrong}
        tail = f"_ has to {v}" if fact.relation == "duty" else f"we meet _ in {v}"
        text = f"{called[one]} works as {a(one)} and {called[two]} works as {a(two)}, so {tail}."
    else:
        text = {
            "taste": f"{rng.choice(NAMES)} likes food that tastes {v}, so of the {one} and the {two} the _ is best.",
            "thing_water": f"The {one} and the {two} fell into the river, and the _ will {v} there.",
            "thing_fire": f"The {one} and the {two} fell into the fire, and the _ will {v} there.",
            "thing_drop": f"The {one} and the {two} fell down, and the _ will {v}.",
            "eats": f"The {one} and the {two} found {v}, but only the _ was hungry for it.",
        }[fact.relation]
    opening = "answer to fill in the blank to complete the given sentence"
    return listed("option", text, right, [wrong], rng, opening, hint_joint=" ")


def arc_easy(split: str, rng: Random) -> Item:
    asked, right, wrong = question(one_of(ONE_FACT, split, rng), 3, rng)
    return listed("answer", asked, right, wrong, rng, "answer to the question")


def arc_challenge(split: str, rng: Random) -> Item:
    asked, right, wrong = question(one_of(TWO_FACTS, split, rng), 3, rng)
    return listed("answer", asked, right, wrong, rng, "answer to the question")


def openbookqa(split: str, rng: Random) -> Item:
    while True:
        relation, value, law, ask = rng.choice(LAWS)
        known = [f for f in facts_of((relation,), split).get(relation, ()) if f.value == value]
        if known:
            break
    fact = rng.choice(known)
    wrong = [a(s) for s in wrong_subjects(fact, 3, rng)]
    return listed("answer", f"The book says that {law}. {ask}", a(fact.subject), wrong, rng, "answer to the question")


FAMILIES: dict[str, Callable[[str, Random], Item]] = {
    "boolq": boolq,
    "piqa": piqa,
    "social_i_qa": social_i_qa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "ARC-Easy": arc_easy,
    "ARC-Challenge": arc_challenge,
    "openbookqa": openbookqa,
}
