"""The commonsense tasks: one file each, found by name; prompts and item files in the LLM-Adapters format.

A file in this folder that defines ``TASK = Task(...)`` is a task; nothing else has to be edited. Standard library only.
"""

from __future__ import annotations

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
    "load_task",
    "prompt",
    "read_items",
    "train_prefix",
    "train_text",
]


@cache
def all_tasks() -> tuple[Task, ...]:
    """Every task of this folder, in the order of the paper's table 1."""
    modules = (import_module(found.name) for found in pkgutil.walk_packages(__path__, f"{__name__}."))
    found = [module.TASK for module in modules if hasattr(module, "TASK")]
    return tuple(sorted(found, key=lambda task: task.position))


def load_task(name: str) -> Task:
    """The task of that name ("boolq", "ARC-Easy", ...); raises ValueError listing the names there are."""
    for task in all_tasks():
        if task.name == name:
            return task
    raise ValueError(f"unknown task '{name}'; {did_you_mean(name, [task.name for task in all_tasks()])}")
