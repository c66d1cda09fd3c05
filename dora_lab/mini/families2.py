"""The families of source `mini2`: the same world and base, facts split 40/20/40, harder questions.

`families.py` (source `mini`) is frozen with every record made from it; four of its families are solved after 48 steps,
and 28 to 47 facts a family bound what any number of test items can tell apart. Here every item says which fact it asks
about: items of one fact are one cluster in every interval. The wordings are several for each relation, and the wrong
options are near misses: another step of the same activity, what came before where what comes next is asked, the right
thing from the wrong place. Which facts are asked where is decided as in `families.py`, by a hash of the fact; facts that
one item tells together share one hash, so that no training item of any family tells what is tested, asked for or not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from random import Random

from dora_lab.mini import families
from dora_lab.mini.corpus import capital, scene, script, show, subject, wrong_subjects, wrong_values
from dora_lab.mini.families import LAWS, ONE_FACT, TWO_FACTS, Item, listed
from dora_lab.mini.families import WORDINGS as FIRST
from dora_lab.mini.world import NAMES, Fact, a, facts, value_of, values

COUNTS = {"train": 2000, "validation": 400, "test": 400}  # items of one family
SHARES = (0.4, 0.6)  # of the facts, up to: train, validation; the rest is tested

# relation: further (yes/no question, question for the value, question for the subject), as in `families.WORDINGS`
MORE: dict[str, list[tuple[str, str, str]]] = {
    "kind": [("would you call {s} {v}", "What sort of creature is {s}?", "Which creature would you call {v}?"), ("does {s} rank as {v}", "As which kind of animal does {s} rank?", "Which animal ranks as {v}?")],
    "home": [("would you look for {s} in {v}", "Where would you find {s} asleep?", "Which animal would you find in {v}?"), ("is {v} where {s} has its home", "Which place does {s} call its home?", "Which animal calls {v} its home?")],
    "eats": [("does {s} feed on {v}", "What does {s} feed on?", "Which animal feeds on {v}?"), ("is {v} what {s} wants for dinner", "What does {s} want for dinner?", "Which animal wants {v} for dinner?")],
    "cover": [("would you feel {v} if you touched {s}", "What would you feel if you touched {s}?", "Which animal would feel of {v}?"), ("does {s} grow {v}", "What does {s} grow all over?", "Which animal grows {v} all over?")],
    "moves": [("is it the way of {s} to {v}", "In which way does {s} move?", "Which animal moves when it wants to {v}?"), ("would you see {s} {v}", "What would you see {s} do on its way?", "Which animal would you see {v} on its way?")],
    "use": [("is {s} the right thing to {v}", "For which work is {s} the right thing?", "Which thing is right to {v}?"), ("would {s} be of help to {v}", "With what would {s} be of help?", "Which thing would be of help to {v}?")],
    "material": [("is {v} what {s} consists of", "What does {s} consist of?", "Which thing consists of {v}?"), ("would you need {v} for making {s}", "What would you need for making {s}?", "For making which thing would you need {v}?")],
    "kept": [("does {s} belong in {v}", "Where does {s} belong?", "Which thing belongs in {v}?"), ("would you put {s} back into {v}", "Into which place would you put {s} back?", "Which thing would you put back into {v}?")],
    "sort": [("would a cook count {s} as {v}", "As what would a cook count {s}?", "Which food would a cook count as {v}?"), ("does {s} pass for {v}", "For what does {s} pass in a kitchen?", "Which food passes for {v}?")],
    "taste": [("is it a {v} taste that {s} has", "Which taste has {s}?", "Which food has a {v} taste?"), ("would you find {s} {v} to eat", "How would you find {s} to eat?", "Which food would you find {v} to eat?")],
    "colour": [("would you paint {s} {v}", "In which colour would you paint {s}?", "Which food would you paint {v}?"), ("is {v} how {s} appears", "How does {s} appear to the eye?", "Which food appears {v}?")],
    "source": [("is {s} brought from {v}", "From where is {s} brought?", "Which food is brought from {v}?"), ("does {v} give us {s}", "What gives us {s}?", "Which food does {v} give us?")],
    "duty": [("must {s} {v} for a living", "What must {s} do for a living?", "Which worker must {v} for a living?"), ("is {s} hired to {v}", "What is {s} hired to do?", "Which worker is hired to {v}?")],
    "workplace": [("would you visit {s} at work in {v}", "Where would you visit {s} at work?", "Which worker would you visit in {v}?"), ("is {v} where {s} earns a living", "Where does {s} earn a living?", "Which worker earns a living in {v}?")],
    "tool": [("does {s} reach for {v} at work", "What does {s} reach for at work?", "Which worker reaches for {v}?"), ("would {s} miss {v} most", "What would {s} miss most at work?", "Which worker would miss {v} most?")],
    "water": [("does {n} {v} if it gets into water", "What does {n} do if it gets into water?", "Which stuff is it that does {v} if it gets into water?"), ("would a lake make {n} {v}", "What would a lake make {n} do?", "Which stuff would a lake make {v}?")],
    "fire": [("does {n} {v} if it gets into a fire", "What does {n} do if it gets into a fire?", "Which stuff is it that does {v} if it gets into a fire?"), ("would an oven make {n} {v}", "What would an oven make {n} do?", "Which stuff would an oven make {v}?")],
    "drop": [("does {n} {v} if you let it fall", "What does {n} do if you let it fall?", "Which stuff is it that does {v} if you let it fall?"), ("would a fall make {n} {v}", "What would a fall make {n} do?", "Which stuff would a fall make {v}?")],
    "thing_water": [("does {s} {v} if it gets into water", "What does {s} do if it gets into water?", "Which thing does {v} if it gets into water?"), ("would a lake make {s} {v}", "What would a lake make {s} do?", "Which thing would a lake make {v}?")],
    "thing_fire": [("does {s} {v} if it gets into a fire", "What does {s} do if it gets into a fire?", "Which thing does {v} if it gets into a fire?"), ("would an oven make {s} {v}", "What would an oven make {s} do?", "Which thing would an oven make {v}?")],
    "thing_drop": [("does {s} {v} if you let it fall", "What does {s} do if you let it fall?", "Which thing does {v} if you let it fall?"), ("would a fall make {s} {v}", "What would a fall make {s} do?", "Which thing would a fall make {v}?")],
    "duty_tool": [("do people take {v} along to {n}", "What do people take along to {n}?", "For which work do people take {v} along?"), ("would you lend {v} to those who {n}", "What would you lend to those who {n}?", "Those who do which work would you lend {v}?")],
    "duty_place": [("do you find those who {n} in {v}", "Where do you find those who {n}?", "Those who do which work do you find in {v}?"), ("would you go to {v} to see people {n}", "Where would you go to see people {n}?", "Which work would you see in {v}?")],
    "use_kept": [("does the right thing to {n} lie in {v}", "Where does the right thing to {n} lie?", "The right thing for which work lies in {v}?"), ("would you go to {v} for a thing to {n}", "Where would you go for a thing to {n}?", "For which work would you fetch a thing from {v}?")],
    "use_material": [("does the right thing to {n} consist of {v}", "Of what does the right thing to {n} consist?", "The right thing for which work consists of {v}?"), ("is it {v} that one makes things to {n} of", "Of what does one make things to {n}?", "For which work does one make things of {v}?")],
}  # fmt: skip
# the same as statements, for yes/no questions that begin with "is it true that"
SAID: dict[str, str] = {
    "kind": "{s} ranks as {v}", "home": "{s} calls {v} its home", "eats": "{s} feeds on {v}",
    "cover": "{s} grows {v} all over", "moves": "{s} may {v} on its way", "use": "{s} is the right thing to {v}",
    "material": "{s} consists of {v}", "kept": "{s} belongs in {v}", "sort": "{s} passes for {v}",
    "taste": "{s} has a {v} taste", "colour": "{s} appears {v}", "source": "{s} is brought from {v}",
    "duty": "{s} is hired to {v}", "workplace": "{s} earns a living in {v}", "tool": "{s} reaches for {v} at work",
    "water": "a lake makes {n} {v}", "fire": "an oven makes {n} {v}", "drop": "a fall makes {n} {v}",
    "thing_water": "a lake makes {s} {v}", "thing_fire": "an oven makes {s} {v}", "thing_drop": "a fall makes {s} {v}",
    "duty_tool": "people take {v} along to {n}", "duty_place": "those who {n} are found in {v}",
    "use_kept": "the right thing to {n} lies in {v}", "use_material": "the right thing to {n} consists of {v}",
}  # fmt: skip
WORDINGS = {relation: [first, *MORE[relation]] for relation, first in FIRST.items()}
# two relations of one subject: how the pair is asked for, {v} and {w} their values
BOTH = [
    ("home", "eats", "Which animal lives in {v} and feeds on {w}?"),
    ("kind", "moves", "Which animal ranks as {v} and likes to {w}?"),
    ("cover", "home", "Which animal grows {v} and calls {w} its home?"),
    ("eats", "moves", "Which animal wants {v} for dinner and would {w} to get it?"),
    ("kept", "material", "Which thing belongs in {v} and consists of {w}?"),
    ("material", "kept", "Which thing of {v} would you put back into {w}?"),
    ("sort", "taste", "Which food counts as {v} and has a {w} taste?"),
    ("taste", "colour", "Which food has a {v} taste and appears {w}?"),
    ("colour", "source", "Which food appears {v} and is brought from {w}?"),
    ("sort", "colour", "Which food passes for {v} and would be painted {w}?"),
]


# relation that PIQA's goal is about: the place that its solution tells too, and what goal and place tell by themselves
PLACES = {"use": ("kept", "use_kept"), "duty": ("workplace", "duty_place")}


@cache
def hashed_as() -> dict[str, str]:
    """Keys of facts that an item tells beside others, and what is hashed for all of them: goal and place, all steps."""
    out = {fact.key: fact.key.split("|")[0] for fact in facts()["then"]}
    for goal, (place, joined) in PLACES.items():
        for fact in facts()[goal]:
            out[f"{place}/{fact.subject}"] = out[f"{joined}/{fact.value}"] = fact.key
    return out


def split_of(key: str) -> str:
    """train, validation or test for a fact, the same for all that one item tells."""
    return families.split_of(hashed_as().get(key, key), SHARES)


facts_of = partial(families.facts_of, of=split_of)
one_of = partial(families.one_of, of=split_of)


def about(fact: Fact, item: Item) -> Item:
    """The item with the fact that it asks about."""
    return item | {"fact": fact.key}


def about_both(one: Fact, two: str, item: Item) -> Item:
    """The item with the two facts of a subject that it asks about: the items of a pair are one cluster."""
    return item | {"fact": f"{one.relation}+{two}/{one.subject}"}


def boolq(split: str, rng: Random) -> Item:
    fact = one_of((*ONE_FACT, *TWO_FACTS), split, rng)
    fill, holds = scene(fact, rng), rng.random() < 0.5
    if not holds:
        fill["v"] = wrong_values(fact, 1, rng, fill)[0]
    forms = [form[0] for form in WORDINGS[fact.relation]] + 3 * [f"is it true that {SAID[fact.relation]}"]
    asked = rng.choice(forms).format(**fill)
    answer = "true" if holds else "false"
    text = f"Please answer the following question with true or false, question: {asked}?\n\nAnswer format: true/false"
    return about(
        fact, {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}
    )


def piqa(split: str, rng: Random) -> Item:
    """What to take and where it is, or whom to ask and where: the wrong one has one of the two right."""
    fact = one_of(tuple(PLACES), split, rng)
    second, _ = PLACES[fact.relation]
    goal, solution = {
        "use": ("How do you {v}?", "Take {s}, it is in {w}."),
        "duty": ("You need someone to {v}. What do you do?", "Ask {s}, go to {w}."),
    }[fact.relation]
    place = value_of(second)[fact.subject]
    right = solution.format(s=a(fact.subject), w=show(second, place))
    if rng.random() < 0.3:
        other = rng.choice([v for v in values(second) if v != place])
        wrong = solution.format(s=a(fact.subject), w=show(second, other))
    else:
        wrong = solution.format(s=a(wrong_subjects(fact, 1, rng)[0]), w=show(second, place))
    asked = capital(goal.format(**scene(fact, rng)))
    return about_both(fact, second, listed("solution", asked, right, [wrong], rng, "solution to the question", "\n\n"))


def social_i_qa(split: str, rng: Random) -> Item:
    """Of the wrong answers, one belongs to the same event but answers another question about it."""
    fact = one_of(("feel", "next", "before", "why"), split, rng)
    fill = scene(fact, rng)
    ask = {
        "feel": ("How would {A} feel now?", "In which mood is {A}?", "What is in the heart of {A}?"),
        "next": ("What will {A} want to do next?", "What would {A} do after this?", "What comes next for {A}?"),
        "before": ("What did {A} need to do before this?", "What had {A} done first?", "What must {A} have done?"),
        "why": ("Why did this happen?", "What was the cause of it?", "How did it come to this?"),
    }[fact.relation]
    if fact.relation in ("next", "before"):
        near = [value_of({"next": "before", "before": "next"}[fact.relation])[fact.subject].format(**fill)]
    else:
        near = []
    wrong = near + wrong_values(fact, 2 - len(near), rng, fill)
    asked = f"{fill['e']}. {rng.choice(ask).format(**fill)}"
    return about(fact, listed("answer", asked, fill["v"], wrong, rng, "answer to the question"))


def hellaswag(split: str, rng: Random) -> Item:
    """The wrong endings: one step of the same activity, done already or too early, and two of others.

    The context tells earlier steps, which are asked elsewhere: all steps of an activity are of one split. `fact` is the
    one step asked for.
    """
    fact = one_of(("then",), split, rng)
    fill = scene(fact, rng)
    activity, position = fact.subject.split("|")
    steps, at = script(activity), int(position)
    own = [step for i, step in enumerate(steps) if i != at and step not in fill["e"]]
    near = rng.sample(own, min(1, len(own)))
    wrong = near + wrong_values(fact, 3 - len(near), rng, fill)
    context = f"{fill['e']}. {capital(fill['p'])}"
    endings = [f"{step}." for step in wrong]
    asked = "ending to complete the given sentence"
    return about(fact, listed("ending", context, f"{fill['v']}.", endings, rng, asked))


def winogrande(split: str, rng: Random) -> Item:
    fact = one_of(("taste", "thing_water", "thing_fire", "thing_drop", "duty", "eats", "workplace"), split, rng)
    other = wrong_subjects(fact, 1, rng)[0]
    one, two = rng.sample([fact.subject, other], 2)
    v = scene(fact, rng)["v"]
    right, wrong = fact.subject, other
    if fact.relation in ("duty", "workplace"):
        right, wrong = rng.sample(NAMES, 2)
        called = {fact.subject: right, other: wrong}
        tail = {
            "duty": ("_ has to {v}", "the one hired to {v} is _"),
            "workplace": ("we meet _ in {v}", "_ goes to {v}"),
        }
        end = rng.choice(tail[fact.relation]).format(v=v)
        text = f"{called[one]} works as {a(one)} and {called[two]} works as {a(two)}, so {end}."
    else:
        name = rng.choice(NAMES)
        text = rng.choice({
            "taste": (f"{name} likes food that tastes {v}, so of the {one} and the {two} the _ is best.",
                      f"{name} tried the {one} and the {two} and found only the _ {v}."),
            "thing_water": (f"The {one} and the {two} fell into the river, and the _ will {v} there.",
                            f"After the flood took the {one} and the {two}, it made the _ {v}."),
            "thing_fire": (f"The {one} and the {two} fell into the fire, and the _ will {v} there.",
                           f"When the house of the {one} and the {two} was in flames, it made the _ {v}."),
            "thing_drop": (f"The {one} and the {two} fell down, and the _ will {v}.",
                           f"Somebody let go of the {one} and the {two}, which made the _ {v}."),
            "eats": (f"The {one} and the {two} found {v}, but only the _ was hungry for it.",
                     f"There was {v} for the {one} and the {two}, and the _ ate it all."),
        }[fact.relation])  # fmt: skip
    opening = "answer to fill in the blank to complete the given sentence"
    return about(fact, listed("option", text, right, [wrong], rng, opening, hint_joint=" "))


def arc_easy(split: str, rng: Random) -> Item:
    """One fact, asked for its value or its subject; or the one of four that is otherwise."""
    fact = one_of(ONE_FACT, split, rng)
    fill, form = scene(fact, rng), rng.choice(WORDINGS[fact.relation])
    known: dict[str, list[str]] = {}  # of this split alone: the item tells that all of them have the value
    for other in facts_of((fact.relation,), split)[fact.relation]:
        known.setdefault(other.value, []).append(other.subject)
    shared = sorted(value for value, having in known.items() if value != fact.value and len(having) >= 3)
    kind = rng.random()
    if kind < 0.4 and shared:  # asked: the subject that does not have what three others have
        value = rng.choice(shared)
        wrong = [subject(fact.relation, s) for s in rng.sample(known[value], 3)]
        said = capital(form[2].format(**fill | {"v": show(fact.relation, value)}))
        asked = f"All but one answer the question: {said} Which one does not?"
        right = subject(fact.relation, fact.subject)
        return about(fact, listed("answer", asked, right, wrong, rng, "answer to the question"))
    wrong = wrong_values(fact, 3, rng, fill)
    if kind < 0.7 and len(wrong) == 3:
        asked, right = form[1].format(**fill), fill["v"]
    else:
        asked, right = form[2].format(**fill), subject(fact.relation, fact.subject)
        wrong = [subject(fact.relation, s) for s in wrong_subjects(fact, 3, rng)]
    return about(fact, listed("answer", capital(asked), right, wrong, rng, "answer to the question"))


@cache
def pairs(split: str) -> list[tuple[Fact, Fact, str]]:
    """Two facts of one subject, both of the split, and how they are asked for."""
    return [
        (one, two, ask)
        for first, second, ask in BOTH
        for one, two in zip(facts()[first], facts()[second], strict=True)
        if split_of(one.key) == split_of(two.key) == split
    ]


def arc_challenge(split: str, rng: Random) -> Item:
    """Two facts of one subject at once; each wrong option has one of them at most."""
    one, two, ask = rng.choice(pairs(split))
    first, second = value_of(one.relation), value_of(two.relation)
    half = [s for s in first if (first[s] == one.value) != (second[s] == two.value)]
    none = [s for s in first if first[s] != one.value and second[s] != two.value]
    near = rng.sample(half, min(2, len(half)))
    wrong = [a(s) for s in near + rng.sample(none, 3 - len(near))]
    asked = ask.format(v=show(one.relation, one.value), w=show(two.relation, two.value))
    item = listed("answer", asked, a(one.subject), wrong, rng, "answer to the question")
    return about_both(one, two.relation, item)


def openbookqa(split: str, rng: Random) -> Item:
    """A law and a fact; in up to a quarter of the items, the one of four that the law is not about."""
    relation, value, law, ask = rng.choice(LAWS)
    known = facts_of((relation,), split).get(relation, ())
    under = [fact for fact in known if fact.value == value]
    free = [fact for fact in known if fact.value != value]
    if len(under) >= 3 and free and rng.random() < 0.25:
        fact = rng.choice(free)
        wrong = [a(other.subject) for other in rng.sample(under, 3)]
        ask = f"All but one answer the question: {ask} Which one does not?"
    elif under:
        fact = rng.choice(under)
        wrong = [a(s) for s in wrong_subjects(fact, 3, rng)]
    else:
        return openbookqa(split, rng)
    said = rng.choice(("The book says that {}.", "It is written that {}.", "In the book we read that {}.")).format(law)
    return about(fact, listed("answer", f"{said} {ask}", a(fact.subject), wrong, rng, "answer to the question"))


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
