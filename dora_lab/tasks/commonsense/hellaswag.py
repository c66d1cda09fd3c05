"""HellaSwag: which ending continues a text."""

from dora_lab.tasks.task import Task

TASK = Task(
    name="hellaswag",
    column="HellaSwag",
    position=3,
    labels=("ending1", "ending2", "ending3", "ending4"),
    chance=1 / 4,
    builtin="hellaswag",
)
