"""The third part of how the base is made: where pictures begin. A visual embedding that says what a place shows, as
the sum of a sentence's words would, fitted by least squares and written into the base's folder.

The paper's visual embedding begins at random and sees some hundred times the items that there are here, where that
map is not found in minutes. So the base is given it, as LLaVA is given its projector: every row of the experiment
begins with the same one, and trains it.

Shape suffixes: P places, F numbers of a feature, D width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import BartForConditionalGeneration, PreTrainedTokenizerFast

from dora_lab.mini.vl import families
from dora_lab.mini.vl.cells import SIDE, WIDTH, features
from dora_lab.mini.vl.pretrain import HERE, seal
from dora_lab.mini.vl.scenes import COLUMNS, ROWS, Scene, told

VISUAL = "model.encoder.visual_embedding"  # of VL-BART, whose other parameters have BART's names
TELLINGS = 4  # sentences about a thing, of whose words the mean is taken


def seen(things: Scene, key: str) -> np.ndarray:
    """(P, F): what a picture's nine places show, each the largest of its four cells, as `data.visual_tokens = 9`."""
    half = SIDE // 2
    return features(things, key).reshape(half, 2, half, 2, WIDTH).max(axis=(1, 3)).reshape(half * half, WIDTH)


def said(things: Scene, rng: Random) -> list[list[str]]:
    """For each place, sentences about what is there; of an empty one its name."""
    at = {(thing.row, thing.column): thing for thing in things}
    places = [(row, column) for row in range(len(ROWS)) for column in range(len(COLUMNS))]
    return [
        [f" {told(at[place], rng)}" for _ in range(TELLINGS)] if place in at
        else [f" {ROWS[place[0]]} {COLUMNS[place[1]]}"]
        for place in places
    ]  # fmt: skip


def fitted(
    model: BartForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, keys: Iterable[str]
) -> tuple[dict[str, Tensor], float]:
    """The visual embedding by name, and the share of the words' variance that it explains on these pictures.

    Its layer norm is the text's own. The part that says where a region is begins at zero; of that which says which
    picture it is of, the second row with what "right image:" adds to a place over "left image:" (the first, which items
    with one picture have, too, with nothing): from zero, as alike as it finds them, no row of the experiment learns to
    tell two pictures apart.
    """
    rng, words_VD = Random("align"), cast(Any, model.get_input_embeddings()).weight.detach().float()
    encoder: Any = model.get_encoder()
    middle_D = encoder.embed_positions.weight[2:40].detach().float().mean(0)
    seen_PF, said_PD = [], []
    for key in keys:
        things = families.shown("COCO", key)
        seen_PF.append(seen(things, key))
        for sentences in said(things, rng):
            ids = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in sentences]
            said_PD.append(torch.stack([words_VD[one].sum(0) for one in ids]).mean(0) + middle_D)
    X_PF = np.concatenate(seen_PF).astype(np.float64)
    X_PF = np.concatenate([X_PF, np.ones((len(X_PF), 1))], axis=1)
    Y_PD = torch.stack(said_PD).double().numpy()
    W_FD = np.linalg.lstsq(X_PF, Y_PD, rcond=None)[0]
    explained = 1 - ((Y_PD - X_PF @ W_FD) ** 2).sum() / ((Y_PD - Y_PD.mean(0)) ** 2).sum()
    norm, D = encoder.layernorm_embedding, Y_PD.shape[1]
    places_PD = torch.stack(said_PD)
    sides = [
        norm(
            places_PD
            + words_VD[tokenizer.backend_tokenizer.encode(f" {side} image:", add_special_tokens=False).ids].sum(0)
        )
        for side in ("left", "right")
    ]
    apart_D = (sides[1] - sides[0]).mean(0)
    found = {
        "feature.0.weight": torch.from_numpy(W_FD[:-1].T), "feature.0.bias": torch.from_numpy(W_FD[-1]),
        "feature.1.weight": norm.weight, "feature.1.bias": norm.bias, "box.0.weight": torch.zeros(D, 5),
        "box.0.bias": torch.zeros(D), "box.1.weight": torch.ones(D), "box.1.bias": torch.zeros(D),
        "picture.weight": torch.stack([torch.zeros(D), apart_D]),
    }  # fmt: skip
    return {f"{VISUAL}.{name}": tensor.detach() for name, tensor in found.items()}, float(explained)


def align(folder: Path) -> None:
    """Fit on the pictures of mini-VQA's training questions, and write; a visual embedding that is there is replaced."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BartForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    keys = sorted({key for key, _ in families.vqa("train")})
    parts, explained = fitted(model, tokenizer, keys)
    halved: Any = cast(Any, model).to(torch.bfloat16)
    new = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in parts.items()}
    halved.save_pretrained(folder, state_dict=halved.state_dict() | new)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "feature_size": WIDTH}, indent=2, sort_keys=True) + "\n")
    record = json.loads((folder / "record.json").read_text())
    seal(folder, record | {"aligned": {"pictures": len(keys), "explained": round(explained, 4)}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE / "base")
    align(**vars(parser.parse_args()))
