"""A folder in VL-Adapter's layout, made of nothing: annotations of a few pictures, features that say their colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dora_lab.tasks.features import VARIANT

COLOURS = ("red", "blue", "green")
TASKS = ("vqa", "gqa", "nlvr2", "coco_caption")
SHAPE = (9, 5)  # a 3 x 3 grid
SPLITS = {"train": 12, "restval": 4, "val": 6, "test": 8}  # pictures


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def coco(part: str, number: int) -> str:
    return f"COCO_{'train' if part == 'train' else 'val'}2014_{[*SPLITS].index(part)}{number:05}"


def features_of(key: str) -> np.ndarray:
    """(regions, width) of a picture: its colour in the first numbers, noise in the others."""
    found = np.random.default_rng(list(key.encode())).standard_normal(SHAPE)
    found[:, :3] = 4.0 * (np.arange(3) == int(key[-5:]) % 3)
    return found.astype(np.float16)


def save_pictures(root: Path, text: bool = True) -> Path:
    """The folder: features of all sets as the hub has them, and the files of the four tasks."""
    keys: dict[str, list[str]] = {"COCO": [], "VG": [], "GQA": [], "nlvr": []}
    for name, rows in annotations(keys).items():
        if text:
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows), encoding="utf-8")
    for name, ids in keys.items():
        file = root / "features" / name / VARIANT / "part-00000.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        ids = sorted({*ids})
        flat = pa.array(np.concatenate([features_of(key).ravel() for key in ids]), pa.float16())
        cells = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, SHAPE[1]), SHAPE[0])
        pq.write_table(pa.table({"id": pa.array(ids), "features": cells}), file)
    return root


def annotations(keys: dict[str, list[str]]) -> dict[str, Any]:
    """The files by name; every picture that they name is added to its set in `keys`."""

    def seen(name: str, key: str) -> str:
        keys[name].append(key)
        return key

    files: dict[str, Any] = {}
    answers: dict[str, list[Any]] = {"train": [], "val": []}
    for split, parts in (("train", ("train", "restval")), ("val", ("val",)), ("test", ("test",))):
        rows = files[f"vqa/karpathy_{split}.json"] = []
        for part in parts:
            for number in range(SPLITS[part]):
                key, question = seen("COCO", coco(part, number)), len(rows) + 1000 * len(files)
                others = {"red": "dark red"}.get(colour(number), "grey")
                label = {colour(number): 1, others: 0.3}
                rows.append({"question_id": question, "img_id": key, "sent": "what colour?", "label": label})
                said = [colour(number)] * 8 + [others] * 2
                answers["val" if "val2014" in key else "train"].append(
                    {"question_id": question, "answers": [{"answer": text} for text in said]}
                )
        rows[-1]["label"] = {}  # nothing that is often said
    for part, rows in answers.items():
        files[f"vqa/v2_mscoco_{part}2014_annotations.json"] = {"info": {}, "annotations": rows}
    for split, name in (("train", "VG"), ("valid", "VG"), ("testdev", "GQA")):
        files[f"GQA/{split}.json"] = [
            {"question_id": f"{split}{number}", "img_id": seen(name, f"{split}-{number:05}"), "sent": "is it red?"}
            | {"label": {"yes" if colour(number) == "red" else "no": 1.0}}
            for number in range(8)
        ]
    for split in ("train", "valid", "test"):
        files[f"nlvr/{split}.json"] = [
            {
                "identifier": f"{split}-{number // 2}-{number % 2}-0",
                "uid": f"nlvr2_{split}_{number}",
                "img0": seen("nlvr", f"{split}-img0-{number:05}"),
                "img1": seen("nlvr", f"{split}-img1-{number % 4:05}"),
                "sent": "both have one colour",
                "label": int(colour(number) == colour(number % 4)),
            }
            for number in range(8)
        ]
    files["COCO/dataset_coco.json"] = {
        "images": [
            {"filename": f"{seen('COCO', coco(part, number))}.jpg", "split": part}
            | {"sentences": [{"raw": f" a {colour(number)} {thing} here. "} for thing in ("thing", "ring")]}
            for part, count in SPLITS.items()
            for number in range(count)
        ]
    }
    return files


def save_bart(where: Path, sentences: Sequence[str]) -> Path:
    """A random BART with the files that facebook/bart-base has on the hub, and its ids of special tokens."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import BartConfig, BartForConditionalGeneration, BartTokenizer, GenerationConfig

    where.mkdir(parents=True, exist_ok=True)
    words = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words.train_from_iterator([*sentences] * 20, vocab_size=300, special_tokens=special, show_progress=False)
    words.save_model(str(where))
    tokenizer = BartTokenizer.from_pretrained(where)
    tokenizer.save_pretrained(where)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
        init_std=0.3, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases begin at zero, norms at one: a lost one would not be seen
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig(num_beams=4, no_repeat_ngram_size=3, **_ids(config))
    model.save_pretrained(where)
    return where


def _ids(config: Any) -> dict[str, int]:
    return {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")} | {
        "decoder_start_token_id": config.decoder_start_token_id
    }
