"""A base and what was tuned from it, as matrices (W0, W - W0) in blocks of rows: no model is loaded, nothing merged.

What is tuned may be a whole model, an adapter (see `formats`), a folder of ``checkpoint-N`` of either, or one of our
run directories. Shape suffixes: O = out features, I = in features, R = rank, B = rows of a block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dora_lab.checkpoints.formats import CONFIG, Factors, read_adapter
from dora_lab.checkpoints.manifest import digest, read_manifest
from dora_lab.checkpoints.shards import INDEX, SINGLE, Shards
from dora_lab.files import CheckpointError
from dora_lab.spec import did_you_mean

BLOCK = 2**20  # elements of a matrix at a time
# no product of hidden states: looked up, or turned into words
_WORDS = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|embeddings?(\..*)?)$")
_TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}  # model_type: modules with weights stored as (in, out)

Blocks = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pair:
    """One matrix before and after."""

    module: str
    shape: tuple[int, int]  # (out, in)
    transposed: bool  # stored, and given in blocks, as (in, out)
    blocks: Callable[[], Blocks]  # (W0_BI, E_BI) in order, of the stored layout


def steps_of(path: Path) -> list[tuple[int | None, Path]]:
    """(step, folder) of everything tuned that is in a path: itself, its ``checkpoint-N``, or a run's adapter."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    if path.is_file() or any((path / name).is_file() for name in (CONFIG, INDEX, SINGLE)):
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


def pairs(base: Shards, tuned: Path, kinds: Sequence[str] = (), *, allow_pickle: bool = False) -> Iterator[Pair]:
    """Every matrix of the base that was, or may have been, tuned; tied ones once.

    kinds: leaf names of modules; () = all that an adapter has, or all matrices of a whole model but embeddings.

    Raises CheckpointError, naming tensor and file, for what is missing or of another shape, or a kind of no matrix.
    """
    if tuned.is_file() or (tuned / CONFIG).is_file():
        modules = [name.removesuffix(".weight") for name in base]
        adapter = read_adapter(tuned, modules, allow_pickle=allow_pickle)
        made_for = (read_manifest(tuned) or {"base": {"tensors": {}}})["base"]["tensors"]
        for name in _chosen(list(adapter.layers), kinds, tuned):
            yield _adapted(base, tuned, name, adapter.layers[name], made_for.get(name))
        return
    after = Shards(tuned)
    matrices = [name for name in base if name.endswith(".weight") and len(base.shape(name)) == 2]
    modules = [name.removesuffix(".weight") for name in matrices]
    plain = [name for name in modules if not _WORDS.search(name)]
    if not plain:
        raise CheckpointError(f"{base.folder}: no '*.weight' matrix in it: is it quantised, or no language model?")
    for module in _chosen(modules if kinds else plain, kinds, tuned):
        name = f"{module}.weight"
        if name not in after:
            raise CheckpointError(f"{tuned}: '{name}' of the base is missing: is it of the same model?")
        if after.shape(name) != base.shape(name):
            raise CheckpointError(
                f"{tuned}: '{name}' is {after.shape(name)}, in the base {base.shape(name)}: another base?"
            )
        yield _pair(base, name, module, partial(_whole_blocks, base, after, name))


def _chosen(modules: list[str], kinds: Sequence[str], where: Path) -> list[str]:
    leaves = {name.rpartition(".")[2] for name in modules}
    for kind in kinds:
        if kind not in leaves:
            raise CheckpointError(f"{where}: no matrix is named '{kind}'; {did_you_mean(kind, leaves)}")
    return [name for name in modules if not kinds or name.rpartition(".")[2] in kinds]


def _pair(base: Shards, name: str, module: str, blocks: Callable[[], Blocks]) -> Pair:
    transposed = module.rpartition(".")[2] in _TRANSPOSED.get(_model_type(base), ())
    rows, *columns = base.shape(name)
    stored = (rows, int(torch.tensor(columns).prod()))
    return Pair(module, (stored[1], stored[0]) if transposed else stored, transposed, blocks)


