"""The prompt templates: `clean` (train and eval the same), `published` (byte for byte as released), and `cloze`.

The released scripts differ between training and evaluation in three places: two trailing spaces after "request."
against one; sixteen spaces against none on the line before "### Response:"; and sixteen spaces at the end of the
evaluation prompt that in training belong to the answer's line. The indents come from an indented multi-line string and
are part of the prompt; a multi-line instruction is not indented again.
"""

from __future__ import annotations

from typing import Any

_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_INDENT = " " * 16

_CLEAN = f"{_TASK}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
_PUBLISHED_TRAIN = (
    f"{_TASK}  \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}"
)
_PUBLISHED_EVAL = (
    f"{_TASK} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}"
)

_CLOZE = "Question: {instruction}\nAnswer:"  # of items that `cloze.as_cloze` made
# name: (train, eval)
TEMPLATES = {"clean": (_CLEAN, _CLEAN), "published": (_PUBLISHED_TRAIN, _PUBLISHED_EVAL), "cloze": (_CLOZE, _CLOZE)}


def train_prefix(item: dict[str, Any], template: str) -> str:
    """The text before the answer in training."""
    return _fill(item, template, 0)


def train_text(item: dict[str, Any], template: str) -> str:
    """The training text: prefix and output. The end-of-sequence token is appended by the tokenisation, not here."""
    return train_prefix(item, template) + item["output"]


def prompt(item: dict[str, Any], template: str) -> str:
    """The prompt that an evaluation generates from."""
    return _fill(item, template, 1)


def _fill(item: dict[str, Any], template: str, which: int) -> str:
    if template not in TEMPLATES:
        raise ValueError(f"unknown template '{template}'; choices: {', '.join(TEMPLATES)}")
    # no str.format on the item's own text: instructions may hold braces
    return TEMPLATES[template][which].replace("{instruction}", item["instruction"])
