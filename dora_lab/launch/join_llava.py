"""A LLaVA before its tuning, made of the parts that were released: a language model, a CLIP tower, a projector.

What comes out is a folder for --model-dir that transformers opens as `LlavaForConditionalGeneration`. No number of the
parts changes, nor its type.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dora_lab.formats.read import read_projector
from dora_lab.formats.shards import Shards
from dora_lab.io.errors import CheckpointError
from dora_lab.models.open import open_tokenizer
from dora_lab.tasks.conversations import IMAGE

ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")  # a row for every token


def join(words: Path, tower: Path, projector: Path, out: Path, *, allow_pickle: bool = False) -> Path:
    """Write the folder `out` of a language model (vicuna-7b-v1.5), a CLIP (ViT-L/14 at 336) and a projector's file.

    A tokenizer without <image> gets it, and the model rows for what it lacks: the mean of all rows, so that a new token
    never has the largest logit, and of all probability at most its share of the vocabulary. allow_pickle: read .bin
    files (tensors alone) where there are no safetensors. Raises CheckpointError for parts that are none or do not fit,
    and for a folder `out` that is there.
    """
    from transformers import AddedToken, LlavaConfig, LlavaForConditionalGeneration

    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: is there and not empty; give another folder")
    text, vision = _config(words, ("llama",)), _config(tower, ("clip", "clip_vision_model"))
    vision = getattr(vision, "vision_config", vision)
    tokenizer: Any = open_tokenizer(words)
    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    config = cast(Any, LlavaConfig)(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2, tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    tensors = _of_words(Shards(words, allow_pickle=allow_pickle), text.vocab_size)
    tensors |= _of_tower(Shards(tower, allow_pickle=allow_pickle), model.state_dict())
    tensors |= {
        f"model.multi_modal_projector.{name}": tensor
        for name, tensor in read_projector(projector, allow_pickle=allow_pickle).items()
    }
    _fill(model, tensors, f"{words}, {tower}, {projector}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _config(folder: Path, kinds: tuple[str, ...]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any kind: transformers has many
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{folder}: no configuration that can be read ({first:.200}); give a model's") from None
    if config.model_type not in kinds:
        raise CheckpointError(f"{folder}: give a {kinds[0]} (a {config.model_type} is in it)")
    return config


def _of_words(shards: Shards, rows: int) -> dict[str, Tensor]:
    """The language model's tensors by LLaVA's names, those of tokens with so many rows."""
    found = {
        name if name.startswith("lm_head.") else name.replace("model.", "model.language_model.", 1): shards.tensor(name)
        for name in shards
        if not name.endswith("rotary_emb.inv_freq")  # of early versions; computed
    }
    for name in ROWS:
        if name in found and (lacking := rows - len(found[name])) > 0:
            mean = found[name].double().mean(0, keepdim=True).to(found[name].dtype)
            found[name] = torch.cat([found[name], mean.expand(lacking, -1)])
    return found


def _of_tower(shards: Shards, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tower's tensors by LLaVA's names; a CLIP's text model and projections are left out."""
    before = next(name for name in wanted if name.endswith("embeddings.class_embedding"))
    place = before.removesuffix("embeddings.class_embedding")
    whole = any(name.startswith("vision_model.") for name in shards)
    return {
        place + name.removeprefix("vision_model."): shards.tensor(name)
        for name in shards
        if (name.startswith("vision_model.") or not whole) and not name.endswith("position_ids")
    }


def _fill(model: Any, tensors: dict[str, Tensor], where: str) -> None:
    """Give a model on the meta device its tensors; CheckpointError, naming the first, where they do not fit."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    wanted = {name: weight.shape for name, weight in model.state_dict().items() if name not in tied}
    for name in sorted(wanted.keys() | tensors.keys()):
        there, due = tensors[name].shape if name in tensors else None, wanted.get(name)
        if there != due and name not in tied:
            said = "is missing" if there is None else f"has the shape {tuple(there)}"
            raise CheckpointError(
                f"{where}: '{name}' {said}, where {'none belongs' if due is None else tuple(due)}; these parts are not "
                "of one LLaVA, or a file is not whole"
            )
        if there is not None and not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{where}: '{name}' holds numbers that are not finite; fetch it again")
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
