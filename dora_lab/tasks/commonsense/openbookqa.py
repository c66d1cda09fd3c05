"""OpenBookQA: a science question that needs a fact from the book; items offer four answers."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="openbookqa",
    column="OBQA",
    position=7,
    labels=("answer1", "answer2", "answer3", "answer4", "answer5"),
    chance=1 / 4,
    builtin="openbookqa",
)
