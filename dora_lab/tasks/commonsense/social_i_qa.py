"""SIQA: what people do, want or feel in a social situation; items offer three answers."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="social_i_qa",
    column="SIQA",
    position=2,
    labels=("answer1", "answer2", "answer3", "answer4", "answer5"),
    chance=1 / 3,
    builtin="social_iqa",
)
