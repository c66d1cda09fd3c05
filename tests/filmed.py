"""A folder in the layout of VALUE's release, made of nothing: clips whose frames say a colour, and the four tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("red", "blue", "green")
LEARNT = ("tvqa", "how2qa", "tvc", "yc2c")
ASKED = tuple(f"{task}_val" for task in LEARNT)
SHAPE = (6, 5)  # frames that are read, numbers of one
SETS = {"tvqa": "tv", "how2qa": "how2", "tvc": "tv", "yc2c": "yc2"}
PARTS = {"train": 12, "val": 6}  # items


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def clip(part: str, number: int) -> str:
    return f"{part}_{number:03}"


def frames_of(clips: str, name: str) -> np.ndarray:
    """(frames, width), fewer, as many and more of them than are read: their colour in the first numbers, then noise."""
    number = int(name[-3:])
    rng = np.random.default_rng(list(f"{clips} {name}".encode()))
    found = rng.standard_normal((4 + number % 5, SHAPE[1]))
    found[:, :3] = 4.0 * (np.arange(3) == number % 3)
    return found.astype(np.float16 if clips == "tv" else np.float32)


def save_clips(root: Path) -> Path:
    """The folder, as `VL-Adapter`'s: all below video/."""
    for name, rows in annotations().items():
        file = root / "video" / "ann" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for clips in ("tv", "how2", "yc2"):
        folder = root / "video" / "vis_features" / clips / "clip-vit"
        folder.mkdir(parents=True)
        for part, count in PARTS.items():
            for number in range(count):
                np.savez(folder / f"{clip(part, number)}.npz", features=frames_of(clips, clip(part, number)))
    return root


def annotations() -> dict[str, list[dict[str, Any]]]:
    """The files by their names in ann/."""
    files: dict[str, list[dict[str, Any]]] = {
        f"{clips}_subtitles.jsonl": [
            {"vid_name": clip(part, number)}
            | {"sub": [{"text": f" {who} talks. ", "start": 0.0, "end": 1.5} for who in ("ann", "bob")[: number % 3]]}
            for part, count in PARTS.items()
            for number in range(count)
        ]
        for clips in ("tv", "how2", "yc2")
    }
    for part, count in PARTS.items():
        files[f"tvqa/tvqa_{part}.jsonl"] = [
            {"qid": 1000 * (part == "val") + number, "vid_name": clip(part, number), "show_name": "a show"}
            | {"ts": "0.5-2.25", "q": " what colour? ", "answer_idx": number % 3}
            | dict(zip(("a0", "a1", "a2", "a3", "a4"), (*COLOURS, "grey. ", ""), strict=True))
            for number in range(count)
        ]
        files[f"how2qa/how2qa_{part}_release.jsonl"] = [
            {"qid": f"how2qa_{part}_{number}", "vid_name": clip(part, number), "ts": [0, 2.5], "q": "what colour?"}
            | {"answer_idx": number % 3}
            | dict(zip(("a0", "a1", "a2", "a3"), (*COLOURS, "grey"), strict=True))
            for number in range(count)
        ]
        for task in ("tvc", "yc2c"):
            files[f"{task}/{task}_{part}_release.jsonl"] = [
                {"clip_id": 100 * (part == "val") + number, "vid_name": clip(part, number), "duration": 9.5}
                | ({"ts": [0.0, 2.5]} if task == "tvc" else {})
                | {
                    "descs": [
                        {"desc": f"a {colour(number)} {thing}", "desc_id": 2 * number + place, "type": "v"}
                        for place, thing in enumerate(("thing here.", "ring here. ")[: 2 if task == "tvc" else 1])
                    ]
                }
                for number in range(count)
            ]
    return files
