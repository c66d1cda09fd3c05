"""What was tuned from a base, matrix by matrix: files are matched and checked here, nothing is merged.

No model is loaded, but for an adapter of a method that no format holds: only its own layers know what they compute.

What is tuned may be a whole model, an adapter (see `formats`), a folder of ``checkpoint-N`` of either, or one of our
run directories. Shape suffixes: O = out features, I = in features, R = rank; rows and width are those of the stored
tensor, (out, in) or, of GPT-2's Conv1D and of embeddings, (in, out).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dora_lab.formats.manifest import digest, read_manifest
from dora_lab.formats.neutral import CONFIG, Adapter, Factors
from dora_lab.formats.read import read_adapter
from dora_lab.formats.shards import FLOATS, INDEX, PICKLES, SINGLE, Shards, refuse_changed
from dora_lab.io.errors import CheckpointError
from dora_lab.spec import did_you_mean

if TYPE_CHECKING:
    from dora_lab.methods.contract import AdaptedLinear

# no product of hidden states: looked up, or turned into words
_LOOKED_UP = re.compile(r"(^|\.)(embed\w*|wte|wpe|embeddings?(\..*)?)$")
_WORDS = re.compile(rf"{_LOOKED_UP.pattern}|(^|\.)lm_head$")
_TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}  # model_type: modules with weights stored as (in, out)


@dataclass(frozen=True)
class Matrix:
    """A weight of the base, seen as a matrix."""

    name: str  # of the tensor
    shape: tuple[int, int]  # (out, in)
    transposed: bool  # stored as (in, out)
    tied_with: str | None = None  # module that uses the same weight, where the model's configuration says so

    @property
    def module(self) -> str:
        """Name of the module that the weight is of."""
        return self.name.removesuffix(".weight")

    @property
    def stored(self) -> tuple[int, int]:
        """(rows, width) of the tensor."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape


@dataclass(frozen=True)
class Replaced:
    """The weight is another tensor, of a file."""

    after: Shards
    name: str

    def difference(self, start: int, W0: Tensor, out: Tensor) -> Tensor:
        """W - W0 of the rows from `start` on, as stored, in `out`."""
        self.after.fill(self.name, start, out)
        return out.sub_(W0)


@dataclass(frozen=True)
class Held:
    """The weight is another tensor, at hand (``modules_to_save`` of an adapter)."""

    tensor: Tensor

    def difference(self, start: int, W0: Tensor, out: Tensor) -> Tensor:
        """W - W0 of the rows from `start` on, as stored, in `out`."""
        return out.copy_(self.tensor[start : start + len(W0)].flatten(1)).sub_(W0)


@dataclass(frozen=True)
class LowRank:
    """LoRA: W = W0 + s B A; DoRA: that, scaled to a magnitude per output feature. The factors are as stored."""

    left: Tensor  # (rows, R): B, or A^T where the weight is stored as (in, out)
    right: Tensor  # (R, width): A, or B^T
    scaling: float  # s
    magnitude: Tensor | None  # (out,)

    def difference(self, start: int, W0: Tensor, out: Tensor) -> Tensor:
        """s B A of the rows from `start` on, as stored, in `out`: V - W0, without the magnitude."""
        left = self.left[start : start + len(W0)].to(out.dtype)
        return torch.mm(left, self.right.to(out.dtype), out=out).mul_(self.scaling)


@dataclass(frozen=True)
class Made:
    """The weight is what a layer makes of the base's that no format holds; built whole for every block."""

    layer: AdaptedLinear
    transposed: bool  # stored as (in, out)

    def difference(self, start: int, W0: Tensor, out: Tensor) -> Tensor:
        """W - W0 of the rows from `start` on, as stored, in `out`."""
        W = self.layer.effective_weight()
        return out.copy_((W.t() if self.transposed else W)[start : start + len(W0)]).sub_(W0)


Update = Replaced | Held | LowRank | Made


@dataclass(frozen=True)
class Tuned:
    """One tuned model, opened and found to fit its base."""

    path: str  # as it was asked for
    step: int | None  # of a checkpoint-N
    updates: dict[Matrix, Update]


