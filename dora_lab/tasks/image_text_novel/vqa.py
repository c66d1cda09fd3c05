"""See the family."""

from __future__ import annotations

from dora_lab.tasks.image_text import vqa
from dora_lab.tasks.image_text_novel import novel

TASK = novel(vqa.TASK)
