"""What a protocol is: how a task's items become questions, how lm-eval puts them, and what a model's answer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dora_lab.spec import Spec
from dora_lab.tasks import Task
from dora_lab.tasks.limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, Any]
# at least index, prompt, options (the answers offered) and gold (the right one); fact (what it asks about) where known
Question = dict[str, Any]
Pair = tuple[list[int], list[int]]
Sample = dict[str, Any]  # a question's index, prompt and gold with the model's output, parsed and correct


class Protocol(ABC):
    """One way to ask; scores of two protocols are two measurements and never share a column."""

    name: ClassVar[str]  # in specs and records
    # the output is one text a question, in which an answer may be missing; False: a likelihood for each of its options
    generates: ClassVar[bool] = False

    def ready(self, task: Task) -> None:  # noqa: B027  (most protocols need nothing)
        """Raises LoadError for what an evaluation of `task` needs and this machine does not have."""

    @abstractmethod
    def questions(self, spec: Spec, task: Task, items: Sequence[Item]) -> list[Question]:
        """What the model is asked of `task`, in order; raises ItemError if that is nothing."""

    @abstractmethod
    def check(
        self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, limits: Limits
    ) -> None:
        """Raises ItemError for a question that cannot be put to the model: too long (lm-eval would cut it and go on),
        with tokens that it has no embedding of, or whose answer has no tokens of its own."""

    def cut(self, context: str, continuation: str, tokenizer: PreTrainedTokenizerBase) -> Pair | None:
        """Token ids of a request for a likelihood, those read and those scored; None: as lm-eval itself cuts them."""
        return None

    @abstractmethod
    def lm_eval_task(
        self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
    ) -> Any:
        """The lm-eval task (its object) that asks exactly `questions`, or these first, and has a metric `acc`."""

    @abstractmethod
    def answer(self, task: Task, question: Question, logged: dict[str, Any]) -> dict[str, Any]:
        """`output` and `parsed` (the answer in it, None for none) of an item that lm-eval logged, and what else there
        is to keep in its sample."""

    def more(self, task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
        """Further fields of the record's row."""
        return {}
