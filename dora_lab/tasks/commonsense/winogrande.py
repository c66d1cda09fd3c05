"""WinoGrande: which of two names fills the blank."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="winogrande",
    column="WinoGrande",
    position=4,
    labels=("option1", "option2"),
    chance=1 / 2,
    builtin="winogrande",
)
