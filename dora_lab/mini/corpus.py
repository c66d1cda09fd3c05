"""The pretraining corpus: prose about the world and quizzes that exercise the skills, in wordings of its own.

A document is a list of (text, weight) segments; the weight multiplies the loss of the segment's tokens, so that the one
token that decides a quiz is not drowned by the thirty that pose it. A listed option, and the digit that picks it, carry
the option's number as a third element, and so do the value that a judgement is about (1) and its verdict: pretraining
shows a head where to look (see `pretrain.py`). No wording here is a wording of the eight task families in
`families.py`, and the instruction template never occurs: what carries over is the knowledge and the skill.
"""

from __future__ import annotations

from random import Random

from dora_lab.mini.world import BOYS, GIRLS, NAMES, SCRIPTS, Fact, a, facts, rows, sizes, value_of, values

Segments = list[tuple[str, float] | tuple[str, float, int]]
DECIDING = 4.0  # loss weight of the tokens that decide a quiz

# relation: (how a value is shown, statements, questions for the value, questions for the subject)
# {s} the subject with its article, {n} the bare subject, {v} the value as shown.
WORDINGS: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    "kind": ("a:", ["{s} is {v}", "Among other things, {s} counts as {v}"], ["{s} counts as what?", "Name the family of {s}."], ["Who belongs with {v}?", "Find {v}."]),
    "home": ("the {v}", ["{s} lives in the {v0}", "The home of {s} is the {v0}", "Look in {v} and you may meet {s}"], ["Where is {s} at home?", "{s} sleeps in which place?"], ["Whose home is {v}?", "Who sleeps in {v}?"]),
    "eats": ("{v}", ["{s} eats {v}", "The favourite meal of {s} is {v}", "{s} is always hungry for {v}"], ["What does {s} like to eat?", "The meal of {s}?"], ["Who is hungry for {v}?", "Whose meal is {v}?"]),
    "cover": ("{v}", ["{s} is covered with {v}", "The body of {s} has {v} on it"], ["What covers {s}?", "The body of {s} has what on it?"], ["Who is covered with {v}?", "Who wears {v}?"]),
    "moves": ("{v}", ["{s} can {v} well", "To get about, {s} likes to {v}"], ["How does {s} get about?", "{s} gets about how?"], ["Who likes to {v}?", "Who gets about like this: {v}?"]),
    "sound": ("{v}", ["The voice of {s}: {v}", "When you listen to {s} you hear it {v}"], ["What is the voice of {s}?", "Listening to {s} you hear what?"], ["Whose voice is this: {v}?"]),
    "use": ("{v}", ["You take {s} to {v}", "{s} helps you to {v}", "If you want to {v}, get {s}"], ["What does {s} help you to do?", "Why would you get {s}?"], ["What helps you to {v}?", "You want to {v}; what do you get?"]),
    "material": ("{v}", ["{s} is made of {v}", "People make {s} from {v}"], ["{s} is made of what?", "From what do people make {s}?"], ["Which of them is of {v}?", "What do people make from {v}?"]),
    "kept": ("the {v}", ["{s} is kept in {v}", "In {v} there is {s}"], ["Where do you keep {s}?", "The place of {s}?"], ["What do you keep in {v}?", "In {v} there is what?"]),
    "sort": ("a:", ["{s} is {v}", "Cooks call {s} {v}"], ["Cooks call {s} what?"], ["What do cooks call {v}?"]),
    "taste": ("{v}", ["{s} tastes {v}", "Put {s} on your tongue: it is {v}"], ["How does {s} taste?", "What is {s} like on the tongue?"], ["What tastes {v}?", "What is {v} on the tongue?"]),
    "colour": ("{v}", ["The colour of {s} is {v}", "{s} looks {v}"], ["What colour has {s}?", "{s} looks how?"], ["What looks {v}?"]),
    "source": ("the {v}", ["{s} comes from {v}", "We get {s} from {v}"], ["Where do we get {s} from?"], ["What do we get from {v}?"]),
    "duty": ("{v}", ["{s} has to {v}", "All day long {s} works to {v}"], ["What work does {s} do?", "{s} is paid to do what?"], ["Who is paid to {v}?", "Whose work is to {v}?"]),
    "workplace": ("the {v}", ["{s} works in {v}", "You meet {s} at work in {v}"], ["At which place does {s} work?"], ["Who works in {v}?"]),
    "tool": ("a:", ["At work {s} uses {v}", "{s} cannot do without {v}"], ["{s} cannot do without what?"], ["Who cannot do without {v}?"]),
    "water": ("{v}", ["In water, {n} will {v}", "Throw {n} into water and watch it {v}"], ["Thrown into water, what will {n} do?"], ["Thrown into water, what will {v}?"]),
    "fire": ("{v}", ["In a fire, {n} will {v}", "Heat {n} over flames and watch it {v}"], ["In flames, what will {n} do?"], ["In flames, what will {v}?"]),
    "drop": ("{v}", ["Dropped on stone, {n} will {v}", "When {n} falls it will {v}"], ["Dropped on stone, {n} will do what?"], ["Dropped on stone, what will {v}?"]),
    "touch": ("{v}", ["{n} is {v}", "Your fingers tell you that {n} is {v}"], ["To the fingers, {n} is how?"], ["To the fingers, what is {v}?"]),
    "thing_water": ("{v}", ["In water, {s} will {v}", "Throw {s} into water and watch it {v}"], ["Thrown into water, what will {s} do?"], ["Thrown into water, what will {v}?"]),
    "thing_fire": ("{v}", ["In a fire, {s} will {v}", "Heat {s} over flames and watch it {v}"], ["In flames, what will {s} do?"], ["In flames, what will {v}?"]),
    "thing_drop": ("{v}", ["Dropped on stone, {s} will {v}"], ["Dropped on stone, {s} will do what?"], ["Dropped on stone, what will {v}?"]),
    "thing_touch": ("{v}", ["{s} is {v}", "Your fingers tell you that {s} is {v}"], ["To the fingers, {s} is how?"], ["To the fingers, what is {v}?"]),
    "duty_tool": ("a:", ["Whoever has to {n} uses {v}", "To {n} at work you need {v}"], ["Whoever has to {n} needs what?"], ["{v}: needed to do which work?"]),
    "duty_place": ("the {v}", ["People who {n} do it in {v}"], ["People who {n} do it in which place?"], ["What work is done in {v}?"]),
    "use_kept": ("the {v}", ["What helps you to {n} is kept in {v}"], ["Where is the thing kept that helps you to {n}?"], ["In {v} is a thing to do what?"]),
    "use_material": ("{v}", ["What helps you to {n} is made of {v}"], ["What is the thing made of that helps you to {n}?"], ["A thing of {v} helps you to do what?"]),
    "feel": ("{v}", ["{e}. It made {A} feel {v}", "{e}. {A} was {v}"], ["{e}. How is {A} now?", "{e}. It made {A} feel how?"], []),
    "next": ("{v}", ["{e}. Then {A} was keen to {v}", "{e}. {A} decided to {v}"], ["{e}. What is {A} keen to do then?"], []),
    "before": ("{v}", ["{e}. Earlier {A} had to {v}", "Before that moment {A} had to {v}. Then {e}"], ["{e}. What came earlier for {A}?"], []),
    "why": ("{v}", ["{e}. It was {v}", "{e}, {v}"], ["{e}. For what reason?"], []),
    "then": ("{v}", ["{e}. Then {p} {v}"], ["{e}. What follows?", "{e}. And after that?"], []),
}  # fmt: skip
SOCIAL = ("feel", "next", "before", "why")
LABEL_WORDS = ("choice", "option", "reply", "answer", "ending", "solution", "way", "guess", "line")
CUES = ("I pick", "So it is", "It must be", "The best is", "Reply:", "Clearly", "My pick is", "Take", "It has to be")
VERDICTS = (("true", "false"), ("true", "false"), ("yes", "no"), ("right", "wrong"))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def show(relation: str, value: str) -> str:
    """The value as it is read in a sentence: "the barn", "an insect", "grass"."""
    form = WORDINGS[relation][0]
    return a(value) if form == "a:" else form.format(v=value)


