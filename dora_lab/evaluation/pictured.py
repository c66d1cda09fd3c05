"""Scores of a model that sees pictures: its answers are written (or, with NLVR2, two logits compared) and given to the
metrics of their task, item by item. Nothing of it remains in the model.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import TYPE_CHECKING, Any

from dora_lab.evaluation.bounds import bounds
from dora_lab.evaluation.lm_eval_model import quiet, undisturbed
from dora_lab.evaluation.rows import Progress, Sample, Tick, through
from dora_lab.forms import vl_bart
from dora_lab.forms.form import Encoded
from dora_lab.forms.vl_bart import PicturedExample, VLBartForm
from dora_lab.metrics import METRICS, ScoreError, score
from dora_lab.runs.directory import RunDir
from dora_lab.runs.item_values import pack
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError, Task, load_task
from dora_lab.tasks.limits import limits
from dora_lab.tasks.pictures import Pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = ("true", "false")  # whose logits NLVR2 compares
BY_LOGITS = "nlvr2"  # the metric that reads logits, not texts
GRADED_BY = ("answer", "answers", "labels", "references", "statement")  # fields of an item that metrics read


@dataclass(frozen=True)
class Part:
    """One row of the record to be: a task."""

    task: Task
    items: list[dict[str, Any]]
    encoded: Encoded
    prompts: list[str]

    @property
    def examples(self) -> list[PicturedExample]:
        return self.encoded.examples

    @property
    def identity(self) -> dict[str, Any]:
        """Fields of its row that say what was asked; the hash is of all prompts and the names of their pictures."""
        pairs = zip(self.prompts, self.items, strict=True)
        shown = ["\0".join([text, *map("/".join, item["pictures"])]) for text, item in pairs]
        asked = hashlib.sha256("\0\0".join(shown).encode()).hexdigest()
        return {"task": self.task.name, "protocol": "generate", "n": len(self.items), "prompt_sha256": asked}

    def batches(self, size: int) -> int:
        return math.ceil(len(self.items) / size)


def evaluate(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: dict[str, list[dict[str, Any]]],
    pictures: Pictures,
    run: RunDir,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Score `model` on `items` (task name to items); returns each task's value.

    Appends to the stream eval of `run` one row per task: `metric` ("accuracy", a fraction; "cider_d", in [0, 10]), its
    `value` by the first `rules` of the task and what the others say, its standard error over items, n, n_unparsed (no
    answer could be read), n_shortened (texts that lost their ends to a cutoff) and of these n_questions_cut (words of
    their question, too), chance, of the embedded world `floor` and `ceiling` (see `bounds`), the hash of what was
    asked, `correct` where every item is right or wrong, and answer_nll, -log p per token of the best answer in nats;
    with test items the values of single ones. Writes samples for re-grading. Raises ItemError as `prepare`, Stopped if
    `stop` is set.
    """
    form = VLBartForm.of(spec, model, tokenizer, pictures)
    parts = prepare(spec, model, tokenizer, items, pictures)

    def answered(part: Part, tick: Tick) -> tuple[dict[str, Any], list[Sample]]:
        outputs, nlls = _answers(spec, model, tokenizer, form, part, tick)
        samples = [
            {"index": index, "id": item["id"], "prompt": text, "pictures": item["pictures"], "output": output}
            | {name: item[name] for name in GRADED_BY if name in item}
            for index, (item, text, output) in enumerate(zip(part.items, part.prompts, outputs, strict=True))
        ]
        known = bounds(spec.data.name, part.task, spec.evaluation.split, part.items)
        return _row(part, outputs, nlls, spec.evaluation.split == "test") | known, samples

    rows = through(parts, answered, run, spec.evaluation.batch_size, stop, progress)
    return {row["task"]: row["value"] for row in rows}


