"""Values of single items in a row of the stream eval, as text: base64 of little-endian numbers, in item order."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

import numpy as np

# float16 keeps three digits of a likelihood, enough for paired intervals; a fact is a number made of its name, the same
# in every task, run and table
TYPES = {"choice_nll": "<f2", "answer_nll": "<f2", "margin": "<f2", "score": "<f4", "fact": "<u4"}


def number_of(fact: str) -> int:
    """The number that stands for what items ask about: the first 32 bits of its name's SHA-256."""
    return int(hashlib.sha256(fact.encode()).hexdigest()[:8], 16)


def pack(name: str, values: Sequence[float]) -> str:
    """The text of the values called `name` (a key of `TYPES`); raises ValueError for one that its type cannot hold."""
    numbers = np.asarray(values, "float64")
    stored = numbers.astype(TYPES[name])
    if not np.isfinite(stored).all() or not np.allclose(stored, numbers, rtol=1e-3, atol=1e-4):
        raise ValueError(f"{name}: a value that {TYPES[name]} cannot hold among {numbers.min()} .. {numbers.max()}")
    return base64.b64encode(stored.tobytes()).decode("ascii")


def unpack(name: str, text: str) -> np.ndarray:
    """The values that `pack` wrote, (items,), float64 for likelihoods and int64 for facts."""
    stored = np.frombuffer(base64.b64decode(text), TYPES[name])
    return stored.astype("int64" if stored.dtype.kind == "u" else "float64")