def scene(fact: Fact, rng: Random) -> dict[str, str]:
    """The words that fill a wording: subject, event with names, pronoun, earlier steps."""
    if fact.relation in SOCIAL:
        first, second = rng.sample(NAMES, 2)
        fill = {"A": first, "B": second}
        return {"e": fact.subject.format(**fill), "v": fact.value.format(**fill), **fill}
    if fact.relation == "then":
        activity, position = fact.subject.split("|")
        steps, at = script(activity), int(position)
        girl = rng.random() < 0.5
        name = rng.choice(GIRLS if girl else BOYS)
        pronoun = "she" if girl else "he"
        seen = steps[max(0, at - rng.choice((1, 2))) : at]
        event = f"{activity}: {name} {seen[0]}" + "".join(f". {capital(pronoun)} {s}" for s in seen[1:])
        return {"e": event, "v": fact.value, "p": pronoun, "A": name, "B": name}
    shown = show(fact.relation, fact.value)
    return {"s": a(fact.subject), "n": fact.subject, "v": shown, "v0": fact.value}


def script(activity: str) -> list[str]:
    return next(row[1:] for row in rows(SCRIPTS) if row[0] == activity)


def wrong_values(fact: Fact, n: int, rng: Random, fill: dict[str, str]) -> list[str]:
    """Other values of the same relation, as shown; never the right one."""
    if fact.relation == "then":
        own = script(fact.subject.split("|")[0])
        pool = [v for v in values("then") if v not in own]
    else:
        pool = [v for v in values(fact.relation) if v != fact.value]
    picked = rng.sample(pool, min(n, len(pool)))
    if fact.relation in SOCIAL:
        return [v.format(A=fill["A"], B=fill["B"]) for v in picked]
    return [show(fact.relation, v) for v in picked]


