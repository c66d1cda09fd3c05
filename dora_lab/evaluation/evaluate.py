"""Scores by lm-eval on the model in memory, by the protocols of a spec (`protocols`), one task at a time.

Nothing of an evaluation remains: the model's mode, its generation settings, the tokenizer and all random states are put
back. lm-eval's answer cache is not used (it does not tell two models apart).
"""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lm_eval import evaluator

from dora_lab.evaluation import nll
from dora_lab.evaluation.lm_eval_model import Model, quiet, undisturbed
from dora_lab.evaluation.protocols import PROTOCOLS
from dora_lab.evaluation.protocols.protocol import Item, Protocol, Question, Sample
from dora_lab.evaluation.rows import Progress, Tick, through
from dora_lab.runs.directory import RunDir
from dora_lab.spec import Spec
from dora_lab.tasks import Task, load_task
from dora_lab.tasks.limits import limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """One row of the record to be: a task by a protocol."""

    protocol: Protocol
    task: Task
    questions: list[Question]

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256("\0".join(question["prompt"] for question in self.questions).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """Fields of its row that say what was asked."""
        return {
            "task": self.task.name,
            "protocol": self.protocol.name,
            "n": len(self.questions),
            "prompt_sha256": self.prompt_sha256,
        }

    def batches(self, size: int) -> int:
        options = sum(len(question["options"]) for question in self.questions)
        return math.ceil((len(self.questions) if self.protocol.generates else options) / size)


def evaluate(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: dict[str, list[Item]],
    run: RunDir,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Score `model` on `items` (task name to items) by every protocol of the spec; returns protocol to mean accuracy.

    Protocol builtin brings items of its own (the first `data.test_items` of a task).

    Appends to the stream eval of `run` one row per task and protocol: accuracy (a fraction of n), its standard error
    (binomial, n - 1), n, n_unparsed (None if not generated), chance, majority (share of the most frequent answer),
    the hash of all prompts, `correct`, one character 0 or 1 per item in order, and of protocols that compare
    likelihoods what `nll` says; writes samples for re-grading.
    The mean is the paper's: over tasks, each with the same weight. Raises ItemError for a prompt that is too long,
    Stopped if `stop` is set. Rows that are there already, of the same questions, are kept: a task is evaluated by
    itself, so that its numbers do not depend on which others were done in one go.
    """
    parts = prepare(spec, model, tokenizer, items)

    def score(part: Part, tick: Tick) -> tuple[dict[str, Any], list[Sample]]:
        samples = answers(spec, model, tokenizer, part, tick)
        return _row(part, samples, spec.evaluation.split == "test"), samples

    rows = through(parts, score, run, spec.evaluation.batch_size, stop, progress)
    tasks = len(parts) // len(spec.evaluation.protocols)
    return {
        protocol: sum(row["value"] for row in rows if row["protocol"] == protocol) / tasks
        for protocol in spec.evaluation.protocols
    }


def prepare(
    spec: Spec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: dict[str, list[Item]]
) -> list[Part]:
    """What `evaluate` will ask, task by task and protocol by protocol.

    Raises ItemError for what it could not ask or the model not take: to be called before a training, too.
    """
    tasks = [load_task(name) for name in items or spec.data.tasks]  # with protocol builtin alone, no items are ours
    parts = [
        Part(protocol, task, protocol.questions(spec, task, items.get(task.name, ())))
        for protocol in (PROTOCOLS[name] for name in spec.evaluation.protocols)
        for task in tasks
    ]
    for part in parts:
        part.protocol.check(spec, part.task, part.questions, tokenizer, limits(model))
    return parts


def answers(
    spec: Spec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: Part, tick: Tick
) -> list[Sample]:
    """What the model answered: index, prompt, output, parsed, gold, correct and what else the protocol keeps."""
    name, settings, first = part.task.name, spec.evaluation, part.task.first_label
    # `evaluate`, not `simple_evaluate`: the latter reseeds every generator and collects the machine's environment
    with undisturbed(model, tokenizer), quiet():
        wanted = part.protocol.lm_eval_task(spec, part.task, part.questions, tokenizer)
        result = evaluator.evaluate(
            lm=Model(model, tokenizer, settings.batch_size, tick, part.protocol.cut, settings.reuse, first),
            task_dict=cast(Any, {"tasks": {name: wanted}, "groups": {}, "group_map": {}}),
            limit=len(part.questions),  # lm-eval's own tasks would ask all they have
            bootstrap_iters=0,
            log_samples=True,
        )
    logged = sorted(cast(Any, result)["samples"][name], key=lambda entry: entry["doc_id"])
    return [_sample(part, question, entry) for question, entry in zip(part.questions, logged, strict=True)]


def _sample(part: Part, question: Question, logged: dict[str, Any]) -> Sample:
    answer = part.protocol.answer(part.task, question, logged)
    correct = answer["parsed"] == question["gold"]
    if correct != bool(logged["acc"]):
        raise RuntimeError(
            f"task {part.task.name}, item {question['index']}: lm-eval scores {logged['acc']}, we {correct}"
        )
    asked = {"index": question["index"], "prompt": question["prompt"]}
    return asked | answer | {"gold": question["gold"], "correct": correct}


def _row(part: Part, samples: list[Sample], items: bool) -> dict[str, Any]:
    """items: the likelihoods of single items too; choosing on validation needs their means alone."""
    n = len(samples)
    accuracy = sum(sample["correct"] for sample in samples) / n
    golds = [sample["gold"] for sample in samples]
    row = {
        "task": part.task.name,
        "protocol": part.protocol.name,
        "metric": "accuracy",
        "value": accuracy,
        "stderr": (accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else None,
        "n": n,
        "n_unparsed": sum(sample["parsed"] is None for sample in samples) if part.protocol.generates else None,
        "chance": sum(1 / len(question["options"]) for question in part.questions) / n,
        "majority": max(golds.count(gold) for gold in set(golds)) / n,
        "prompt_sha256": part.prompt_sha256,
        "correct": "".join(str(int(sample["correct"])) for sample in samples),
    }
    if not part.protocol.generates:
        row |= nll.columns(samples, [question.get("fact") for question in part.questions], items)
    return row | part.protocol.more(part.task, samples)
