"""Small models and files for the faults; made once per process, copied for every injection."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dora_lab
from dora_lab.spec import Method
from tests import tiny

QV = ("q_proj", "v_proj")
IDS = torch.arange(14).view(2, 7)


def llama(seed: int = 0, hidden: int = 16, tied: bool = True) -> Any:
    """A Llama of a few thousand parameters, the same for a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(name: str = "dora", model: Any = None, **changes: Any) -> Any:
    """The model with an adapter that has been moved from its start."""
    model = model or llama()
    dora_lab.inject(model, Method(name=name, **({"rank": 4, "alpha": 8.0, "target_modules": QV} | changes)), seed=0)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """(2, 7, vocabulary)."""
    with torch.no_grad():
        return model(IDS).logits


@cache
def _kept(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dora-lab-faults-")) / kind
    if kind == "adapter":
        dora_lab.save_adapter(adapted(), folder)
    elif kind == "base":
        llama(tied=False).save_pretrained(folder)
    elif kind == "tiny":
        tiny.save_model(folder)
    elif kind == "data":
        tiny.save_data(folder)
    return folder


def copy(kind: str, folder: Path) -> Path:
    """A fresh copy of the saved "adapter", "base", "tiny" model (with a tokenizer) or "data"."""
    return Path(shutil.copytree(_kept(kind), folder / kind))


def refused(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], *words: str) -> str:
    """The error's text: of that kind, in one line, with these words; AssertionError if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = call()
        except kind as error:
            text = str(error)
            assert "\n" not in text, f"more than a line: {text!r}"
            for word in words:
                assert word in text, f"{word!r} is not in {text!r}"
            return text
    raise AssertionError(f"nothing was refused: {got!r:.200}")


def flip(file: Path, rng: random.Random, start: int = 0) -> int:
    """Flip one bit of a file; returns the place of its byte."""
    content = bytearray(file.read_bytes())
    at = rng.randrange(start, len(content))
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return at


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """(header, payload) of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, text: str, payload: bytes) -> None:
    """A safetensors file with any header."""
    head = text.encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + payload)