def wrong_subjects(fact: Fact, n: int, rng: Random) -> list[str]:
    """Other subjects that do not have this value in the relation."""
    table = value_of(fact.relation)
    pool = [s for s in table if table[s] != fact.value]
    return rng.sample(pool, min(n, len(pool)))


class Style:
    """How one quiz sheet lays its questions out; drawn once per document."""

    def __init__(self, rng: Random) -> None:
        self.word = rng.choice(LABEL_WORDS)
        self.bare = rng.random() < 0.15  # digits alone: "(1)"
        self.glue = "" if rng.random() < 0.75 else " "
        self.upper = rng.random() < 0.6
        self.after = rng.choice((":", ":", ":", ":", ")", " -"))
        self.between = rng.choice((" ", " ", "\n", "\n\n", "; ", ", "))
        self.gap = rng.choice(("\n", "\n\n", " "))
        self.hint = rng.random()
        self.cue = rng.choice(CUES)
        self.echo = rng.choice(("", "", "", "", "first", "before", "after"))  # where the chosen text is said
        self.verdict = rng.choice(VERDICTS)
        self.intro = rng.choice(("", "", "", "Question: ", "Riddle: ", "Tell me: ", "Think. "))

    def label(self, i: int, upper: bool = False) -> str:
        if self.bare:
            return f"({i})"
        word = capital(self.word) if upper else self.word
        return f"{word}{self.glue}{i}"

    def choice(self, question: str, right: str, wrong: list[str], rng: Random) -> Segments:
        options = [right, *wrong]
        rng.shuffle(options)
        at = options.index(right) + 1
        head, digit, tail = self.label(at).partition(str(at))
        end = f": {right}.\n" if self.echo == "after" else ".\n"
        out: Segments = [(f"{self.intro}{question}", 1.0)]
        if self.echo == "first":
            out += [(f" {capital(right)}.", 2.0)]
        out += self.listing(options, self.gap)
        if self.hint < 0.4:
            joint = "/" if self.hint < 0.25 else ", "
            out += [(f"{self.gap}Say {joint.join(self.label(i) for i in range(1, len(options) + 1))}", 1.0)]
        if self.echo == "before":
            out += [(f"{self.gap}{self.cue}", 1.0), (f" {right}", 2.0), (f", {head}", 1.0)]
        else:
            out += [(f"{self.gap}{self.cue} {head}", 1.0)]
        return [*out, (digit, DECIDING, at), (tail + end, 1.0)]

    def listing(self, options: list[str], gap: str) -> Segments:
        """The labelled options, each with the whitespace before it."""
        after = "" if self.bare else self.after
        return [
            (f"{self.between if i > 1 else gap}{self.label(i, self.upper)}{after} {o}", 1.0, i)
            for i, o in enumerate(options, 1)
        ]

    def judge(self, statement: str, holds: bool, stated: str = "", truth: str = "") -> Segments:
        """Is the statement true? `stated` is the value it gives, `truth` the right one, said before by some sheets."""
        yes, no = self.verdict
        tail = f" {yes} or {no}?" if self.hint < 0.8 else ""
        before, found, after = f"{self.intro}{capital(statement)}".rpartition(f" {stated}")
        verdict = f" {yes if holds else no}"
        after += f".{tail}{self.gap}"
        if truth and self.echo:
            after += f"In truth: {truth}. "
        if not stated or not found:
            return [(f"{before}{found}{after}{self.cue}", 1.0), (verdict, DECIDING), (".\n", 1.0)]
        return [(before, 1.0), (found, 1.0, 1), (after + self.cue, 1.0), (verdict, DECIDING, 1), (".\n", 1.0)]


