"""What is known of the published files of LLM-Adapters, and how a file at hand compares with it.

Counts marked verified were read in the files (LLM-Adapters at commit 8166572); the others are widely quoted and fit
each other (they add up to the 170,420 items of the training mix) but the files were not at hand. Content hashes are
there for the files that were: over the items, so that line ends, key order or another container do not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dora_lab.tasks.task import FIELDS

MIX = "commonsense_170k"


@dataclass(frozen=True)
class Known:
    """One published file."""

    items: int
    verified: bool  # False: quoted, the file was not read
    sha256: str | None = None  # `content_sha256` of its items; None: the file was not at hand


KNOWN: dict[tuple[str, str], Known] = {  # (task, split)
    ("boolq", "test"): Known(3270, True, "590478b2e7cef795c16557bd9395adfe9542d423840707ff62b3481aa188848a"),
    ("piqa", "test"): Known(1838, True, "a9bdd79f93c550b81e8e9c40bdc2a190d026edcd40672ba3c7bcb8fe16450b2b"),
    ("social_i_qa", "test"): Known(1954, True, "df13b9f97242ca01d7ac5c70d5bc3927ba994d8228f5624967953a80bc287d36"),
    ("hellaswag", "test"): Known(10_042, False),
    ("winogrande", "test"): Known(1267, True),
    ("ARC-Easy", "test"): Known(2376, True, "ec8ca89b94ec8db461e80c63c0adfa20c21a73d0d37d86421aca341c763e1bbc"),
    ("ARC-Challenge", "test"): Known(1172, True),
    ("openbookqa", "test"): Known(500, True),
    ("boolq", "train"): Known(9427, True, "21cf86e27eb73484b4724c2e8d89e39c911065c770066222fe64f85c1bb77bcd"),
    ("piqa", "train"): Known(16_113, False),
    ("social_i_qa", "train"): Known(33_410, False),
    ("hellaswag", "train"): Known(39_905, False),
    ("winogrande", "train"): Known(63_238, False),
    ("ARC-Easy", "train"): Known(2251, True, "ad4fdfbb5e72582c4ed5eae872f5eabbed88cd4c0bb61e11b9d6afad2bbcfac4"),
    ("ARC-Challenge", "train"): Known(1119, True),
    ("openbookqa", "train"): Known(4957, True),
    (MIX, "train"): Known(170_420, False),
}
# the mix does not name its tasks, but the word before the number in an answer tells four groups of them apart
ANSWER_KINDS = {"true/false": 9427, "solution": 16_113, "ending": 39_905, "option": 63_238, "answer": 41_737}


def content_sha256(items: Iterable[dict[str, Any]]) -> str:
    """SHA-256 (64 hex digits) over the four fields of every item, in order."""
    whole = hashlib.sha256()
    for item in items:
        fields = [item[name] for name in FIELDS]
        whole.update(json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n")
    return whole.hexdigest()


def describe(task: str, split: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    """One file for the record: task, split, items, duplicates, sha256, and what is known of the published one.

    duplicates: items that are the same as an earlier one in all four fields. published, published_verified: its number
    of items and whether that was read in the file (None where nothing is known). agrees: whether all that is known of
    it (hash, else the number; for the mix the numbers by kind of answer, too) is true of this one.
    """
    seen = {tuple(item[name] for name in FIELDS) for item in items}
    known, found = KNOWN.get((task, split)), content_sha256(items)
    row = {"task": task, "split": split, "items": len(items), "duplicates": len(items) - len(seen), "sha256": found}
    agrees = None
    if known is not None:
        agrees = found == known.sha256 if known.sha256 else len(items) == known.items
    if task == MIX:
        row["answer_kinds"] = kinds = answer_kinds(items)
        agrees = agrees and kinds == ANSWER_KINDS
    return row | {
        "published": known.items if known else None,
        "published_verified": known.verified if known else None,
        "agrees": agrees,
    }


def answer_kinds(items: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Number of items by the kind of their answer: true/false, or the label without its number."""
    words = Counter(str(item["answer"]).rstrip("0123456789") for item in items)
    words["true/false"] = words.pop("true", 0) + words.pop("false", 0)
    return {kind: words[kind] for kind in sorted(words) if words[kind]}