def steps_of(path: Path) -> list[tuple[int | None, Path]]:
    """(step, folder) of everything tuned that is in a path: itself, its ``checkpoint-N``, or a run's adapter."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    if path.is_file() or any((path / name).is_file() for name in (CONFIG, INDEX, SINGLE)) or any(path.glob(PICKLES)):
        return [(None, path)]
    found = sorted(
        (int(m[1]), folder) for folder in path.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    )
    if found:
        return list(found)
    if (path / "record.json").is_file() and (path / "adapter").is_dir():
        return steps_of(path / "adapter")
    raise CheckpointError(
        f"{path}: no model, adapter, checkpoint-N or run in it (looked for {SINGLE}, {INDEX}, {CONFIG})"
    )


def open_tuned(
    base: Shards, path: str, step: int | None, folder: Path, kinds: Sequence[str] = (), *,
    allow_pickle: bool = False, verify: bool = False,
) -> Tuned:  # fmt: skip
    """What was tuned, for every matrix of the base that it changes or may have changed; tied ones once.

    kinds: leaf names of modules; () = all that an adapter has, or all matrices of a whole model but embeddings.
    verify: compare files with the SHA-256 that a manifest, or the hub's cache, has of them.

    Raises CheckpointError, naming tensor and file, for what is missing or of another shape, or a kind of no matrix.
    """
    known = matrices(base)
    if folder.is_file() or (folder / CONFIG).is_file():
        manifest = read_manifest(folder)  # its files are compared with it
        for file in (
            (folder.glob("adapter_model.*") if folder.is_dir() else [folder]) if verify and not manifest else ()
        ):
            refuse_changed(file)
        adapter = read_adapter(folder, [matrix.module for matrix in known], allow_pickle=allow_pickle)
        updates = _adapter_updates(base, known, folder, adapter, kinds)
        _refuse_other_base(base, folder, manifest, list(updates))
        return Tuned(path, step, updates)
    after = Shards(folder, allow_pickle=allow_pickle)
    if verify:
        for file in after.files():
            refuse_changed(file)
    plain = [matrix for matrix in known if kinds or not _WORDS.search(matrix.module)]
    if not plain:
        raise CheckpointError(f"{base.folder}: no '*.weight' matrix in it: is it quantised, or no language model?")
    chosen = _chosen({matrix.module: matrix for matrix in plain}, kinds, folder, known)
    for matrix in chosen.values():
        _refuse_unlike(base, after, matrix.name)
    return Tuned(path, step, {matrix: Replaced(after, matrix.name) for matrix in chosen.values()})


def matrices(base: Shards) -> list[Matrix]:
    """Every weight of the base that is a matrix (a convolution's as (out, rest)), in the model's order."""
    config = _config(base)
    stored_so = _TRANSPOSED.get(str(config.get("model_type")), ())
    found = []
    for name in base:
        rows, width = (base.shape(name) or (0,))[0], math.prod(base.shape(name)[1:])
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or len(base.shape(name)) < 2 or not rows * width:
            continue
        transposed = module.rpartition(".")[2] in stored_so or bool(_LOOKED_UP.search(module))
        found.append(Matrix(name, (width, rows) if transposed else (rows, width), transposed))
    return _once(found) if config.get("tie_word_embeddings") else found


def _once(found: list[Matrix]) -> list[Matrix]:
    """The head is the embedding where the configuration says that they are tied, whether it is stored twice or not."""
    words = next((m for m in found if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings)$", m.module)), None)
    if words is None:
        return found
    return [
        replace(matrix, tied_with="lm_head") if matrix is words else matrix
        for matrix in found
        if matrix.module.rpartition(".")[2] != "lm_head"
    ]


def _refuse_unlike(base: Shards, after: Shards, name: str) -> None:
    if name not in after:
        raise CheckpointError(f"{after.folder}: '{name}' of the base is missing: is it of the same model?")
    if after.shape(name) != base.shape(name):
        raise CheckpointError(
            f"{after.folder}: '{name}' is {after.shape(name)}, in the base {base.shape(name)}: another base?"
        )
    for shards in (base, after):
        if shards.dtype(name) not in FLOATS:
            raise CheckpointError(
                f"{shards.file(name)}: '{name}' is {shards.dtype(name)}, not floating point: quantised weights have "
                "to be dequantised first (load the model and save it in a float type)"
            )


def _chosen(named: dict[str, Any], kinds: Sequence[str], where: Path, known: Sequence[Matrix]) -> dict[str, Any]:
    leaves = {name.rpartition(".")[2] for name in named}
    for kind in kinds:
        if kind in leaves:
            continue
        if tied := next((m.module for m in known if m.tied_with == kind), None):
            raise CheckpointError(f"{where}: '{kind}' is tied to '{tied}' and counted as that: ask for it")
        raise CheckpointError(f"{where}: no matrix is named '{kind}'; {did_you_mean(kind, leaves)}")
    return {name: value for name, value in named.items() if not kinds or name.rpartition(".")[2] in kinds}


def _config(base: Shards) -> dict[str, Any]:
    try:
        found = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _adapter_updates(
    base: Shards, known: Sequence[Matrix], where: Path, adapter: Adapter, kinds: Sequence[str]
) -> dict[Matrix, Update]:
    by_name = {matrix.name: matrix for matrix in known}
    by_name |= {f"{m.tied_with}.weight": m for m in known if m.tied_with}
    saved = {key.removesuffix(".weight"): tensor for key, tensor in adapter.saved.items() if key.endswith(".weight")}
    parts: dict[str, Any] = {**adapter.layers, **{name: t for name, t in saved.items() if t.dim() >= 2}}
    if adapter.format == "tensors":
        parts = _live(base.folder, where)
    found: dict[Matrix, Update] = {}
    for module, part in _chosen(parts, kinds, where, known).items():
        matrix = _of(by_name, base, where, module)
        if base.dtype(matrix.name) not in FLOATS:
            _refuse_unlike(base, base, matrix.name)
        if isinstance(part, Factors):
            if part.kind in ("conv1d", "embedding") and not matrix.transposed:
                matrix = replace(matrix, shape=(matrix.shape[1], matrix.shape[0]), transposed=True)
            found[matrix] = _low_rank(where, module, matrix, part)
        elif adapter.format == "tensors":
            found[matrix] = Made(part, matrix.transposed)
        elif tuple(part.shape) != base.shape(matrix.name):
            raise CheckpointError(
                f"{where}: '{module}.weight' is {tuple(part.shape)}, in the base {base.shape(matrix.name)}: another?"
            )
        else:
            found[matrix] = Held(part)
    return found


def _live(base: Path, where: Path) -> dict[str, AdaptedLinear]:
    """The layers of an adapter that no format holds, on the base: the one case that needs a model, whole in memory."""
    from dora_lab.formats.live import load_adapter
    from dora_lab.methods.inject import adapted
    from dora_lab.models.open import open_model

    return dict(adapted(load_adapter(open_model(base, "auto"), where)))


def _of(by_name: dict[str, Matrix], base: Shards, where: Path, module: str) -> Matrix:
    # a model saved without its head names its tensors without the first part
    names = [f"{module}.weight", f"{module.partition('.')[2]}.weight", f"model.{module}.weight"]
    name = next((name for name in names if name in by_name), None)
    if name is None:
        near = did_you_mean(f"{module}.weight", list(by_name)[:80])
        raise CheckpointError(f"{where}: the base {base.folder} has no '{module}.weight': is it the right base? {near}")
    return by_name[name]


def _low_rank(where: Path, module: str, matrix: Matrix, factors: Factors) -> LowRank:
    out, width = matrix.shape
    sizes = {"A": (factors.A, 1, width), "B": (factors.B, 0, out), "magnitude": (factors.magnitude, 0, out)}
    for part, (tensor, side, wanted) in sizes.items():
        if tensor is not None and tensor.shape[side] != wanted:
            raise CheckpointError(
                f"{where}: {part} of '{module}' is {tuple(tensor.shape)}, the base is {matrix.shape} (out, in)"
            )
    A_RI = torch.zeros(0, width) if factors.A is None else factors.A
    B_OR = torch.zeros(out, 0) if factors.B is None else factors.B
    left, right = (A_RI.t(), B_OR.t()) if matrix.transposed else (B_OR, A_RI)
    return LowRank(left, right, factors.scaling, factors.magnitude)


def _refuse_other_base(base: Shards, where: Path, manifest: dict[str, Any] | None, found: Sequence[Matrix]) -> None:
    """Compare the base with what the adapter's manifest says of it, matrix by matrix."""
    made_for = (manifest or {"base": {"tensors": {}}})["base"]["tensors"]
    for matrix in found:
        wanted = made_for.get(matrix.module)
        if wanted is not None and digest(base.shape(matrix.name), base.raw(matrix.name)) != wanted:
            raise CheckpointError(
                f"{where}: '{matrix.module}' was made for another base than {base.folder}; give the one it was"
            )
