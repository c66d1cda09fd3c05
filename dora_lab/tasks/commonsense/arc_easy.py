"""ARC easy: grade-school science questions; items offer three to five answers, mostly four."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="ARC-Easy",
    column="ARC-e",
    position=5,
    labels=("answer1", "answer2", "answer3", "answer4", "answer5"),
    chance=1 / 4,
    builtin="arc_easy",
)