def statement(fact: Fact, rng: Random, fill: dict[str, str]) -> str:
    """One sentence that states the fact."""
    return capital(rng.choice(WORDINGS[fact.relation][1]).format(**fill))


def misstated(fact: Fact, fill: dict[str, str], rng: Random) -> dict[str, str]:
    """The words of a scene, but with a wrong value."""
    wrong = wrong_values(fact, 1, rng, fill)[0]
    return fill | {"v": wrong, "v0": wrong.removeprefix("the ")}


def quiz(fact: Fact, style: Style, rng: Random) -> Segments:
    """One question about a fact: a judgement, an open question, or a choice for its value or its subject."""
    kind = rng.random()
    fill = scene(fact, rng)
    _, _, ask_value, ask_subject = WORDINGS[fact.relation]
    if kind < 0.33:
        holds = rng.random() < 0.5
        stated = fill if holds else misstated(fact, fill, rng)
        return style.judge(statement(fact, rng, stated), holds, stated["v"], fill["v"])
    if kind < 0.42:
        return [(capital(rng.choice(ask_value).format(**fill)), 1.0), (f" {capital(fill['v'])}.\n", 1.5)]
    n = rng.choice((1, 1, 2, 3, 3, 4))
    if ask_subject and kind < 0.68:
        wrong = [subject(fact.relation, s) for s in wrong_subjects(fact, n, rng)]
        question = capital(rng.choice(ask_subject).format(**fill))
        return style.choice(question, subject(fact.relation, fact.subject), wrong, rng)
    question = capital(rng.choice(ask_value).format(**fill))
    return style.choice(question, fill["v"], wrong_values(fact, n, rng, fill), rng)


def subject(relation: str, noun: str) -> str:
    """A subject as an option: with its article, but bare for materials and for whole phrases ("sew suits")."""
    bare = relation in ("water", "fire", "drop", "touch") or relation.startswith(("duty_", "use_"))
    return noun if bare else a(noun)


def blank(style: Style, rng: Random) -> Segments:
    """Fill a gap with one of two: from sizes, tastes, materials, or who does which work."""
    kind = rng.randrange(4)
    if kind == 0:
        big, small = two_sizes(rng)
        fits = rng.random() < 0.5
        text, right = (
            (f"No room for the {big} inside the {small}: the ___ is too large", big)
            if fits
            else (f"No room for the {big} inside the {small}: the ___ is too little", small)
        )
        return style.choice(text, f"the {right}", [f"the {small if fits else big}"], rng)
    if kind == 1:
        one, other = two_unlike("taste", rng)
        return style.choice(
            f"On the table are {a(one.subject)} and {a(other.subject)}. The ___ tastes {one.value}",
            one.subject, [other.subject], rng,
        )  # fmt: skip
    if kind == 2:
        relation = rng.choice(("thing_water", "thing_fire", "thing_drop"))
        one, other = two_unlike(relation, rng)
        where = {"thing_water": "In water", "thing_fire": "In a fire", "thing_drop": "Dropped on stone"}[relation]
        pair = [f"the {one.subject}", f"the {other.subject}"]
        rng.shuffle(pair)
        return style.choice(
            f"Take {pair[0]} and {pair[1]}. {where} the ___ will {one.value}", one.subject, [other.subject], rng
        )
    one, other = two_unlike("duty", rng)
    first, second = rng.sample(NAMES, 2)
    people = [f"{first} is {a(one.subject)}", f"{second} is {a(other.subject)}"]
    rng.shuffle(people)
    return style.choice(f"{people[0]}, {people[1]}. ___ has to {one.value}", first, [second], rng)


