"""Score a run's saved texts again, with other rules for reading an answer: no model, no torch, and the record stays.

A run keeps every generated text in ``samples/<task>.generate.jsonl``. What an answer is, is a decision of the protocol
(the first match of a pattern, case-sensitive, after the last "### Response:"), and a score of 2.3 % on a yes/no task is
that decision speaking, not the model: here it can be changed and its weight seen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_lab.io.atomic import write_text
from dora_lab.io.files import hash_bytes
from dora_lab.runs.errors import StoreError
from dora_lab.runs.streams import read_stream
from dora_lab.runs.survey import verified
from dora_lab.spec import did_you_mean
from dora_lab.tasks import load_task
from dora_lab.tasks.task import answer_part

PROTOCOL = "generate"
FIELDS = ("output", "parsed", "gold")
_NAME = re.compile(r"[\w .-]+")  # what can be meant as a task's name


def rescore(run: Path, patterns: Sequence[str] = ()) -> tuple[list[dict[str, Any]], Path]:
    """Rows of old and new scores per task, and the file ``<run>/rescored/<id>.jsonl`` that they were written to.

    patterns: "REGEX" for every task or "TASK=REGEX" for one; without any the tasks' own. The first match counts: its
    first group if it has one, else all of it, in any case; what is then no label of the task is no answer. Rows: task,
    pattern, n, value, n_unparsed, old_value, old_n_unparsed, and `correct`, one character per item. Raises StoreError
    for a run that `verified` refuses, without samples, or with samples that do not give the record's scores by the
    tasks' own patterns;
    ValueError for a pattern that is none, a task that the run has not, two patterns for one task.
    """
    run = Path(run)
    verified(run, "samples")
    old = {row["task"]: row for row in read_stream(run, "eval") if row["protocol"] == PROTOCOL}
    files = {file.name.removesuffix(f".{PROTOCOL}.jsonl"): file for file in run.glob(f"samples/*.{PROTOCOL}.jsonl")}
    if not old or not files:
        raise StoreError(
            f"{run}: no samples/<task>.{PROTOCOL}.jsonl to score again; they are not committed: run the spec yourself"
        )
    chosen = _patterns(patterns, list(old))
    samples = {task: _samples(files, task, run) for task in old}
    for task, row in old.items():
        _refuse_other(task, samples[task], row)
    rows = [_row(task, chosen[task], samples[task], row) for task, row in old.items()]
    identity = hash_bytes(json.dumps(chosen, sort_keys=True).encode())[:8]
    file = run / "rescored" / f"{identity}.jsonl"
    file.parent.mkdir(exist_ok=True)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows, file


def _patterns(given: Sequence[str], tasks: Sequence[str]) -> dict[str, str | None]:
    """The pattern of every task, None for its own."""
    found: dict[str | None, str] = {}  # None: of all the others
    for text in given:
        name, equals, regex = text.partition("=")
        # a name that is no task's is a mistake, not the beginning of a pattern for all of them
        task = name.strip() if equals and _NAME.fullmatch(name) else None
        if task is not None and task not in tasks:
            raise ValueError(
                f"--pattern {text}: '{task}' is no task of this run; {did_you_mean(task, tasks)} (a pattern for all of "
                f"them that begins like that: '(?:{name})={regex}')"
            )
        pattern = text if task is None else regex
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"--pattern {text}: not a regular expression: {error}") from None
        if task in found:
            raise ValueError(f"--pattern {text}: a second pattern for {task or 'all tasks'}; give one")
        found[task] = pattern
    return {task: found.get(task, found.get(None)) for task in tasks}


def _refuse_other(task: str, samples: Sequence[dict[str, Any]], old: Mapping[str, Any]) -> None:
    """Samples have to be those that the record's scores are of: read as they were read then, they say the same."""
    if len(samples) != old["n"]:
        raise StoreError(f"task {task}: {len(samples)} samples, the record scored {old['n']}; restore the samples")
    now = _row(task, None, samples, old)
    kept = old.get("correct", now["correct"])  # records of early versions have the numbers alone
    for index, (then, here) in enumerate(zip(kept, now["correct"], strict=True)):
        if then != here:
            words = "wrong", "right"
            raise StoreError(
                f"task {task}, item {index}: {words[int(then)]} in the record, its saved text is {words[int(here)]}; "
                "restore the samples, or the package's version that made them"
            )
    for name in ("value", "n_unparsed"):
        if not math.isclose(now[name], old[name], abs_tol=1e-9):
            raise StoreError(
                f"task {task}: {name} is {old[name]} in the record, {now[name]} of the samples; restore them"
            )


def _row(task: str, pattern: str | None, samples: Sequence[dict[str, Any]], old: Mapping[str, Any]) -> dict[str, Any]:
    parse = _parser(task, pattern)
    parsed = [parse(sample["output"]) for sample in samples]
    correct = [answer == sample["gold"] for answer, sample in zip(parsed, samples, strict=True)]
    return {
        "task": task,
        "pattern": pattern,
        "n": len(samples),
        "value": sum(correct) / len(samples),
        "n_unparsed": sum(answer is None for answer in parsed),
        "old_value": old["value"],
        "old_n_unparsed": old["n_unparsed"],
        "correct": "".join(str(int(right)) for right in correct),
    }


def _parser(task: str, pattern: str | None) -> Callable[[str], str | None]:
    """What reads the answer in a text: the task's own rule, or the first match of a pattern, where that is a label."""
    labels = {label.lower(): label for label in load_task(task).labels}
    if pattern is None:
        return load_task(task).parse
    regex = re.compile(pattern)

    def parse(output: str) -> str | None:
        found = regex.search(answer_part(output))
        return None if found is None else labels.get((found.group(1 if regex.groups else 0) or "").lower())

    return parse


def _samples(files: Mapping[str, Path], task: str, run: Path) -> list[dict[str, Any]]:
    if task not in files:
        raise StoreError(f"{run}: samples/{task}.{PROTOCOL}.jsonl is missing; restore it or run the spec again")
    samples = []
    # not splitlines: a text may hold other ends of line, which JSON leaves as they are
    lines = files[task].read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            missing = [name for name in FIELDS if name not in sample]
        except (ValueError, TypeError):
            missing = ["*"]
        if missing:
            raise StoreError(f"{files[task]}, line {number}, field '{missing[0]}': damaged; restore the file")
        samples.append(sample)
    return samples
