"""PIQA: which of two solutions reaches a physical goal."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="piqa",
    column="PIQA",
    position=1,
    labels=("solution1", "solution2"),
    chance=1 / 2,
    builtin="piqa",
)