def prepare(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: dict[str, list[dict[str, Any]]],
    pictures: Pictures,
) -> list[Part]:
    """What `evaluate` will ask, task by task.

    Raises ItemError for what it could not ask, the model not take or a metric not score: to be called before a
    training, too.
    """
    form, most = VLBartForm.of(spec, model, tokenizer, pictures), limits(model)
    if most.exceeded(spec.evaluation.max_new_tokens + 1):
        raise ItemError(
            f"evaluation.max_new_tokens = {spec.evaluation.max_new_tokens}: the model has {most.positions} positions, "
            "one of them for the begin of an answer; lower it"
        )
    parts = []
    for name, pool in items.items():
        task = load_task(name)
        if BY_LOGITS in task.metrics and len({vl_bart.first_token(tokenizer, word) for word in WORDS}) < len(WORDS):
            raise ItemError(f"{name}: the tokenizer begins {' and '.join(WORDS)} with the same token; use another base")
        there = {field for item in pool for field in item}
        lacking = [field for metric in task.metrics for field in METRICS[metric][0] if field not in there]
        if lacking and spec.evaluation.split != "test":
            raise ItemError(
                f"{name}: its {spec.evaluation.split} items are for learning and have no {lacking[0]} to be scored by; "
                "leave it out of data.tasks, or set evaluation.split to test"
            )
        for metric in task.metrics:  # as if nothing were answered: what is wrong with an item is told now
            silent = {item["id"]: dict.fromkeys(WORDS, 0.0) if metric == BY_LOGITS else "" for item in pool}
            try:
                score(metric, pool, silent, f"{name}, {spec.evaluation.split}")
            except ScoreError as error:
                raise ItemError(str(error)) from None
        encoded = form.encode({name: pool}, spec.data, tokenizer, most)
        prompts = [vl_bart.prompt(task, spec.data.template, item) for item in pool]
        parts.append(Part(task, pool, encoded, prompts))
    return parts


def _answers(
    spec: Spec, model: Any, tokenizer: Any, form: VLBartForm, part: Part, tick: Callable[[], None]
) -> tuple[list[Any], list[float]]:
    """Of each item what the model said, and -log p per token of its best answer."""
    outputs: list[Any] = []
    nlls: list[float] = []
    how = vl_bart.settings(spec, part.task.name, form, tokenizer)
    with undisturbed(model, tokenizer), quiet():
        model.eval()
        for start in range(0, len(part.examples), spec.evaluation.batch_size):
            tick()
            some = part.examples[start : start + spec.evaluation.batch_size]
            if BY_LOGITS in part.task.metrics:
                outputs += vl_bart.logits(model, form, tokenizer, WORDS, some)
            else:
                outputs += vl_bart.texts(model, form, tokenizer, how, some)
            nlls += vl_bart.nll(model, form, some)
    return outputs, nlls


def _row(part: Part, outputs: Sequence[Any], nlls: Sequence[float], single: bool) -> dict[str, Any]:
    """single: the values of single items, too; choosing on validation needs their means alone."""
    said = {item["id"]: output for item, output in zip(part.items, outputs, strict=True)}
    scores = {metric: score(metric, part.items, said, part.task.name) for metric in part.task.metrics}
    first = scores[part.task.metrics[0]]
    metric, value = next(iter(first.summary.items()))
    n = len(first.values)
    row = {
        **part.identity,
        "metric": metric,
        "value": value,
        "stderr": stdev(first.values) / n**0.5 if n > 1 else None,
        "n_unparsed": first.n_unread,
        "n_shortened": part.encoded.shortened,
        "n_questions_cut": part.encoded.questions_cut,
        "chance": part.task.chance,
        "majority": None,
        "rules": {name: found.summary for name, found in scores.items()},
        "answer_nll": math.fsum(nlls) / n,
    }
    if metric == "accuracy" and {*first.values} <= {0.0, 1.0}:
        row["correct"] = "".join(str(int(right)) for right in first.values)
    if single:
        row["per_item"] = {"score": pack("score", first.values), "answer_nll": pack("answer_nll", nlls)}
    return row
