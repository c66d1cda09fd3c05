"""What was tuned from a base, matrix by matrix: files are matched and checked here, nothing is merged.

No model is loaded, but for an adapter of a method that no format holds: only its own layers know what they compute.

What is tuned may be a whole model, an adapter (see `formats`), a folder of ``checkpoint-N`` of either, or one of our
run directories. Shape suffixes: O = out features, I = in features, R = rank; rows and width are those of the stored
tensor, (out, in) or, of GPT-2's Conv1D and of embeddings, (in, out).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dora_lab.formats.manifest import digest, read_manifest
from dora_lab.formats.neutral import CONFIG, Adapter, Factors
from dora_lab.formats.read import read_adapter
from dora_lab.formats.shards import FLOATS, INDEX, PICKLES, SINGLE, Shards, refuse_changed
from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import weight_files
from dora_lab.models.layout import Layout, layout_of
from dora_lab.probing.matrices import Base, Matrix, alike
from dora_lab.runs import packs
from dora_lab.runs.errors import StoreError
from dora_lab.runs.record import read_record
from dora_lab.runs.survey import verified
from dora_lab.spec import did_you_mean

T = TypeVar("T")

if TYPE_CHECKING:
    from dora_lab.methods.contract import AdaptedLinear


@dataclass(frozen=True)
class Replaced:
    """The weight is another tensor, of a file."""

    after: Shards
    name: str
    first: int = 0  # the row of the tensor that the matrix begins at

    def difference(self, start: int, W0: Tensor, out: Tensor) -> Tensor:
        """W - W0 of the rows from `start` on, as stored, in `out`."""
        self.after.fill(self.name, self.first + start, out)
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
    if (path / "adapter").is_dir() and packs.read(path, "record.json") is not None:
        try:
            verified(path, "adapter")
        except StoreError as error:
            raise CheckpointError(str(error)) from None
        return steps_of(path / "adapter")
    raise CheckpointError(
        f"{path}: no model, adapter, checkpoint-N or run in it (looked for {SINGLE}, {INDEX}, {CONFIG})"
    )


def open_tuned(
    base: Base, path: str, step: int | None, folder: Path, kinds: Sequence[str] = (), *,
    allow_pickle: bool = False, verify: bool = False,
) -> Tuned:  # fmt: skip
    """What was tuned, for every matrix of the base that it changes or may have changed; tied ones once.

    kinds: leaf names of modules; () = all that an adapter has, or all matrices of a whole model but embeddings and the
        head.
    verify: compare files with the SHA-256 that a manifest, or the hub's cache, has of them.

    Raises CheckpointError, naming tensor and file, for what is missing or of another shape, a kind of no matrix, and
    for tensors that are no part of the model.
    """
    if any((folder / name).is_file() for name in (SINGLE, INDEX)) or any(folder.glob(PICKLES)):
        weight_files(folder)  # both a model and an adapter: which of them is meant?
    if folder.is_file() or (folder / CONFIG).is_file():
        manifest = read_manifest(folder)  # its files are compared with it
        for file in (
            (folder.glob("adapter_model.*") if folder.is_dir() else [folder]) if verify and not manifest else ()
        ):
            refuse_changed(file)
        adapter = read_adapter(folder, base.modules(), allow_pickle=allow_pickle)
        updates = _adapter_updates(base, folder, adapter, kinds)
        _refuse_other_base(base, folder, manifest, list(updates))
        return Tuned(path, step, updates)
    after = Shards(folder, allow_pickle=allow_pickle)
    if verify:
        for file in after.files():
            refuse_changed(file)
    known = base.known()
    plain = [(matrix, matrix.name) for matrix in known if kinds or matrix.name not in base.words]
    if not plain:
        raise CheckpointError(f"{base.folder}: no matrix in it: is it quantised, or no language model?")
    chosen = _chosen(_apart(base, after, plain), lambda pair: pair[0].module, kinds, folder, known)
    for matrix, name in chosen:
        _refuse_unlike(base, matrix.name, after, name)
    _refuse_foreign(base, after)
    base.tell_unseen()
    return Tuned(path, step, {matrix: Replaced(after, name, matrix.first) for matrix, name in chosen})


def _apart(base: Base, after: Shards, plain: list[tuple[Matrix, str]]) -> list[tuple[Matrix, str]]:
    """(matrix, tensor of what was tuned): one more where that has two weights which the base ties."""
    names = {matrix.name for matrix, _ in plain}
    for name in after:
        if not base.ties(name):
            continue
        (own, *_) = base.of(name.removesuffix(".weight"), after.folder)
        if own.name in names and own.name in after and not alike(after, name, own.name):
            plain = [(_without(matrix, own.module) if matrix.name == own.name else matrix, n) for matrix, n in plain]
            plain.append((own, name))
    return plain


def _without(matrix: Matrix, module: str) -> Matrix:
    tied = [name for name in (matrix.tied_with or "").split(", ") if name != module]
    return replace(matrix, tied_with=", ".join(tied) or None)


def _refuse_foreign(base: Base, after: Shards) -> None:
    """Refuse what makes a model another function than its weights: an adapter's factors beside a frozen base, say."""
    own = base.layout
    extra = [name for name in after if name not in base]
    if extra and (after.folder / "config.json").exists():
        own = layout_of(after.folder, len(list(after)))
    known = own.has if isinstance(own, Layout) else lambda name: False
    strange = next((name for name in extra if not known(name)), None)
    if strange is None and isinstance(own, Layout):  # in both: was the base an adapted model itself?
        parts = {name.rpartition(".")[0] for name in base.modules()} | set(base.modules())
        strange = next((n for n in after if "." in n and n.rpartition(".")[0] in parts and not known(n)), None)
    if strange is not None:
        raise CheckpointError(
            f"{after.file(strange)}: '{strange}' is no part of the base {base.folder}, so its weights alone are not "
            "what the model computes: save the adapter itself (save_adapter, or PEFT's save_pretrained), or merge it"
        )
    if heads := [name for name in extra if len(after.shape(name)) > 1 and not base.ties(name)]:
        warnings.warn(f"{after.folder}: '{heads[0]}' ({len(heads)} such) is not in the base: no row", stacklevel=3)


