"""Protocol "builtin": lm-eval's own tasks on the data sets that ours were made of.

They ask otherwise than the paper: lm-eval's prompts (BoolQ with its passage), its items from the hub, the likelihood of
the answers' texts instead of generated ones. So they say what a model knows beside its format; their numbers never
share a column with the paper's. Which task of ours is which of lm-eval's: `Task.builtin`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from datasets import config as cached
from lm_eval.tasks import TaskManager

from dora_lab.evaluation.protocols.protocol import Item, Protocol, Question, Sample
from dora_lab.io.errors import LoadError
from dora_lab.spec import Spec
from dora_lab.tasks import ItemError, Task
from dora_lab.tasks.limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Builtin(Protocol):
    name = "builtin"

    def ready(self, task: Task) -> None:
        _load(task)

    def questions(self, spec: Spec, task: Task, items: Sequence[Item]) -> list[Question]:
        """Of items of lm-eval's own, the first `data.test_items`; `items` is not looked at.

        `requests` are the pairs (context, continuation) whose likelihoods are compared; where contexts differ
        (WinoGrande puts the answers into them), the prompt is all of them. `gold` is the right one's position.
        """
        theirs = _load(task)
        # lm-eval builds them again when it evaluates: its instances keep responses, so a second use needs fresh ones
        theirs.build_all_requests(limit=spec.data.test_items)
        asked: dict[int, list[tuple[str, str]]] = {}
        docs: dict[int, Any] = {}
        for instance in theirs.instances:
            asked.setdefault(instance.doc_id, []).append(instance.args)
            docs[instance.doc_id] = instance.doc
        return [_question(theirs, index, docs[index], asked[index]) for index in sorted(asked)]

    def check(
        self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, limits: Limits
    ) -> None:
        for question in questions:
            if problem := _unfit(question["requests"], tokenizer, limits):
                raise ItemError(
                    f"lm-eval's task for {task.name}, item {question['index']}: {problem}; leave protocol builtin out "
                    "or use another model"
                )

    def lm_eval_task(
        self, spec: Spec, task: Task, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
    ) -> Any:
        return _load(task)

    def answer(self, task: Task, question: Question, logged: dict[str, Any]) -> dict[str, Any]:
        """Likelihoods in nats and the position of the highest, the options' texts, and whether the likeliest per
        character is the right one (None where lm-eval does not score that)."""
        output = [float(response[0]) for response in logged["filtered_resps"]]
        return {
            "output": output,
            "parsed": max(range(len(output)), key=output.__getitem__),
            "options": question["options"],
            "correct_norm": None if "acc_norm" not in logged else bool(logged["acc_norm"]),
        }

    def more(self, task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
        """lm-eval's names and versions, the data's commit, accuracy by likelihood per character."""
        theirs = _load(task)
        split = next(iter(theirs.dataset.values()))
        commit = re.search(r"/([0-9a-f]{40})/", split.cache_files[0]["filename"]) if split.cache_files else None
        normed = [sample["correct_norm"] for sample in samples]
        return {
            "lm_eval_task": task.builtin,
            "lm_eval_version": theirs.VERSION,
            "dataset": theirs.DATASET_PATH,
            "dataset_revision": commit and commit.group(1),
            "accuracy_norm": None if None in normed else sum(normed) / len(normed),
        }


@cache
def _load(task: Task) -> Any:
    """lm-eval's task (an lm-eval object, data loaded) for one of ours.

    Raises LoadError for a task that lm-eval has not, and for data that cannot be had, with what to do.
    """
    name = task.builtin
    if name is None:
        raise LoadError(
            f"task '{task.name}' has no `builtin` in its file: the name of lm-eval's task on its data; set it"
        )
    try:
        return cast(Any, _manager().load([name]))["tasks"][name]
    except Exception as error:
        entry = _manager().task_index.get(name)
        if entry is None:
            raise LoadError(f"lm-eval has no task '{name}', which task '{task.name}' names as its `builtin`") from None
        asked = [value for key in ("dataset_path", "dataset_name") if (value := (entry.cfg or {}).get(key))]
        reason = str(error).strip().partition("\n")[0]
        raise LoadError(
            f"lm-eval's task '{name}' reads {asked[0]} from the hub; it could not be loaded ({type(error).__name__}: "
            f'{reason}); where there is a network, `python -c "from datasets import load_dataset; '
            f'load_dataset{tuple(asked) if len(asked) > 1 else f"({asked[0]!r})"}"`, then bring the folder '
            f"{asked[0].replace('/', '___')} of the cache to {cached.HF_DATASETS_CACHE}"
        ) from None


def _unfit(requests: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, limits: Limits) -> str | None:
    """Why lm-eval could not score the requests of a question, or None."""
    for context, continuation in requests:
        # as `TemplateLM._encode_pair`: the blanks at the context's end go to the continuation, and its tokens are those
        # of the whole beyond as many as the context has alone; tokens that merge over the end may leave none
        whole = cast("list[int]", tokenizer(context + continuation)["input_ids"])
        alone = cast("list[int]", tokenizer(context.rstrip())["input_ids"])
        if limits.exceeded(len(whole)):
            return f"a request of {len(whole)} tokens exceeds the model's {limits.positions} positions"
        if (foreign := limits.foreign(whole)) is not None:
            return f"token {foreign} has no embedding, the model has {limits.rows}"
        if len(whole) <= len(alone):
            return f"the tokenizer does not cut before the answer {continuation!r}"
    return None


@cache
def _manager() -> TaskManager:
    return TaskManager()  # reads the index of all tasks, some seconds


def _question(theirs: Any, index: int, doc: Any, requests: list[tuple[str, str]]) -> Question:
    options = list(theirs.doc_to_choice(doc))
    gold = theirs.doc_to_text(doc) if theirs.multiple_input else theirs.doc_to_target(doc)
    contexts = list(dict.fromkeys(context for context, _ in requests))
    return {
        "index": index,
        "prompt": "\n".join(contexts),
        "requests": requests,
        "options": options,
        "gold": options.index(gold) if isinstance(gold, str) else int(gold),
    }
