"""Scores by lm-eval on the model in memory: protocol "generate" (the paper's) and "loglikelihood".

- generate: the template's prompt, greedy or beam search, the first match of the task's pattern is the answer. A text
  without a match is *unparsed*: counted apart, `parsed` null; it still counts as a wrong answer in the accuracy, as in
  the paper.
- loglikelihood: the most likely of "the correct answer is <label>" over the labels that the item offers.
The two are different measurements and never share a column.

Tasks are lm-eval configurations built here from our items: no file is looked up and no code is loaded from a folder.
Nothing of an evaluation remains: the model's mode, its generation settings, the tokenizer and all random states are put
back. lm-eval's answer cache is not used (it does not tell two models apart).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig

from dora_lab.evaluation import builtin
from dora_lab.evaluation.builtin import Question
from dora_lab.io.atomic import write_text
from dora_lab.runs.directory import RunDir
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError, load_task, prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Item = dict[str, Any]
Progress = Callable[[int, int], None]  # batches done, batches in all (estimated)
ANSWER = "the correct answer is {label}"
FILTER = "first"


class Stopped(KeyboardInterrupt):
    """The evaluation was asked to stop; rows of whole tasks are kept, and the next call goes on after them."""


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
    the hash of all prompts, and `correct`, one character 0 or 1 per item in order; writes samples for re-grading.
    The mean is the paper's: over tasks, each with the same weight. Raises ItemError for a prompt that is too long.
    Rows that are there already, of the same questions, are kept: a task is evaluated by itself, so that its numbers do
    not depend on which others were done in one go.
    """
    ours = _questions(spec, items)
    tasks = ours or spec.data.tasks  # with protocol builtin alone, there are no items of ours
    asked = {
        (protocol, task): builtin.questions(task, spec.data.test_items) if protocol == "builtin" else ours[task]
        for protocol in spec.evaluation.protocols
        for task in tasks
    }
    for (protocol, task), questions in asked.items():
        _refuse_too_long(spec, model, tokenizer, task, questions, protocol)
    rows = _kept(run, asked)
    batches = [_batches(spec, protocol, questions) for (protocol, _), questions in asked.items()]
    for place, ((protocol, task), questions) in list(enumerate(asked.items()))[len(rows) :]:

        def tell(done: int, before: int = sum(batches[:place])) -> None:
            if progress:
                progress(before + done, sum(batches))

        with _undisturbed(model, tokenizer), _quiet():
            samples = _run(spec, model, tokenizer, task, questions, protocol, stop, tell)
        row = _row(task, protocol, samples, questions)
        _write_samples(run, row, samples)
        run.append("eval", row)
        rows.append(row)
    return {
        protocol: sum(row["value"] for row in rows if row["protocol"] == protocol) / len(tasks)
        for protocol in spec.evaluation.protocols
    }


def _kept(run: RunDir, asked: dict[tuple[str, str], list[Question]]) -> list[dict[str, Any]]:
    """Rows of an evaluation that was cut short: those of the first of `asked`; none if any is of other questions."""
    rows = read_stream(run.path, "eval")
    fits = len(rows) <= len(asked) and all(
        (row["protocol"], row["task"]) == pair
        and (row["n"], row["prompt_sha256"]) == (len(questions), _prompt_hash(questions))
        for row, (pair, questions) in zip(rows, asked.items(), strict=False)
    )
    if not fits:
        run.cut("eval")
    return rows if fits else []


def _prompt_hash(questions: list[Question]) -> str:
    return hashlib.sha256("\0".join(question["prompt"] for question in questions).encode()).hexdigest()


def _batches(spec: Spec, protocol: str, questions: list[Question]) -> int:
    requests = len(questions) if protocol == "generate" else sum(len(question["options"]) for question in questions)
    return math.ceil(requests / spec.evaluation.batch_size)


def _questions(spec: Spec, items: dict[str, list[Item]]) -> dict[str, list[Question]]:
    """Per task, what lm-eval is given: index, prompt, the answers offered and which of them is right."""
    asked = {}
    for name, pool in items.items():
        task = load_task(name)
        asked[name] = [
            {
                "index": index,
                "prompt": prompt(item, spec.data.template),
                "options": list(task.options(item)),
                "gold": item["answer"],
            }
            for index, item in enumerate(pool)
        ]
        if not asked[name]:
            raise ItemError(f"task {name}: no items to evaluate on")
    return asked


def _refuse_too_long(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    questions: list[Question],
    protocol: str,
) -> None:
    """lm-eval would cut the head off a long prompt and go on."""
    limit = _max_length(model)
    if protocol == "builtin":
        builtin.refuse_too_long(task, questions, tokenizer, limit)
        return
    answers = [ANSWER.format(label=label) for label in load_task(task).labels]
    room = max(len(ids) for ids in tokenizer(answers)["input_ids"])
    room = spec.evaluation.max_new_tokens if protocol == "generate" else room
    prompts = tokenizer([question["prompt"] for question in questions])["input_ids"]
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if len(prompts[longest]) + room > limit:
        raise ItemError(
            f"task {task}, item {longest}: a prompt of {len(prompts[longest])} tokens and {room} for the answer "
            f"exceed the model's {limit} positions; leave the item out or use a model with more"
        )


def _max_length(model: PreTrainedModel) -> int:
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise ValueError(f"{type(model).__name__}: config.max_position_embeddings is {limit!r}; set it")
    return limit


