"""BoolQ: a yes/no question, asked without its passage."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="boolq",
    column="BoolQ",
    position=0,
    labels=("true", "false"),
    chance=1 / 2,
    builtin="boolq",
)