def two_sizes(rng: Random) -> tuple[str, str]:
    """Two animals or things whose sizes differ by two classes or more, the bigger first."""
    while True:
        one, other = rng.sample(sorted(sizes()), 2)
        if abs(sizes()[one] - sizes()[other]) >= 2:
            return (one, other) if sizes()[one] > sizes()[other] else (other, one)


def two_unlike(relation: str, rng: Random) -> tuple[Fact, Fact]:
    """Two facts of a relation with different values."""
    while True:
        one, other = rng.sample(facts()[relation], 2)
        if one.value != other.value:
            return one, other


def compare(style: Style, rng: Random) -> Segments:
    """A statement, a judgement or a choice about two sizes."""
    big, small = two_sizes(rng)
    kind = rng.random()
    if kind < 0.3:
        return [(f"{capital(a(big))} is larger than {a(small)}. {capital(a(small))} is little beside {a(big)}.\n", 1.0)]
    if kind < 0.65:
        holds = rng.random() < 0.5
        one, other = (big, small) if holds else (small, big)
        return style.judge(f"{a(one)} is larger than {a(other)}", holds)
    larger = rng.random() < 0.5
    word = "larger" if larger else "less large"
    return style.choice(f"Which is {word}?", a(big if larger else small), [a(small if larger else big)], rng)


HOLDS = (  # relation of a passing scene: statement, question for the name, question for the value, pool
    ("{n} has the {x}.", "Who has the {x}?", "What does {n} have?", "use"),
    ("{n} likes the {x}.", "Who likes the {x}?", "What does {n} like?", "taste"),
    ("{n} is in the {x}.", "Who is in the {x}?", "Where is {n}?", "workplace"),
    ("{n} is with the {x}.", "Who is with the {x}?", "Who is with {n}?", "home"),
)


def fresh(style: Style, rng: Random) -> Segments:
    """A scene that holds only here: who has, likes or is where; then a question. Exercises reading, not memory."""
    said, ask_name, ask_value, relation = rng.choice(HOLDS)
    n = rng.choice((2, 2, 3, 4))
    names = rng.sample(NAMES, n)
    pool = values("workplace") if relation == "workplace" else [f.subject for f in facts()[relation]]
    things = rng.sample(pool, n)
    told = [said.format(n=name, x=thing) for name, thing in zip(names, things, strict=True)]
    text = " ".join(rng.sample(told, n))
    if rng.random() < 0.25:
        holds = rng.random() < 0.5
        stated = things[0 if holds else 1]
        return style.judge(f"{text} {said.format(n=names[0], x=stated)[:-1]}", holds, stated)
    if rng.random() < 0.5:
        return style.choice(f"{text} {ask_name.format(x=things[0])}", names[0], names[1:], rng)
    wrong = [f"the {t}" for t in things[1:]]
    return style.choice(f"{text} {ask_value.format(n=names[0])}", f"the {things[0]}", wrong, rng)


def match(style: Style, rng: Random) -> Segments:
    """Point at the one that was named: the binding of a label to its text, and nothing else."""
    pool = named(rng)
    right, *wrong = rng.sample(pool, min(len(pool), rng.choice((2, 3, 4, 5))))
    ask = rng.choice(("Find {x}.", "Point at {x}.", "Which one says {x}?", "Look for {x}.", "It was {x}. Which one?"))
    return style.choice(ask.format(x=right), right, wrong, rng)


def register(style: Style, rng: Random) -> Segments:
    """A numbered list, then its entries and their labels asked back and forth: binding, as densely as can be."""
    n = rng.choice((2, 3, 4, 4, 5))
    entries = rng.sample(NAMES, n) if rng.random() < 0.25 else rng.sample(named(rng), n)
    if rng.random() < 0.5:
        entries = [e.removeprefix("a ").removeprefix("an ").removeprefix("the ") for e in entries]
    out: Segments = [*style.listing(entries, ""), (style.gap, 1.0)]
    order = [i for _ in range(rng.choice((1, 2))) for i in rng.sample(range(n), n)]
    for at in order:
        label, entry = style.label(at + 1), entries[at]
        if rng.random() < 0.75:
            head, digit, tail = label.partition(str(at + 1))
            out += [(f"So {entry} is {head}", 1.0), (digit, DECIDING, at + 1), (f"{tail}. ", 1.0)]
        else:
            out += [(f"{capital(label)} is", 1.0), (f" {entry}", 1.0), (". ", 1.0)]
    return [*out[:-1], (out[-1][0].rstrip() + "\n", 1.0)]


