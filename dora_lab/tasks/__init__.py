"""What a model is asked: the tasks, their prompts, and where their items come from. How it answers: `evaluation`.

A file ``<family>/<name>.py`` below this folder that defines ``TASK = Task(...)`` is a task, found by its name (one with
``TASKS`` is several that share what they are read with); nothing else has to be edited. Standard library only.
"""

from __future__ import annotations

import math
import pkgutil
from functools import cache
from importlib import import_module

from dora_lab.spec import did_you_mean
from dora_lab.tasks.items import ItemError, check_items, read_items
from dora_lab.tasks.prompts import TEMPLATES, prompt, train_prefix, train_text
from dora_lab.tasks.task import Task

__all__ = [
    "TEMPLATES",
    "ItemError",
    "Task",
    "all_tasks",
    "check_items",
    "family",
    "load_task",
    "prompt",
    "read_items",
    "table_1",
    "train_prefix",
    "train_text",
]


@cache
def all_tasks() -> tuple[Task, ...]:
    """Every task of every family: those of the paper's table 1 in its order, then the others by name."""
    found = [task for folder in pkgutil.iter_modules(__path__) if folder.ispkg for task in family(folder.name)]
    return tuple(sorted(found, key=_order))


@cache
def family(name: str) -> tuple[Task, ...]:
    """The tasks of one family ("commonsense"), in the same order."""
    package = import_module(f"{__name__}.{name}")
    # not the packages below it: what a family has beside its tasks may need more than the standard library
    files = [file.name for file in pkgutil.iter_modules(package.__path__) if not file.ispkg]
    modules = [import_module(f"{package.__name__}.{file}") for file in files]
    found = [module.TASK for module in modules if hasattr(module, "TASK")]
    found += [task for module in modules for task in getattr(module, "TASKS", ())]
    return tuple(sorted(found, key=_order))


def table_1() -> tuple[Task, ...]:
    """The tasks of the paper's table 1, in its order: those that its average is over."""
    return tuple(task for task in all_tasks() if task.position is not None)


def _order(task: Task) -> tuple[float, str]:
    return math.inf if task.position is None else task.position, task.name


def load_task(name: str) -> Task:
    """The task of that name ("boolq", "ARC-Easy", ...); raises ValueError listing the names there are."""
    for task in all_tasks():
        if task.name == name:
            return task
    raise ValueError(f"unknown task '{name}'; {did_you_mean(name, [task.name for task in all_tasks()])}")
