"""Scores of what a model said about pictures: one for each item first, what a table prints from them. No torch.

Each metric is a published script's rule to the letter, its quirks in the docstring, and where a quirk moves a number
the corrected rule stands beside it under a name of its own ("vqa_released", "vqa_both"). What an item is asked, and
where it comes from, is `tasks`; how a model answers is `evaluation`.
"""

from dora_lab.metrics.check import ScoreError
from dora_lab.metrics.score import METRICS, Scores, score

__all__ = ["METRICS", "ScoreError", "Scores", "score"]