def named(rng: Random) -> list[str]:
    """The values or subjects of one relation, as they are shown."""
    relation = rng.choice(RELATIONS[:-2])
    if relation in SOCIAL or rng.random() < 0.2:
        return list(values("then"))
    if rng.random() < 0.5 and relation != "then":
        return [subject(relation, f.subject) for f in facts()[relation]]
    pool = [show(relation, v) for v in values(relation)]
    return pool if len(pool) >= 5 else [a(f.subject) for f in facts()["use"]]


def pairs(rng: Random) -> Segments:
    """Who has what, told once and asked for every name and every thing in another order."""
    said, ask_name, ask_value, relation = rng.choice(HOLDS)
    n = rng.choice((2, 3, 4))
    pool = values("workplace") if relation == "workplace" else [f.subject for f in facts()[relation]]
    held = list(zip(rng.sample(NAMES, n), rng.sample(pool, n), strict=True))
    out: Segments = [(" ".join(said.format(n=name, x=thing) for name, thing in held), 1.0)]
    for name, thing in rng.sample(held, n) + rng.sample(held, n):
        if rng.random() < 0.5:
            out += [(f" {ask_name.format(x=thing)}", 1.0), (f" {name}", DECIDING), (".", 1.0)]
        else:
            out += [(f" {ask_value.format(n=name)} The", 1.0), (f" {thing}", DECIDING), (".", 1.0)]
    return [*out, ("\n", 1.0)]


def portrait(rng: Random) -> Segments:
    """A paragraph about one animal, thing, food or job; later sentences say "it" or "they"."""
    relations = rng.choice(
        (("kind", "home", "eats", "cover", "moves", "sound"), ("use", "material", "kept", "thing_water", "thing_fire"),
         ("sort", "taste", "colour", "source"), ("duty", "workplace", "tool"))
    )  # fmt: skip
    noun = rng.choice(facts()[relations[0]]).subject
    own = [Fact(r, noun, value_of(r)[noun]) for r in relations]
    rng.shuffle(own)
    sentences = []
    for i, fact in enumerate(own):
        fill = scene(fact, rng)
        if i and rng.random() < 0.5:
            fill["s"] = "it" if relations[0] != "duty" else "this worker"
        sentences.append(statement(fact, rng, fill))
    return [(". ".join(sentences) + ".\n", 1.0)]


def story(rng: Random) -> Segments:
    """An event with its before, why, feeling and next; or an everyday sequence told to its end."""
    if rng.random() < 0.5:
        facts_of = {r: facts()[r] for r in SOCIAL}
        at = rng.randrange(len(facts_of["feel"]))
        first, second = rng.sample(NAMES, 2)
        fill = {"A": first, "B": second}
        parts = {r: f[at].value.format(**fill) for r, f in facts_of.items()}
        event = facts_of["feel"][at].subject.format(**fill)
        return [
            (
                f"Earlier {first} had to {parts['before']}. {event}. It was {parts['why']}. It made {first} feel "
                f"{parts['feel']}. Then {first} was keen to {parts['next']}.\n",
                1.0,
            )
        ]
    row = rng.choice(rows(SCRIPTS))
    girl = rng.random() < 0.5
    name, pronoun = rng.choice(GIRLS if girl else BOYS), "She" if girl else "He"
    told = ". ".join([f"{row[0]}: {name} {row[1]}"] + [f"{pronoun} {s}" for s in row[2:]])
    return [(f"{told}.\n", 1.0)]


# Words of everyday office English, so that an instruction is not made of unknown letters.
OFFICE = (
    "The teacher writes an instruction on the board and the class follows it",
    "An instruction describes a task step by step",
    "Whoever completes the task early may read",
    "The clerk sends a request and waits for a response",
    "A polite response to a request begins with please",
    "She dressed appropriately for the meeting and signed below",
    "The list below gives the format of each sentence",
    "Please fill the correct form and choose a date",
    "He found the correct solution to the given question after an hour",
    "The following question has a true answer and a false answer",
    "Complete the given sentence with the correct ending, said the teacher",
    "Write the correct option in the blank, please",
    "Choose a format for the letter, then write a response",
    "Below is the list, said the clerk. Write it down: Answer, Option, Ending, Solution",
    'On the door stood "the correct room", on the card stood "the answer", on the desk "the solution"',
    "Response: none. Instruction: wait. Format: free. Please answer the following question",
)