def _refuse_unlike(base: Base, name: str, after: Shards, there: str) -> None:
    if there not in after:
        raise CheckpointError(f"{after.folder}: '{there}' of the base is missing: is it of the same model?")
    if after.shape(there) != base.shape(name):
        raise CheckpointError(
            f"{after.folder}: '{there}' is {after.shape(there)}, in the base {base.shape(name)}: another base?"
        )
    _refuse_quantised(base, name)
    _refuse_quantised(after, there)


def _refuse_quantised(shards: Shards, name: str) -> None:
    if shards.dtype(name) not in FLOATS:
        raise CheckpointError(
            f"{shards.file(name)}: '{name}' is {shards.dtype(name)}, not floating point: quantised weights have "
            "to be dequantised first (load the model and save it in a float type)"
        )


def _chosen(
    parts: Sequence[T], name: Callable[[T], str], kinds: Sequence[str], where: Path, known: Sequence[Matrix]
) -> list[T]:
    """Those whose module has one of the leaf names; CheckpointError for a leaf name that none has."""
    leaves = {name(part).rpartition(".")[2] for part in parts}
    for kind in kinds:
        if kind in leaves:
            continue
        if tied := next((m.module for m in known if kind in _leaves(m.tied_with)), None):
            raise CheckpointError(f"{where}: '{kind}' is tied to '{tied}' and counted as that: ask for it")
        raise CheckpointError(f"{where}: no matrix is named '{kind}'; {did_you_mean(kind, leaves)}")
    return [part for part in parts if not kinds or name(part).rpartition(".")[2] in kinds]


def _leaves(tied: str | None) -> set[str]:
    return {name.rpartition(".")[2] for name in (tied or "").split(", ")}


def _adapter_updates(base: Base, where: Path, adapter: Adapter, kinds: Sequence[str]) -> dict[Matrix, Update]:
    _refuse_other_words(base, where, adapter)
    parts: list[tuple[str, Any]] = list(adapter.layers.items())
    if adapter.format == "tensors":
        parts = list(_live(base.folder, where).items())
    for key, tensor in adapter.saved.items():
        if tensor.dim() >= 2 and (kinds or not _resized(base, where, key, tensor)):
            parts.append((key.removesuffix(".weight"), tensor))
    found: dict[Matrix, Update] = {}
    for module, part in _chosen(parts, lambda named: named[0], kinds, where, base.matrices):
        if isinstance(part, Factors):
            matrix = base.fitting(module, where, *_said(part))
            found[matrix] = _low_rank(where, module, matrix, part)
        elif isinstance(part, Tensor):
            found |= {matrix: _held(base, where, matrix, part) for matrix in base.of(module, where)}
        else:
            matrix = base.of(module, where)[0]
            found[matrix] = Made(part, matrix.transposed)
        for matrix in found:
            _refuse_quantised(base, matrix.name)
    return found


