"""The commonsense protocol as task definitions for lm-eval, usable without this package: `FOLDER` is all they need.

    lm_eval run --model hf --model_args pretrained=MODEL,dtype=float16 --batch_size 8 \\
        --include_path "$(python -c 'from dora_lab.tasks.commonsense.lm_eval import FOLDER; print(FOLDER)')" \\
        --tasks dora_commonsense --metadata '{"data_dir": "LLM-Adapters/dataset"}'

`dora_commonsense` has the published prompt, `dora_commonsense_clean` the one whose training and evaluation prompts are
the same; both are groups of the paper's eight tasks (`dora_boolq`, ...; `dora_boolq_clean`, ...) with its average, over
tasks with the same weight. Metrics: exact_match, and unparsed, the share of texts without an answer (scored wrong).
lm-eval itself shortens prompts that do not fit into a model, without a word: `dora_lab.evaluation` refuses them.
The definitions of tasks and groups follow from the `Task` values: `write` makes them.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
