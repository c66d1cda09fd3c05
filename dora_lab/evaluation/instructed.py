"""Scores of a LLaVA on its benchmarks: answers are written, greedily, and given to the metrics of their task.

Beside them stand likelihoods: of the right answer, and of it among the options where an item has such. Answers whose
right ones are on a server go into a file for it. Nothing of it remains in the model.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any

from dora_lab.evaluation import submissions
from dora_lab.evaluation.bounds import bounds
from dora_lab.evaluation.lm_eval_model import quiet, undisturbed
from dora_lab.evaluation.rows import Progress, Sample, Tick, through
from dora_lab.forms.llava import Example, Llava
from dora_lab.io.limits import task_sizes
from dora_lab.metrics import ScoreError, score
from dora_lab.runs.directory import RunDir
from dora_lab.runs.item_values import pack
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError, Task, load_task
from dora_lab.tasks.limits import Limits, limits
from dora_lab.tasks.visual_instruction.benchmarks import gold, right_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Item = dict[str, Any]
SERVER = "on its server"  # the metric of a task whose right answers are not given away
FIELDS = ("answer", "answers", "category", "letters", "options", "index")  # of an item, what its metric reads


@dataclass(frozen=True)
class Part:
    """One row of the record to be: a task."""

    task: Task
    items: list[Item]
    options: list[list[list[Example]]]  # of each item the answers whose likelihood is asked for, the right one first,
    # and each of them in all its writings
    new_tokens: int
    submitted: bool

    @property
    def identity(self) -> dict[str, Any]:
        """Fields of its row that say what was asked; the hash is of all prompts and of the images' names or bytes."""
        asked = hashlib.sha256()
        for item in self.items:
            image = item["image"]
            name = image if isinstance(image, bytes) else str(image and image.name).encode()
            asked.update(item["text"].encode() + b"\0" + name + b"\0\0")
        shared = {"task": self.task.name, "protocol": "generate", "n": len(self.items)}
        return {**shared, "prompt_sha256": asked.hexdigest()}

    def batches(self, size: int) -> int:
        asked = sum(len(writings) for some in self.options for writings in some)
        return math.ceil(len(self.items) / size) + math.ceil(asked / size)


