"""Answers that are one of a few: what a text says, None where it says nothing that the rule can read.

Each is the rule of a script of LLaVA (c121f04) or of VL-Adapter (545fcbb), to the letter unless said. An answer that is
not read is wrong, and counted apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_NO = {"No", "no", "not"}
_YES = {"Yes", "yes"}
# what may stand around a lone letter, in this order (MMBench's evaluator)
_AROUND = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","),
    (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
_LETTERS = "ABCDE"  # what MMBench's evaluator looks for, offered or not


def gqa(text: str) -> str:
    """The answer that is compared with GQA's (`convert_gqa_for_eval.py`): no full stops at its end, lower case.

    VL-Adapter compares the text as it is, so that "Yes" is wrong there.
    """
    return text.rstrip(".").lower()


def nlvr2(true: float, false: float) -> str | None:
    """The answer with the larger logit at the first generated position (VL-Adapter); None where they are equal."""
    return None if true == false else "true" if true > false else "false"


def pope(text: str) -> str | None:
    """The word "no" where the first sentence has a word No, no or not, else "yes" if it has Yes or yes, else None.

    The script (`eval_pope.py`) says "yes" for every text without a no, an empty one too: metric "pope_released".
    """
    said = set(text.split(".")[0].replace(",", "").split(" "))
    return "no" if said & _NO else "yes" if said & _YES else None


def science_qa(text: str, letters: str) -> str | None:
    """The letter (of `letters`, those offered) that a text is, begins with ("B. "), or names once.

    Names: "The answer is X" and any one sign behind it; the script's full stop is not escaped, so "The answer is B" at
    the very end is not read. Lower case and "B." alone are not read, either.
    """
    if text in letters and len(text) == 1:
        return text
    if re.match(r"[A-E]\. ", text):
        return text[0] if text[0] in letters else None
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 and found[0] in letters else None


def labelled(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text is, sign for sign (VL-Adapter compares TVQA's and How2QA's so): "A3" and "a3." are none."""
    return text if text in labels else None


def mmbench(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of MMBench's options that a text says: a lone letter, or the one option whose words it contains.

    Letters stand alone, or with one of . , : ) ( around them; if several different ones do so in the same way, that way
    says nothing. "A" alone among more than three words may be an article, and says nothing. What is left, the evaluator
    asks GPT; here it is None (MMBench's `can_infer`, as in lmms-eval 0.7.3).
    """
    said = text.split()
    for before, after in _AROUND:
        found = [letter for letter in _LETTERS if before + letter + after in said]
        article = not before and not after and "A" in found and len(said) > 3
        if len(found) == 1 and not article:
            return found[0] if found[0] in options else None
    inside = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return inside[0] if len(inside) == 1 else None
