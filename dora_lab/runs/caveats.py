"""What a reader of a run's scores has to know and no score shows, from its record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def caveats(record: Mapping[str, Any]) -> list[str]:
    """A sentence each: scored items that were trained on, answers and questions that training cut."""
    found = []
    for source in (record.get("inputs") or {}).get("sources") or []:
        if again := source.get("asked_in_training"):
            found.append(
                f"{source['task']}: {again} of its {source['items']} {source['split']} items are asked in the training "
                "items, too"
            )
    training = record.get("training") or {}
    if cut := training.get("answers_cut"):
        found.append(f"{cut} training items lost the end of their answer to data.cutoff")
    if cut := training.get("questions_cut"):
        found.append(f"{cut} training items lost words of their question to a cutoff")
    return found