def evaluate(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: ProcessorMixin,
    items: dict[str, list[Item]],
    home: Path,
    run: RunDir,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> dict[str, float | None]:
    """Score `model` on `items` (task name to items); returns each task's value, None where a server has the answers.

    tokenizer: the model's processor. home: the folder of the benchmarks. Appends to the stream eval of `run` one row
    per task: `metric` and `value`, its headline, a fraction; what all numbers of its rule say (`rules`), the standard
    error over items where the value is their mean, n, n_unparsed, the hash of what was asked, and over the items in
    nats: answer_nll, -log p per token of the right answer (of ten people's, the most frequent; with a small first
    letter or a capital, by the tokens of the shorter), and choice_nll, -log of what the right option has of the
    likelihood of all. With these the values of single items, and of the embedded world `floor` and `ceiling` (see
    `bounds`). Writes samples, and for a
    task that a server scores its file, if all of its questions were asked. Raises ItemError as `prepare`, Stopped if
    `stop` is set.
    """
    form = Llava(tokenizer)
    parts = prepare(spec, model, tokenizer, items, home)

    def answered(part: Part, tick: Tick) -> tuple[dict[str, Any], list[Sample]]:
        outputs, nlls = _answers(spec, model, form, part, tick)
        said = {item["id"]: output for item, output in zip(part.items, outputs, strict=True)}
        if part.submitted:
            submissions.write(part.task.name, part.items, said, home, run.samples)
        samples = [
            {"index": index, "id": item["id"], "prompt": item["text"], "image": item["image"] is not None}
            | {"file": item["image"].name if isinstance(item["image"], Path) else None, "output": said[item["id"]]}
            | {name: item[name] for name in FIELDS if name in item}
            for index, item in enumerate(part.items)
        ]
        known = bounds(spec.data.name, part.task, spec.evaluation.split, part.items)
        return _row(part, said, nlls) | known, samples

    rows = through(parts, answered, run, spec.evaluation.batch_size, stop, progress)
    return {row["task"]: row["value"] for row in rows}


def prepare(
    spec: Spec, model: PreTrainedModel, tokenizer: ProcessorMixin, items: dict[str, list[Item]], home: Path
) -> list[Part]:
    """What `evaluate` will ask, task by task.

    Raises ItemError for what it could not ask, the model not take, a metric not score or a server's file not hold: to
    be called before a training, too.
    """
    form, most = Llava(tokenizer), limits(model)
    longer = task_sizes(spec.evaluation.task_new_tokens)
    if unknown := [name for name in longer if name not in items]:
        raise ItemError(f"evaluation.task_new_tokens: '{unknown[0]}' is not among data.tasks; take it out")
    parts = []
    for name, pool in items.items():
        task, new_tokens = load_task(name), longer.get(name, spec.evaluation.max_new_tokens)
        try:
            for metric in task.metrics:  # as if nothing were answered: what is wrong with an item is told now
                score(metric, gold(pool), {item["id"]: "" for item in pool}, name)
            submitted = spec.data.test_items is None and submissions.ready(name, pool, home)
        except ScoreError as error:
            raise ItemError(str(error)) from None
        first: dict[str, Item] = {}
        for item in pool:
            if first.setdefault(item["id"], item) is not item:  # one answer would stand for both
                there = f"that of {first[item['id']]['where']}, too"
                raise ItemError(f"{item['where']}: its id '{item['id']}' is {there}; remove one of them")
            _refuse_long(form.question(item), new_tokens, most)
        parts.append(Part(task, pool, _options(form, spec, task, pool, most), new_tokens, submitted))
    return parts


def _refuse_long(prompt: Example, new_tokens: int, most: Limits) -> None:
    if most.exceeded(len(prompt.ids) + new_tokens):
        raise ItemError(
            f"{prompt.where}: a prompt of {len(prompt.ids)} tokens and {new_tokens} new ones exceed the model's "
            f"{most.positions} positions; lower evaluation.max_new_tokens or evaluation.task_new_tokens"
        )


def _options(form: Llava, spec: Spec, task: Task, pool: list[Item], most: Limits) -> list[list[list[Example]]]:
    """Of each item the answers whose likelihood is asked for, the right one first; none where it is not known."""
    if not task.metrics:
        return [[] for _ in pool]
    whole = replace(spec.data, cutoff=most.positions or 1 << 30)  # a prompt is never cut
    asked = [_answers_of(item) for item in pool]
    turned = [
        {**item, "turns": [(item["text"], writing)]}
        for item, answers in zip(pool, asked, strict=True)
        for writings in answers
        for writing in writings
    ]
    examples = iter(form.encode({task.name: turned}, whole, None, most).examples)
    return [[[next(examples) for _ in writings] for writings in answers] for answers in asked]


def _answers_of(item: Item) -> list[list[str]]:
    """The right answer, then the others that the item offers: letters; of POPE Yes and No, as LLaVA is trained.

    What is offered is written in one way. Where nothing is, files have "yes" and what LLaVA is trained on "Yes": the
    metrics do not tell them apart, so that both are asked for.
    """
    right = right_answer(item)
    offered = ["Yes", "No"] if "category" in item else [*(item.get("letters") or item.get("options") or ())]
    if not offered:
        return [[*dict.fromkeys([right, right[:1].upper() + right[1:], right[:1].lower() + right[1:]])]]
    return [[right], *([one] for one in offered if one != right)]


def _answers(
    spec: Spec, model: Any, form: Llava, part: Part, tick: Tick
) -> tuple[list[str], list[list[tuple[float, int]]]]:
    """Of each item what the model said, and (nats, tokens) of each of its options, of whose writings any would do."""
    outputs: list[str] = []
    found: list[tuple[float, int]] = []
    size, every = spec.evaluation.batch_size, [one for some in part.options for writings in some for one in writings]
    with undisturbed(model, form.tokenizer), quiet():
        model.eval()
        for start in range(0, len(part.items), size):
            tick()
            outputs += form.answers(model, part.items[start : start + size], size, part.new_tokens)
        for start in range(0, len(every), size):
            tick()
            found += form.nll(model, every[start : start + size], size)
    nlls = iter(found)
    return outputs, [[_any([next(nlls) for _ in writings]) for writings in some] for some in part.options]


def _row(part: Part, said: dict[str, str], nlls: Sequence[Sequence[tuple[float, int]]]) -> dict[str, Any]:
    told = dict.fromkeys(("value", "stderr", "n_unparsed", "chance", "majority", "answer_nll", "choice_nll"))
    row: dict[str, Any] = {**part.identity, "metric": SERVER, **told, "rules": {}}
    if not part.task.metrics:
        return row
    scores = {metric: score(metric, gold(part.items), said, part.task.name) for metric in part.task.metrics}
    first = scores[part.task.metrics[0]]
    name = part.task.headline or next(iter(first.summary))
    value, n = first.summary[name], len(first.values)
    answer = [nats / tokens for (nats, tokens), *_ in nlls]
    choice = [_choice([nats for nats, _ in some]) for some in nlls if len(some) > 1]
    row |= {
        "metric": name,
        "value": value,
        "n_unparsed": first.n_unread,
        "rules": {metric: found.summary for metric, found in scores.items()},
        "answer_nll": math.fsum(answer) / n,
        "choice_nll": math.fsum(choice) / len(choice) if choice else None,
        "per_item": {"score": pack("score", first.values), "answer_nll": pack("answer_nll", answer)},
    }
    if len(choice) == n:
        row["per_item"]["choice_nll"] = pack("choice_nll", choice)
    if value == math.fsum(first.values) / n and n > 1:
        row["stderr"] = stdev(first.values) / n**0.5
    if name == "accuracy" and {*first.values} <= {0.0, 1.0}:
        row["correct"] = "".join(str(int(right)) for right in first.values)
    return row


def _any(writings: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """(-log of the likelihoods' sum, tokens of the shortest) of the writings of one answer.

    Of the shortest, which is the same whatever model is asked: of the likeliest, one that turns from "unanswerable", of
    five tokens, to "Unanswerable", of two, would have got worse by being right.
    """
    least = min(nats for nats, _ in writings)
    tokens = min(count for _, count in writings)
    return least - math.log(math.fsum(math.exp(least - nats) for nats, _ in writings)), tokens


def _choice(nats: Sequence[float]) -> float:
    """-log of what the first has of the likelihood of all, by their -log p."""
    least = min(nats)
    return nats[0] - least + math.log(math.fsum(math.exp(least - one) for one in nats))
