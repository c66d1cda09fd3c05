"""Protocol "builtin": lm-eval's own tasks on the data sets that ours were made of.

They ask otherwise than the paper: lm-eval's prompts (BoolQ with its passage), its items from the hub, the likelihood of
the answers' texts instead of generated ones. So they say what a model knows beside its format; their numbers never
share a column with the paper's. Which task of ours is which of lm-eval's: `Task.builtin`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from datasets import config as cached
from lm_eval.tasks import TaskManager

from dora_lab.io.errors import LoadError
from dora_lab.tasks import ItemError, load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Question = dict[str, Any]


@cache
def load_builtin(task: str) -> tuple[str, Any]:
    """lm-eval's name and its task (an lm-eval object, data loaded) for one of our tasks.

    Raises LoadError for a task that lm-eval has not, and for data that cannot be had, with what to do.
    """
    name = load_task(task).builtin
    if name is None:
        raise LoadError(f"task '{task}' has no `builtin` in its file: the name of lm-eval's task on its data; set it")
    try:
        return name, cast(Any, _manager().load([name]))["tasks"][name]
    except Exception as error:
        entry = _manager().task_index.get(name)
        if entry is None:
            raise LoadError(f"lm-eval has no task '{name}', which task '{task}' names as its `builtin`") from None
        asked = [value for key in ("dataset_path", "dataset_name") if (value := (entry.cfg or {}).get(key))]
        reason = str(error).strip().partition("\n")[0]
        raise LoadError(
            f"lm-eval's task '{name}' reads {asked[0]} from the hub; it could not be loaded ({type(error).__name__}: "
            f'{reason}); where there is a network, `python -c "from datasets import load_dataset; '
            f'load_dataset{tuple(asked) if len(asked) > 1 else f"({asked[0]!r})"}"`, then bring the folder '
            f"{asked[0].replace('/', '___')} of the cache to {cached.HF_DATASETS_CACHE}"
        ) from None


@cache
def _manager() -> TaskManager:
    return TaskManager()  # reads the index of all tasks, some seconds


def questions(task: str, limit: int | None) -> list[Question]:
    """What lm-eval asks: index, prompt, the texts of the answers and the position of the right one.

    `requests` are the pairs (context, continuation) whose likelihoods are compared; where contexts differ (WinoGrande
    puts the answers into them), the prompt is all of them.
    """
    _, builtin = load_builtin(task)
    builtin.build_all_requests(limit=limit)
    asked: dict[int, list[tuple[str, str]]] = {}
    docs: dict[int, Any] = {}
    for instance in builtin.instances:
        asked.setdefault(instance.doc_id, []).append(instance.args)
        docs[instance.doc_id] = instance.doc
    return [_question(builtin, index, docs[index], asked[index]) for index in sorted(asked)]


def _question(task: Any, index: int, doc: Any, requests: list[tuple[str, str]]) -> Question:
    options = list(task.doc_to_choice(doc))
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    contexts = list(dict.fromkeys(context for context, _ in requests))
    return {
        "index": index,
        "prompt": "\n".join(contexts),
        "requests": requests,
        "options": options,
        "gold": options.index(gold) if isinstance(gold, str) else int(gold),
    }


def refuse_too_long(task: str, asked: list[Question], tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
    """Raises ItemError for a request of more tokens than `limit`: lm-eval would cut its head off and go on."""
    for question in asked:
        texts = [context + continuation for context, continuation in question["requests"]]
        longest = max(len(ids) for ids in cast("list[list[int]]", tokenizer(texts)["input_ids"]))
        if longest > limit:
            raise ItemError(
                f"lm-eval's task for {task}, item {question['index']}: a request of {longest} tokens exceeds the "
                f"model's {limit} positions; leave protocol builtin out or use a model with more"
            )


def sample(entry: dict[str, Any], question: Question) -> dict[str, Any]:
    """A sample of `evaluate` from an item that lm-eval logged: likelihoods in nats, chosen and right position."""
    output = [float(response[0]) for response in entry["filtered_resps"]]
    parsed = max(range(len(output)), key=output.__getitem__)
    kept = {name: question[name] for name in ("index", "prompt", "options", "gold")}
    return kept | {
        "output": output,
        "parsed": parsed,
        "correct": parsed == question["gold"],
        "correct_norm": None if "acc_norm" not in entry else bool(entry["acc_norm"]),
    }


def about(task: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """More for the row: lm-eval's names and versions, the data's commit, accuracy by likelihood per character."""
    name, builtin = load_builtin(task)
    split = next(iter(builtin.dataset.values()))
    commit = re.search(r"/([0-9a-f]{40})/", split.cache_files[0]["filename"]) if split.cache_files else None
    normed = [found["correct_norm"] for found in samples]
    return {
        "lm_eval_task": name,
        "lm_eval_version": builtin.VERSION,
        "dataset": builtin.DATASET_PATH,
        "dataset_revision": commit and commit.group(1),
        "accuracy_norm": None if None in normed else sum(normed) / len(normed),
    }
