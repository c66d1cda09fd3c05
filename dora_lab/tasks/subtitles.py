"""What is said in VALUE's clips, and the span of one that an item is about, as texts that VL-Adapter's model reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dora_lab.tasks.annotations import Row, read_lines
from dora_lab.tasks.items import ItemError

ENDING = "_val"  # of the names of tasks that ask VALUE's validation items


@dataclass(frozen=True)
class Subtitles:
    """Of every clip of a set, what is said in it."""

    file: Path
    texts: dict[str, str]  # by clip: lines with a blank between them

    def of(self, row: Row) -> str:
        """ "[Subs] ..." of the clip of an annotation; ItemError where the file does not have it."""
        clip = row.text("vid_name")
        if clip not in self.texts:
            raise ItemError(f"{row.where}: its clip '{clip}' is not in {self.file}; fetch both again")
        return f"[Subs] {self.texts[clip]}"


def read_subtitles(root: Path, clips: str) -> Subtitles:
    """Those of a set ("tv", "how2", "yc2").

    Raises ItemError for a file that is not there or broken, a clip that it has twice and lines that are no texts.
    """
    file = Path(root) / "ann" / f"{clips}_subtitles.jsonl"
    texts: dict[str, str] = {}
    for row in read_lines(file):
        clip = row.text("vid_name")
        if clip in texts:
            raise ItemError(f"{row.where}: clip '{clip}' is there already; remove one of them")
        texts[clip] = " ".join(line.any_text("text").strip() for line in row.rows("sub", empty=True))
    return Subtitles(file, texts)


def span(row: Row) -> str:
    """ "[TS] (...)": when in its clip an annotation is, as its file writes it, a text or begin and end in seconds."""
    value = row.values.get("ts")
    if isinstance(value, str):
        return f"[TS] ({row.text('ts')})"
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 2 or not all(type(number) in (int, float) for number in numbers):
        raise row.refuse("ts", "a text, or two numbers")
    return f"[TS] ({numbers})"
