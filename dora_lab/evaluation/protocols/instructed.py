"""Our items with the template's prompt: protocols "generate" (the paper's), "loglikelihood" and "cloze".

- generate: greedy or beam search, the first match of the task's pattern is the answer. A text without a match is
  *unparsed*: counted apart, `parsed` null; it still counts as a wrong answer in the accuracy, as in the paper.
- loglikelihood: the most likely of "the correct answer is <label>" over the labels that the item offers, by the tokens
  that training has loss on (all but the end of sequence).
- cloze: the likeliest per token of the options' texts, behind the question alone (`tasks.cloze`).

The lm-eval tasks are configurations built here: no file is looked up and no code is loaded from a folder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import datasets
from lm_eval.tasks import TaskManager

from dora_lab.evaluation.protocols.protocol import Item, Pair, Protocol, Question
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError, Task, prompt
from dora_lab.tasks.limits import Limits
from dora_lab.tasks.tokens import code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "the correct answer is {label}"


class _Instructed(Protocol):
    def questions(self, spec: Spec, task: Task, items: Sequence[Item]) -> list[Question]:
        if not items:
            raise ItemError(f"task {task.name}: no items to evaluate on")
        return [
            {
                "index": index,
                "prompt": prompt(item, spec.data.template),
                "options": item.get("options") or list(task.options(item)),
                "gold": item["answer"],
                **{name: item[name] for name in ("texts", "fact") if name in item},
            }
            for index, item in enumerate(items)
        ]

    def check(
        self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, limits: Limits
    ) -> None:
        room = self._room(spec, task, questions, tokenizer)
        prompts = cast("list[list[int]]", tokenizer([question["prompt"] for question in questions])["input_ids"])
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        if limits.exceeded(len(prompts[longest]) + room):
            raise ItemError(
                f"task {task.name}, item {longest}: a prompt of {len(prompts[longest])} tokens and {room} for the "
                f"answer exceed the model's {limits.positions} positions; leave the item out or use a model with more"
            )
        for index, ids in enumerate(prompts):
            if (foreign := limits.foreign(ids)) is not None:
                raise ItemError(
                    f"task {task.name}, item {index}: token {foreign} ({tokenizer.convert_ids_to_tokens(foreign)!r}) "
                    f"has no embedding, the model has {limits.rows}; give the tokenizer that belongs to the model"
                )

    def lm_eval_task(
        self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
    ) -> Any:
        configuration = {
            "task": task.name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(list(questions))},
            "test_split": "test",
            "num_fewshot": 0,
            "target_delimiter": "",
            "doc_to_text": lambda question: question["prompt"],
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        } | self._asking(spec, task, tokenizer)
        return TaskManager(include_defaults=False).load(cast(Any, [configuration]))["tasks"][task.name]

    @abstractmethod
    def _room(self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens to keep for the answer."""

    @abstractmethod
    def _asking(self, spec: Spec, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The rest of the lm-eval configuration."""


class Generate(_Instructed):
    name = "generate"
    generates = True

    def _room(self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> int:
        return spec.evaluation.max_new_tokens

    def _asking(self, spec: Spec, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        steps = [{"function": "remove_whitespace"}, {"function": "take_first"}]
        return {
            "output_type": "generate_until",
            "doc_to_target": lambda question: question["gold"],
            "generation_kwargs": {
                "until": [],
                "max_gen_toks": spec.evaluation.max_new_tokens,
                "do_sample": False,
                "num_beams": spec.evaluation.num_beams,
                "eos_token_id": tokenizer.eos_token_id,
            },
            "filter_list": [{"name": "first", "filter": steps}],
            # an unparsed text has no answer; lm-eval's regex filter, whose answer is then a text too, is not used
            "process_results": lambda question, outputs: {"acc": float(task.parse(outputs[0]) == question["gold"])},
        }

    def answer(self, task: Task, question: Question, logged: dict[str, Any]) -> dict[str, Any]:
        output = logged["filtered_resps"][0]
        return {"output": output, "parsed": task.parse(output)}


class Loglikelihood(_Instructed):
    name = "loglikelihood"

    def answers(self, question: Question) -> list[str]:
        """What is scored, in the order of the question's options."""
        return [ANSWER.format(label=label) for label in question["options"]]

    def check(
        self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, limits: Limits
    ) -> None:
        super().check(spec, task, questions, tokenizer, limits)
        for question in questions:
            if problem := _unfit(question, self.answers(question), tokenizer):
                raise ItemError(
                    f"task {task.name}, item {question['index']}: {problem}; leave protocol {self.name} out or use a "
                    "model with another tokenizer"
                )

    def cut(self, context: str, continuation: str, tokenizer: PreTrainedTokenizerBase) -> Pair:
        """As training cuts them. lm-eval cuts the prompt by itself, where ":" and the line end may be one token less or
        more than in the whole text: it then reads, and scores, other tokens than were trained."""
        (coded,) = code(tokenizer, [context], [continuation])
        return coded.context, coded.ids[len(coded.context) :]

    def _room(self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> int:
        answers = list(dict.fromkeys(answer for question in questions for answer in self.answers(question)))
        return max(len(ids) for ids in cast("list[list[int]]", tokenizer(answers)["input_ids"]))

    def _asking(self, spec: Spec, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        return {
            "output_type": "multiple_choice",
            "doc_to_choice": self.answers,
            "doc_to_target": lambda question: question["options"].index(question["gold"]),
        }

    def answer(self, task: Task, question: Question, logged: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(question["options"], logged["filtered_resps"], strict=True)
        output = {label: float(response[0]) for label, response in pairs}
        return {"output": output, "parsed": max(output, key=output.__getitem__)}


class Cloze(Loglikelihood):
    """The `output` is a mean over the tokens of a text: else the shortest would win."""

    name = "cloze"

    def answers(self, question: Question) -> list[str]:
        return [f" {text}" for text in question["texts"]]

    def _asking(self, spec: Spec, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        def scored(question: Question, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
            means = _per_token([value for value, _ in results], question["tokens"])
            return {
                "acc": float(
                    max(range(len(means)), key=means.__getitem__) == question["options"].index(question["gold"])
                )
            }

        def counted(rows: datasets.Dataset) -> datasets.Dataset:
            return rows.map(
                lambda question: {
                    "tokens": [
                        len(self.cut(question["prompt"], answer, tokenizer)[1]) for answer in self.answers(question)
                    ]
                }
            )

        return super()._asking(spec, task, tokenizer) | {"process_docs": counted, "process_results": scored}

    def answer(self, task: Task, question: Question, logged: dict[str, Any]) -> dict[str, Any]:
        sums = [float(response[0]) for response in logged["filtered_resps"]]
        output = dict(zip(question["options"], _per_token(sums, logged["doc"]["tokens"]), strict=True))
        return {"output": output, "parsed": max(output, key=output.__getitem__), "tokens": logged["doc"]["tokens"]}


def _per_token(sums: Sequence[float], tokens: Sequence[int]) -> list[float]:
    return [value / count for value, count in zip(sums, tokens, strict=True)]


def _unfit(question: Question, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why the likelihoods of a question's answers could not be compared, or None."""
    options = question["options"]
    coded = code(tokenizer, [question["prompt"]] * len(options), answers)
    for label, text in zip(options, coded, strict=True):
        if text.joined.strip() or not text.context or not text.answer:
            return (
                f"the tokenizer does not cut between the prompt and the answer '{label}' ({text.joined!r} joins them)"
            )
        if text.context != coded[0].context:
            return f"the tokenizer cuts the prompt otherwise before '{label}' than before '{options[0]}'"
    if len({tuple(text.ids) for text in coded}) < len(coded):
        return f"the tokenizer makes the same tokens of two of its answers ({', '.join(options)})"
    return None