def _model_type(base: Shards) -> str:
    try:
        return str(json.loads((base.folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return ""


def _slices(base: Shards, name: str) -> Iterator[slice]:
    rows, *columns = base.shape(name)
    size = max(1, BLOCK // max(1, int(torch.tensor(columns).prod())))
    yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dtype == torch.float64 else tensor.float().flatten(1)


def _whole_blocks(base: Shards, after: Shards, name: str) -> Blocks:
    for rows in _slices(base, name):
        W0 = _wide(base.rows(name, rows))
        yield W0, _wide(after.rows(name, rows)) - W0


def _adapted(base: Shards, where: Path, module: str, factors: Factors, made_for: str | None) -> Pair:
    # a model saved without its head names its tensors without the first part
    names = [f"{module}.weight", f"{module.partition('.')[2]}.weight", f"model.{module}.weight"]
    name = next((name for name in names if name in base), None)
    if name is None:
        near = did_you_mean(f"{module}.weight", [key for key in base if key.endswith(".weight")][:80])
        raise CheckpointError(f"{where}: the base {base.folder} has no '{module}.weight': is it the right base? {near}")
    pair = _pair(base, name, module, lambda: iter(()))
    if factors.kind in ("conv1d", "embedding") and not pair.transposed:
        pair = Pair(module, (pair.shape[1], pair.shape[0]), True, pair.blocks)
    out, width = pair.shape
    sizes = {"A": (factors.A, 1, width), "B": (factors.B, 0, out), "magnitude": (factors.magnitude, 0, out)}
    for part, (tensor, side, wanted) in sizes.items():
        if tensor is not None and tensor.shape[side] != wanted:
            raise CheckpointError(
                f"{where}: {part} of '{module}' is {tuple(tensor.shape)}, the base is {pair.shape} (out, in)"
            )
    if made_for is not None and digest(base.shape(name), (base.rows(name, r) for r in _slices(base, name))) != made_for:
        raise CheckpointError(f"{where}: '{module}' was made for another base than {base.folder}; give the one it was")
    return Pair(module, pair.shape, pair.transposed, partial(_factor_blocks, base, name, factors, pair.transposed))


def _factor_blocks(base: Shards, name: str, factors: Factors, transposed: bool) -> Blocks:
    """Blocks of W0 and of what LoRA or DoRA adds to it; the update itself is never whole in memory."""
    norms_O = None
    if transposed and factors.magnitude is not None:  # the norms go across the blocks
        squares = (_moved(base, name, factors, rows, True)[2].double().square().sum(0) for rows in _slices(base, name))
        norms_O = torch.stack(list(squares)).sum(0).sqrt()
    for rows in _slices(base, name):
        W0, E, V = _moved(base, name, factors, rows, transposed)
        if factors.magnitude is not None:
            m = factors.magnitude.double() if transposed else factors.magnitude[rows].double()
            norm = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64) if norms_O is None else norms_O
            # m V / |V| - W0 = (m / |V| - 1) V + s B A: no difference of two nearly equal weights
            grown = torch.where(norm > 0, m / norm.masked_fill(norm == 0, 1.0) - 1, 0.0).to(V.dtype)
            E = torch.addcmul(E, V, grown if transposed else grown[:, None])
        yield W0, E


def _moved(base: Shards, name: str, factors: Factors, rows: slice, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(W0, s B A, their sum V) of a block of rows as stored."""
    W0 = _wide(base.rows(name, rows))
    E = _update(factors, rows, transposed, W0)
    return W0, E, W0 + E


def _update(factors: Factors, rows: slice, transposed: bool, like: Tensor) -> Tensor:
    if factors.A is None or factors.B is None:
        return torch.zeros_like(like)
    A_RI, B_OR = factors.A.to(like.dtype), factors.B.to(like.dtype)
    product = A_RI[:, rows].t() @ B_OR.t() if transposed else B_OR[rows] @ A_RI
    return product.mul_(factors.scaling)
