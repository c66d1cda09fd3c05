"""ARC challenge: the harder science questions; items offer three to five answers, mostly four."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="ARC-Challenge",
    column="ARC-c",
    position=6,
    labels=("answer1", "answer2", "answer3", "answer4", "answer5"),
    chance=1 / 4,
    builtin="arc_challenge",
)
