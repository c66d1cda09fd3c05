"""Writes the definitions here that follow from the `Task` values: `make lm-eval-tasks`, after a task was added.

They lie in files all the same, so that lm-eval can use this folder without the package.
"""

from __future__ import annotations

from dora_lab.tasks import family, table_1
from dora_lab.tasks.commonsense.lm_eval import FOLDER
from dora_lab.tasks.task import RESPONSE

TEMPLATES = {"published": "", "clean": "_clean"}  # the file with what a template's tasks share: ending of their names
TASK = r"""include: _{template}.yaml
task: {name}
dataset_kwargs:
  folder: {folder}
  labels: [{labels}]
filter_list:
  - name: first
    filter:
      # the first label after the last "{response}" that the text may hold; case-sensitive
      - function: regex
        regex_pattern: '({pattern})(?![\s\S]*{response})'
        group_select: 0
        fallback: ""
      - function: take_first
"""
GROUP = """group: dora_commonsense{suffix}
task:
{members}
aggregate_metric_list:
  - metric: exact_match
    aggregation: mean
    weight_by_size: false  # the paper's average
    filter_list: first
  - metric: unparsed
    aggregation: mean
    weight_by_size: false
    filter_list: first
metadata:
  version: 1.0
"""


def lm_eval_name(task: str, suffix: str = "") -> str:
    """lm-eval's name of one of our tasks."""
    return f"dora_{task.lower().replace('-', '_')}{suffix}"


def definitions() -> dict[str, str]:
    """File name to text: a task definition per task and template, a group of the paper's eight per template."""
    files = {}
    for template, suffix in TEMPLATES.items():
        for task in family("commonsense"):
            files[f"{lm_eval_name(task.name, suffix)}.yaml"] = TASK.format(
                template=template,
                name=lm_eval_name(task.name, suffix),
                folder=task.folder,
                labels=", ".join(f"'{label}'" for label in task.labels),  # quoted: true is no word in YAML
                pattern=task.pattern.replace("'", "''"),  # the quotation mark of this kind of YAML text
                response=RESPONSE,
            )
        members = "\n".join(f"  - {lm_eval_name(task.name, suffix)}" for task in table_1())
        files[f"dora_commonsense{suffix}.yaml"] = GROUP.format(suffix=suffix, members=members)
    return files


if __name__ == "__main__":
    for file, text in definitions().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
