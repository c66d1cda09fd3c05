"""From what a model said to scores: first one for each item, then what a table prints of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dora_lab.metrics import choice, vqa
from dora_lab.metrics.check import ROTATION, Item, ScoreError, check
from dora_lab.metrics.cider import cider_d

Answers = list[str | None]  # what was read in each output, None: nothing
Summary = dict[str, float | None]


@dataclass(frozen=True)
class Scores:
    """What one metric says of one set of items."""

    ids: tuple[str, ...]
    values: tuple[float, ...]  # of each item: a fraction; CIDEr-D in [0, 10]
    unread: tuple[bool, ...]  # the rule reads no answer in the item's output; its value is then that of a wrong answer
    summary: Summary  # by name, in the units of `values`; None: not defined for these items

    @property
    def n_unread(self) -> int:
        """Number of items whose output has no answer."""
        return sum(self.unread)


def score(metric: str, items: Sequence[Item], outputs: Mapping[str, Any], where: str) -> Scores:
    """The scores of `outputs`, by id of item, on `items`; `where` names their file in errors.

    An item is {"id": text, ...}; what else it holds, and what an output is, by metric:

    ================================ ============================================ ==========================
    metric                           item                                         summary
    ================================ ============================================ ==========================
    vqa_released, vqa_both, vqa_m4c  answers: the ten annotators'                 accuracy
    exact, gqa                       answer                                       accuracy
    nlvr2                            answer ("true", "false"), statement          accuracy, consistency
    cider_d, cider_d_ascii           references: texts                            cider_d
    labelled                         answer, labels: texts                        accuracy
    pope_released, pope_strict       answer ("yes", "no"), category               accuracy, f1 and each category's
    science_qa                       answer, letters ("ABCD"), image: bool        accuracy, accuracy_image
    mmbench                          answer, options {letter: text}, index        circular, vanilla
    ================================ ============================================ ==========================

    An output is a text; for nlvr2 {"true": logit, "false": logit}. Raises ScoreError for an unknown metric, ids that
    are not unique, an item without an output, an output without an item, and a field that is missing or wrong.
    """
    if metric not in METRICS:
        raise ScoreError(f"unknown metric '{metric}'; one of {', '.join(METRICS)}")
    fields, rule = METRICS[metric]
    check(metric, fields, items, outputs, where)
    ids = tuple(item["id"] for item in items)
    values, unread, summary = rule(items, [outputs[name] for name in ids])
    return Scores(ids=ids, values=tuple(values), unread=tuple(unread), summary=summary)


Scored = tuple[list[float], list[bool], Summary]


def _vqa(items: Sequence[Item], outputs: Sequence[str], rule: str) -> Scored:
    values = [vqa.soft_accuracy(text, item["answers"], rule) for item, text in zip(items, outputs, strict=True)]
    return values, [False] * len(values), {"accuracy": _mean(values)}


def _cider(items: Sequence[Item], outputs: Sequence[str], ascii_alone: bool = False) -> Scored:
    """ascii_alone: as VALUE's evaluator, to which every other character is a blank."""
    read = _ascii if ascii_alone else str
    values = cider_d(list(map(read, outputs)), [list(map(read, item["references"])) for item in items])
    return values, [False] * len(values), {"cider_d": _mean(values)}


def _ascii(text: str) -> str:
    return "".join(sign if sign.isascii() else " " for sign in text)


def _labelled(items: Sequence[Item], outputs: Sequence[str]) -> Scored:
    read = [choice.labelled(text, item["labels"]) for item, text in zip(items, outputs, strict=True)]
    values, unread = _right(items, read)
    return values, unread, {"accuracy": _mean(values)}


def _right(items: Sequence[Item], answers: Answers) -> tuple[list[float], list[bool]]:
    values = [float(answer == item["answer"]) for item, answer in zip(items, answers, strict=True)]
    return values, [answer is None for answer in answers]


def _text(items: Sequence[Item], outputs: Sequence[str], read: Callable[[str], str]) -> Scored:
    values, unread = _right(items, [read(text) for text in outputs])
    return values, unread, {"accuracy": _mean(values)}


def _nlvr2(items: Sequence[Item], outputs: Sequence[Mapping[str, float]]) -> Scored:
    values, unread = _right(items, [choice.nlvr2(output["true"], output["false"]) for output in outputs])
    whole = _grouped([item["statement"] for item in items], values)
    return values, unread, {"accuracy": _mean(values), "consistency": _mean([min(rows) for rows in whole.values()])}


def _pope(items: Sequence[Item], outputs: Sequence[str], otherwise: str | None) -> Scored:
    """`otherwise`: what a text counts as that says neither; F1 of "yes" is a mean over the categories."""
    read = [choice.pope(text) for text in outputs]
    said = [otherwise if answer is None else answer for answer in read]
    values, _ = _right(items, said)
    pairs = _grouped([item["category"] for item in items], list(zip(said, items, strict=True)))
    each = {f"f1_{name}": _f1([(answer, item["answer"]) for answer, item in rows]) for name, rows in pairs.items()}
    known = [value for value in each.values() if value is not None]
    f1 = _mean(known) if len(known) == len(each) else None
    return values, [answer is None for answer in read], {"accuracy": _mean(values), "f1": f1, **each}


def _f1(pairs: Sequence[tuple[str | None, str]]) -> float | None:
    """Of "yes": 2 TP / (2 TP + FP + FN); None where nobody says yes, neither the model nor the gold answers."""
    said, gold = sum(answer == "yes" for answer, _ in pairs), sum(right == "yes" for _, right in pairs)
    both = sum(answer == right == "yes" for answer, right in pairs)
    return 2 * both / (said + gold) if said + gold else None


def _science_qa(items: Sequence[Item], outputs: Sequence[str]) -> Scored:
    read = [choice.science_qa(text, item["letters"]) for item, text in zip(items, outputs, strict=True)]
    values, unread = _right(items, read)
    seen = [value for item, value in zip(items, values, strict=True) if item["image"]]
    return values, unread, {"accuracy": _mean(values), "accuracy_image": _mean(seen)}


def _mmbench(items: Sequence[Item], outputs: Sequence[str]) -> Scored:
    read = [choice.mmbench(text, item["options"]) for item, text in zip(items, outputs, strict=True)]
    values, unread = _right(items, read)
    whole = _grouped([item["index"] % ROTATION for item in items], values)
    first = [value for item, value in zip(items, values, strict=True) if item["index"] < ROTATION]
    return values, unread, {"circular": _mean([min(rows) for rows in whole.values()]), "vanilla": _mean(first)}


# fields of an item, and the rule
METRICS: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Item], Sequence[Any]], Scored]]] = {
    **{f"vqa_{rule}": (("answers",), partial(_vqa, rule=rule)) for rule in vqa.RULES},
    "exact": (("answer",), partial(_text, read=str)),
    "gqa": (("answer",), partial(_text, read=choice.gqa)),
    "nlvr2": (("answer", "statement"), _nlvr2),
    "labelled": (("answer", "labels"), _labelled),
    "cider_d": (("references",), _cider),
    "cider_d_ascii": (("references",), partial(_cider, ascii_alone=True)),
    "pope_released": (("answer", "category"), partial(_pope, otherwise="yes")),
    "pope_strict": (("answer", "category"), partial(_pope, otherwise=None)),
    "science_qa": (("answer", "letters", "image"), _science_qa),
    "mmbench": (("answer", "options", "index"), _mmbench),
}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _grouped(keys: Sequence[Any], rows: Sequence[Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = defaultdict(list)
    for key, row in zip(keys, rows, strict=True):
        found[key].append(row)
    return found