def _run(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    questions: list[Question],
    protocol: str,
    stop: threading.Event | None,
    tell: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Samples: index, prompt, output, parsed, gold, correct."""
    if protocol == "builtin":
        name, task_object = builtin.load_builtin(task)
        wanted: Any = {"tasks": {name: task_object}, "groups": {}, "group_map": {}}
    else:
        name, configuration = task, _configuration(spec, task, questions, protocol, tokenizer)
        wanted = TaskManager(include_defaults=False).load(cast(Any, [configuration]))
    lm = _Model(model, tokenizer, spec.evaluation.batch_size, _batches(spec, protocol, questions), stop, tell)
    # `evaluate`, not `simple_evaluate`: the latter reseeds every generator and collects the machine's environment
    result = evaluator.evaluate(
        lm=lm,
        task_dict=wanted,
        limit=len(questions),  # lm-eval's own tasks would ask all they have
        bootstrap_iters=0,
        log_samples=True,
    )
    logged = sorted(cast(Any, result)["samples"][name], key=lambda entry: entry["doc_id"])
    return [_sample(task, entry, question, protocol) for entry, question in zip(logged, questions, strict=True)]


def _configuration(
    spec: Spec, task: str, questions: list[Question], protocol: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    def dataset(**_: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(questions)}

    parse = load_task(task).parse
    shared = {
        "task": task,
        "custom_dataset": dataset,
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",
        "doc_to_text": lambda question: question["prompt"],
    }
    if protocol == "loglikelihood":
        return shared | {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda question: [ANSWER.format(label=label) for label in question["options"]],
            "doc_to_target": lambda question: question["options"].index(question["gold"]),
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    return shared | {
        "output_type": "generate_until",
        "doc_to_target": lambda question: question["gold"],
        "generation_kwargs": {
            "until": [],
            "max_gen_toks": spec.evaluation.max_new_tokens,
            "do_sample": False,
            "num_beams": spec.evaluation.num_beams,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "filter_list": [{"name": FILTER, "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        # an unparsed text has no answer, so lm-eval's regex filter, whose answer is then a text too, is not used
        "process_results": lambda question, outputs: {"acc": float(parse(outputs[0]) == question["gold"])},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _sample(task: str, entry: dict[str, Any], question: Question, protocol: str) -> dict[str, Any]:
    if protocol == "builtin":
        found = builtin.sample(entry, question)
    else:
        if protocol == "generate":
            output: Any = entry["filtered_resps"][0]
            parsed = load_task(task).parse(output)
        else:
            pairs = zip(question["options"], entry["filtered_resps"], strict=True)
            output = {label: float(response[0]) for label, response in pairs}
            parsed = max(question["options"], key=lambda label: output[label])
        found = {
            "index": question["index"],
            "prompt": question["prompt"],
            "output": output,
            "parsed": parsed,
            "gold": question["gold"],
            "correct": parsed == question["gold"],
        }
    if found["correct"] != bool(entry["acc"]):
        raise RuntimeError(
            f"task {task}, item {question['index']}: lm-eval scores {entry['acc']}, we {found['correct']}"
        )
    return found


def _row(task: str, protocol: str, samples: list[dict[str, Any]], asked: list[Question]) -> dict[str, Any]:
    n = len(samples)
    accuracy = sum(sample["correct"] for sample in samples) / n
    golds = [sample["gold"] for sample in samples]
    return {
        "task": task,
        "protocol": protocol,
        "metric": "accuracy",
        "value": accuracy,
        "stderr": (accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else None,
        "n": n,
        "n_unparsed": sum(sample["parsed"] is None for sample in samples) if protocol == "generate" else None,
        "chance": sum(1 / len(question["options"]) for question in asked) / n,
        "majority": max(golds.count(gold) for gold in set(golds)) / n,
        "prompt_sha256": _prompt_hash(samples),
        "correct": "".join(str(int(sample["correct"])) for sample in samples),
    } | (builtin.about(task, samples) if protocol == "builtin" else {})


def _write_samples(run: RunDir, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    run.samples.mkdir(parents=True, exist_ok=True)
    file = run.samples / f"{row['task']}.{row['protocol']}.jsonl"
    write_text(file, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


# a decorator hides HFLM's type: to type checkers the class is a bare `LM`
class _Model(cast(Any, HFLM)):
    """lm-eval's wrapper, silent, that can be stopped and says how far it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        batches: int,
        stop: threading.Event | None,
        tell: Callable[[int], None],
    ) -> None:
        self._stop, self._tell, self._done, self._batches = stop, tell, 0, batches
        super().__init__(
            pretrained=model,
            tokenizer=cast(Any, tokenizer),
            backend="causal",
            batch_size=batch_size,
            max_length=_max_length(model),
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        self._tick()
        # the end-of-sequence token ends an answer (generate's own test); a text comparison per token is not needed
        return cast(
            torch.Tensor,
            self.model.generate(
                input_ids=context,
                max_length=max_length,
                # what fills an answer that ended early; a padding token that is an ordinary one would be decoded
                pad_token_id=self.tokenizer.eos_token_id,
                use_cache=True,
                **{name: value for name, value in kwargs.items() if name != "temperature"},
            ),
        )

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._tick()
        return super()._model_call(*args, **kwargs)

    def _tick(self) -> None:
        if self._stop is not None and self._stop.is_set():
            raise Stopped("stopped while evaluating")
        self._done += 1
        self._tell(min(self._done, self._batches))


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Put back everything that an evaluation touches."""
    training = {name: module.training for name, module in model.named_modules()}
    settings = model.generation_config
    padding = tokenizer.pad_token, tokenizer.padding_side
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    # a checkpoint's own settings (sampling, temperature) would fill whatever a call leaves open
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
        model.generation_config = settings
        tokenizer.pad_token, tokenizer.padding_side = padding
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets talk a lot while doing what was asked."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.api.task")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