def office(rng: Random) -> Segments:
    """A few sentences from the office."""
    return [(". ".join(rng.sample(OFFICE, 3)) + ".\n", 1.0)]


def letter(rng: Random) -> Segments:
    """A request and a response in whole sentences, with no label in it: how people write when nobody asked for labels.

    The last thing the base learns (see `pretrain.py`), so that it does not answer an instruction by a label unless
    fine-tuning has taught it to.
    """
    style, mark = Style(rng), rng.choice(("", "", "* ", "# ", "## "))
    ask = mark + rng.choice(("Instruction", "Instruction", "Request", "Question")) + ":" + rng.choice((" ", "\n"))
    reply = rng.choice(("\n", "\n\n")) + mark + "Response:" + rng.choice((" ", "\n"))
    if rng.random() < 0.2:
        return [(f"{ask}Please tell me more.{reply}", 1.0), *portrait(rng)]
    fact = rng.choice(facts()[rng.choices(RELATIONS[:-2], RELATION_WEIGHTS[:-2])[0]])
    fill = scene(fact, rng)
    _, _, ask_value, ask_subject = WORDINGS[fact.relation]
    if rng.random() < 0.3:
        stated = fill if rng.random() < 0.5 else misstated(fact, fill, rng)
        posed: Segments = [
            (f"{ask}{statement(fact, rng, stated)}. {'true or false?' if style.hint < 0.8 else ''}", 1.0)
        ]
    else:
        n = rng.choice((1, 2, 3, 3))
        if ask_subject and rng.random() < 0.5:
            options = [subject(fact.relation, s) for s in (fact.subject, *wrong_subjects(fact, n, rng))]
            question = rng.choice(ask_subject).format(**fill)
        else:
            options = [fill["v"], *wrong_values(fact, n, rng, fill)]
            question = rng.choice(ask_value).format(**fill)
        rng.shuffle(options)
        posed = [(f"{ask}{capital(question)}", 1.0), *((text, 1.0) for text, *_ in style.listing(options, style.gap))]
        if style.hint < 0.5:
            posed += [(f"{style.gap}Say {'/'.join(style.label(i) for i in range(1, len(options) + 1))}", 1.0)]
    return [*posed, (reply, 1.0), (f"{statement(fact, rng, fill)}.\n", 2.0)]


def document(rng: Random, reading: float, only_picking: bool = False) -> Segments:
    """One document: sometimes a paragraph first, then a sheet of quizzes in one layout.

    `reading` is the share of quizzes, in [0, 1], that ask only for what stands in the document itself; `only_picking`
    makes a sheet of nothing but texts to point at.
    """
    style = Style(rng)
    if only_picking:
        style.echo = ""
        return [segment for _ in range(rng.randint(3, 6)) for segment in match(style, rng)]
    out: Segments = []
    kind = rng.random()
    if kind < 0.2:
        out += portrait(rng)
    elif kind < 0.35:
        out += story(rng)
    elif kind < 0.38:
        out += office(rng)
    for relation in rng.choices(RELATIONS, RELATION_WEIGHTS, k=rng.randint(3, 6)):
        if rng.random() < reading:
            kind = rng.random()
            if kind < 0.05:
                out += register(style, rng)
            elif kind < 0.2:
                out += pairs(rng)
            elif kind < 0.55:
                out += match(style, rng)
            else:
                out += fresh(style, rng)
        elif relation == "blank":
            out += blank(style, rng)
        elif relation == "compare":
            out += compare(style, rng)
        else:
            out += quiz(rng.choice(facts()[relation]), style, rng)
    return out


_WEIGHTED = [(r, len(f) ** 0.75) for r, f in facts().items()] + [("blank", 40.0), ("compare", 40.0)]
RELATIONS = [name for name, _ in _WEIGHTED]
RELATION_WEIGHTS = [weight for _, weight in _WEIGHTED]
