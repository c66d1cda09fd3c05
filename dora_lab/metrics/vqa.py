"""Soft accuracy of short answers against ten annotators: VQAv2, VizWiz, TextVQA (Antol et al. 2015, section 4).

Three rules, which differ in what is normalised before texts are compared:

- "released": VQA's evaluator (GT-Vision-Lab/VQA, commit c4e6a0e) and `evaluate_raw` of VL-T5 and VL-Adapter (545fcbb).
  The answer is normalised, of the annotators' answers only the punctuation, and that only where they differ among
  themselves. So an annotator's "two" or "the dog" is matched by nothing, and neither is "Yes." where all ten say it.
- "both": the same with both sides normalised whole, always: what the rule is meant to be.
- "m4c": both sides, always, after "," and "?" are dropped and " " is put before "'s": TextVQA and VizWiz, as LLaVA
  scores them (c121f04, `m4c_evaluator.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

RULES = ("released", "both", "m4c")
ANNOTATORS = 10
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}, "a": "", "an": "", "the": ""}
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # at most: the scripts hand re.UNICODE, which is 32, to the place of a count
# each is also read with one of its apostrophes left out
_SHORT_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WRITTEN = {
    form[:at] + form[at + 1 :]: form for form in _SHORT_FORMS.split() for at, sign in enumerate(form) if sign == "'"
}
_WRITTEN["somebody'd"] = "somebodyd"  # the wrong way round in the evaluator's table


def soft_accuracy(answer: str, annotators: Sequence[str], rule: str) -> float:
    """Mean over the ten annotators of min(1, matches among the other nine / 3): 0, 0.3, 0.6, 0.9 or 1.

    Closed form by the number of matches among all ten. Leaving out every annotator who *equals* the left-out one, as
    lmms-eval 0.7.3 does where answers carry no ids, gives 0.6 for four matches. Raises ValueError for an unknown rule
    and for another number of annotators: with three, say, a right answer could not reach 1.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule '{rule}'; one of {', '.join(RULES)}")
    if len(annotators) != ANNOTATORS:
        raise ValueError(f"{len(annotators)} annotators' answers, expected {ANNOTATORS}")
    if rule == "released":
        theirs = list(annotators) if len(set(annotators)) == 1 else [_punctuation(text) for text in annotators]
    else:
        theirs = [normalise(text, rule) for text in annotators]
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(4, theirs.count(normalise(answer, rule)))]


def normalise(answer: str, rule: str) -> str:
    """An answer as it is compared: lower case, digits for none to ten, no articles, no punctuation.

    A sign of punctuation is dropped where it has a blank on one side anywhere in the answer, or the answer has a comma
    between digits; else it becomes a blank ("t-shirt": "t shirt"). Full stops are dropped unless a digit follows.
    """
    if rule == "m4c":
        answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    found = (_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_WRITTEN.get(word, word) for word in found if word)


def _punctuation(text: str) -> str:
    thousands = re.search(r"\d,\d", text)
    blanks = {sign: "" if thousands or f"{sign} " in text or f" {sign}" in text else " " for sign in _PUNCTUATION}
    return _PERIOD.sub("", text.translate(str.maketrans(blanks)), count=_PERIODS)