def _said(factors: Factors) -> tuple[tuple[int, int], bool]:
    """((out, in), whether it is of an embedding) as an adapter's own tensors have it; its flags are not believed."""
    out = factors.B.shape[0] if factors.B is not None else len(factors.magnitude or ())
    return (out, factors.A.shape[1] if factors.A is not None else 0), factors.kind == "embedding"


def _held(base: Base, where: Path, matrix: Matrix, tensor: Tensor) -> Held:
    if tuple(tensor.shape) != base.shape(matrix.name):
        raise CheckpointError(
            f"{where}: '{matrix.module}' is {tuple(tensor.shape)}, in the base {base.shape(matrix.name)}: another?"
        )
    rows = tensor if matrix.expert is None else tensor[matrix.expert]
    return Held(rows)


def _resized(base: Base, where: Path, key: str, tensor: Tensor) -> bool:
    """Whether a saved embedding or head is of another vocabulary, and so has no change that could be measured."""
    (matrix, *_) = base.of(key.removesuffix(".weight"), where)
    shape = base.shape(matrix.name)
    if matrix.name not in base.words or shape[0] == len(tensor) or shape[1:] != tuple(tensor.shape[1:]):
        return False
    warnings.warn(
        f"{where}: '{key}' has {len(tensor)} rows, the base {shape[0]}: another vocabulary, so it has no row",
        stacklevel=5,
    )
    return True


def _refuse_other_words(base: Base, where: Path, adapter: Adapter) -> None:
    """PEFT writes the frozen weight of an adapted embedding beside its factors: it has to be the base's."""
    for key, tensor in adapter.frozen.items():
        module = key.removesuffix(".weight")
        (matrix, *_) = base.of(module, where)
        same = tuple(tensor.shape) == base.shape(matrix.name) and torch.equal(
            tensor.bfloat16(),
            base.tensor(matrix.name).bfloat16(),  # saved in whatever type it was trained in
        )
        if not same:
            raise CheckpointError(
                f"{where}: the weight of '{module}' that it was trained on is in it, and is not that of {base.folder}: "
                "give the base it was (of the same vocabulary)"
            )


def _live(base: Path, where: Path) -> dict[str, AdaptedLinear]:
    """The layers of an adapter that no format holds, on the base: the one case that needs a model, whole in memory."""
    from dora_lab.formats.live import load_adapter
    from dora_lab.methods.inject import adapted
    from dora_lab.models.open import open_model

    return dict(adapted(load_adapter(open_model(base, "auto"), where)))


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


def _refuse_other_base(base: Base, where: Path, manifest: dict[str, Any] | None, found: Sequence[Matrix]) -> None:
    """Compare the base with what the adapter's manifest says of it, matrix by matrix."""
    told = (manifest or {"base": {"tensors": {}}})["base"]["tensors"]
    made_for = {}  # by tensor: a model saved without its head calls its modules otherwise than the one with it
    for module, wanted in told.items():
        with suppress(CheckpointError):  # of a module that the base has not: none of `found`
            made_for[base.of(module, where)[0].name] = wanted
    if found and told and not any(matrix.name in made_for or matrix.module in told for matrix in found):
        raise CheckpointError(f"{where}: its manifest is of other modules than the adapter; save the adapter again")
    for matrix in found:
        wanted = made_for.get(matrix.name, told.get(matrix.module))
        if wanted is not None and digest(base.shape(matrix.name), base.raw(matrix.name)) != wanted:
            if _rescaled(where):
                raise CheckpointError(
                    f"{where}: the run rescaled its base (model.rescale), so '{matrix.module}' is none of "
                    f"{base.folder}'s; its change is in the run's own probe rows ({where.parent}/probe.jsonl)"
                )
            raise CheckpointError(
                f"{where}: '{matrix.module}' was made for another base than {base.folder}; give the one it was"
            )


def _rescaled(adapter: Path) -> bool:
    """Whether an adapter is of a run whose base was rescaled before training."""
    try:
        return bool(read_record(adapter.parent)["spec"]["model"].get("rescale"))
    except StoreError:  # it is no run's
        return False
