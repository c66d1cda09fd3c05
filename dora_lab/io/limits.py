"""What a value has to be: limits of the fields of a spec, each in words and as a test."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """What a value has to be."""

    words: str
    holds: Callable[[Any], bool]


def _distinct(names: tuple[str, ...]) -> bool:
    return bool(names) and len(set(names)) == len(names)


def _pairs(value: str) -> Callable[[tuple[str, ...]], bool]:
    return lambda pairs: all(re.fullmatch(f".+={value}", pair) for pair in pairs)


def _are_patterns(texts: tuple[str, ...]) -> bool:
    try:
        return all(re.compile(text).pattern for text in texts)
    except re.error:
        return False


PROTOCOLS = ("generate", "loglikelihood", "cloze", "builtin")
DTYPES = ("float32", "bfloat16", "float16", "float64")
COUNT = Limit("at least 1", lambda number: number >= 1)
NOT_NEGATIVE = Limit("at least 0", lambda number: number >= 0)
POSITIVE = Limit("greater than 0", lambda number: number > 0)
PASSES = Limit("greater than 0, at most a million", lambda number: 0 < number <= 1e6)
PROBABILITY = Limit("in [0, 1)", lambda number: 0 <= number < 1)
REGIONS = 100  # of a picture or clip at most: as many words as VL-Adapter adds to tell them apart
SHARE = Limit("in [0, 1]", lambda number: 0 <= number <= 1)
SEED = Limit("in 0 .. 2^31 - 1", lambda number: 0 <= number < 2**31)
INCREASING = Limit(
    "increasing numbers in (0, 1]", lambda x: _distinct(x) and sorted(x) == list(x) and 0 < x[0] <= x[-1] <= 1
)
NOT_EMPTY = Limit("not empty", bool)
DISTINCT = Limit("distinct, not empty", _distinct)
RANKS = Limit("pattern=rank each", _pairs(r"[1-9]\d*"))
ALPHAS = Limit("pattern=alpha each", _pairs(r"(?=.*[1-9])\d+(\.\d+)?"))  # above zero
GROUPS = Limit("PATTERN=FACTOR or PATTERN=FACTOR:DECAY each, factors above 0", lambda texts: _groups(texts))
TASK_SIZES = Limit("TASK=ITEMS each, ITEMS at least 1, a task once", lambda texts: _task_sizes(texts))
CUTOFFS = Limit("TASK=TEXT/ANSWER each, numbers of at least 3, a task once", lambda texts: _cutoffs(texts))
SHAPE = Limit("empty, or regions and width", lambda sizes: not sizes or (len(sizes) == 2 and min(sizes) > 0))
SQUARE = Limit("a square number", lambda number: number >= 1 and math.isqrt(number) ** 2 == number)
PATTERN = Limit("a regular expression", lambda text: _are_patterns((text,)))
PATTERNS = Limit("distinct regular expressions", lambda texts: not texts or (_distinct(texts) and _are_patterns(texts)))
RESCALES = Limit(
    "KIND=FACTOR/FACTOR/... each, a factor above 0 for every layer, of q_proj, v_proj, up_proj", lambda x: _rescales(x)
)
IN_EXPERIMENTS = Limit("the name of a Python file, without .py", str.isidentifier)
IN_METHODS = Limit("the name of a file in dora_lab/methods", str.isidentifier)
A_DTYPE = Limit("one of " + ", ".join(DTYPES), DTYPES.__contains__)
KNOWN_PROTOCOLS = Limit("distinct ones of " + ", ".join(PROTOCOLS), lambda x: _distinct(x) and set(x) <= set(PROTOCOLS))


class Group(NamedTuple):
    """One group of parameters: those whose full name the pattern is found in and no pattern before it is."""

    pattern: str
    factor: float  # of the learning rate, at every step
    decay: float | None  # None: as without the group


def group_of(text: str) -> Group:
    """The group that "PATTERN=FACTOR" or "PATTERN=FACTOR:DECAY" says; raises ValueError for another text."""
    pattern, _, numbers = text.rpartition("=")
    factor, colon, decay = numbers.partition(":")
    group = Group(pattern, float(factor), float(decay) if colon else None)
    re.compile(pattern)
    if not pattern or not 0 < group.factor < math.inf or not 0 <= (group.decay or 0) < math.inf:
        raise ValueError(text)
    return group


def _groups(texts: tuple[str, ...]) -> bool:
    try:
        return len({group_of(text).pattern for text in texts}) == len(texts)
    except (ValueError, re.error):
        return False


def task_sizes(texts: tuple[str, ...]) -> dict[str, int]:
    """The numbers of items, by task, that "TASK=ITEMS" of each say; raises ValueError for another text."""
    found = {}
    for text in texts:
        task, _, items = text.rpartition("=")
        if not task or task in found or not re.fullmatch(r"[1-9]\d*", items):
            raise ValueError(text)
        found[task] = int(items)
    return found


def _task_sizes(texts: tuple[str, ...]) -> bool:
    try:
        return len(task_sizes(texts)) == len(texts)
    except ValueError:
        return False


def cutoffs(texts: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Tokens of the text and of the answer at most, by task, that "TASK=TEXT/ANSWER" of each say; else ValueError."""
    found = {}
    for text in texts:
        task, _, numbers = text.rpartition("=")
        sizes = [int(number) for number in numbers.split("/")]
        if not task or task in found or len(sizes) != 2 or min(sizes) < 3:  # the begin, a token, the end
            raise ValueError(text)
        found[task] = (sizes[0], sizes[1])
    return found


def _cutoffs(texts: tuple[str, ...]) -> bool:
    try:
        return len(cutoffs(texts)) == len(texts)
    except ValueError:
        return False


PARTNERS = {"q_proj": "k_proj", "v_proj": "o_proj", "up_proj": "down_proj"}  # what is divided where the first is scaled


def rescaled(text: str) -> tuple[str, tuple[float, ...]]:
    """The kind and the layers' factors that "KIND=FACTOR/FACTOR/..." says; raises ValueError for another text."""
    kind, _, numbers = text.partition("=")
    factors = tuple(map(float, numbers.split("/")))
    if kind not in PARTNERS or not all(0 < factor < math.inf for factor in factors):
        raise ValueError(text)
    return kind, factors


def _rescales(texts: tuple[str, ...]) -> bool:
    try:
        return len({rescaled(text)[0] for text in texts}) == len(texts)
    except ValueError:
        return False
