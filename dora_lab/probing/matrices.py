"""The matrices of a base, each with its axis: which of its tensors are products of hidden states, which are looked up.

The model's own class says it (see `models.layout`). Where there is none, only an adapter's factors can, and not of a
square weight: it is refused rather than guessed.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dora_lab.formats.shards import Shards
from dora_lab.io.errors import CheckpointError
from dora_lab.models.layout import Layout, Owner, layout_of
from dora_lab.spec import did_you_mean


@dataclass(frozen=True)
class Matrix:
    """A weight of the base, seen as a matrix; of experts in one tensor, that of one of them."""

    name: str  # of the tensor
    shape: tuple[int, int]  # (out, in)
    transposed: bool  # stored as (in, out)
    tied_with: str | None = None  # modules that use the same weight, where the model ties them
    of: str | None = None  # the module, where the tensor's name does not say it
    expert: int | None = None

    @property
    def module(self) -> str:
        """Name of the module that the weight is of."""
        return self.name.removesuffix(".weight") if self.of is None else self.of

    @property
    def stored(self) -> tuple[int, int]:
        """(rows, width) of the tensor, or of this expert's part."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    @property
    def first(self) -> int:
        """The row of the tensor, seen as rows of this width, that the matrix begins at."""
        return (self.expert or 0) * self.stored[0]


class Base(Shards):
    """A base model's tensors, and what they are.

    Raises CheckpointError as `Shards` and `layout_of` do.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        super().__init__(folder, allow_pickle=allow_pickle)
        self.layout: Layout | str = layout_of(self.folder, len(list(self)))
        self.words: set[str] = set()  # tensors that are looked up by token or position, or turned into tokens
        self.unseen: list[str] = []  # tensors with two axes or more that are no matrix that we know
        self.matrices: list[Matrix] = []  # of every tensor that is one, in the model's order; tied ones once
        self._tensors: dict[str, tuple[str, Owner]] = {}  # by module: its tensor, and what it is there
        if isinstance(self.layout, Layout):
            self._look(self.layout)

    def modules(self) -> list[str]:
        """Names of the modules that have a matrix."""
        return list(self._tensors) or [name.removesuffix(".weight") for name in self if len(self.shape(name)) > 1]

    def known(self) -> list[Matrix]:
        """The matrices of the base; CheckpointError where nothing says what its tensors are."""
        if isinstance(self.layout, str):
            raise CheckpointError(
                f"{self.folder}: whether its weights are (out, in) or (in, out) is not known: {self.layout}"
            )
        return self.matrices

    def of(self, module: str, where: object) -> list[Matrix]:
        """The weight of a module that an adapter (in the file `where`) changes: untied, it is that module's alone.

        More than one are those of experts. Raises CheckpointError for a module that the base does not have.
        """
        self.known()
        assert isinstance(self.layout, Layout)
        short = module.partition(".")[2]  # a model saved without its head names its tensors without the first part
        names = [module, short, f"model.{module}", f"{self.layout.model.base_model_prefix}.{module}"]
        found = next((self._tensors[name] for name in names if name in self._tensors), None)
        if found is None:
            raise self._strange(module, where)
        return _matrices(found[0], self.shape(found[0]), found[1], of=found[1].name)

    def fitting(self, module: str, where: object, factors: tuple[int, int], looked_up: bool) -> Matrix:
        """The same, where no class says what the module is, but the shapes (out, in) of an adapter's factors do.

        looked_up: the adapter says that it is of an embedding. Raises CheckpointError for a square one too.
        """
        if isinstance(self.layout, Layout):
            return self.of(module, where)[0]
        tensor = next((n for n in (f"{module}.weight", f"{module.partition('.')[2]}.weight") if n in self), None)
        if tensor is None:
            raise self._strange(module, where)
        rows, width = self.shape(tensor)[0], math.prod(self.shape(tensor)[1:])
        if rows == width and not looked_up:
            raise CheckpointError(
                f"{where}: '{module}' is {(rows, width)} in the base, whether (out, in) or (in, out) is not known: "
                f"{self.layout}"
            )
        turned = looked_up or factors == (width, rows)  # what fits neither way is refused where it is compared
        return Matrix(tensor, (width, rows) if turned else (rows, width), turned, of=module)

    def ties(self, name: str) -> bool:
        """Whether a tensor of that name would be one that the base has by another."""
        return name not in self and name.removesuffix(".weight") in self._tensors

    def tell_unseen(self) -> None:
        """Warn of what has no row."""
        if self.unseen:
            warnings.warn(
                f"{self.folder}: no row for {len(self.unseen)} tensors that are no matrix product, embedding or "
                f"convolution that is known here: {', '.join(self.unseen[:3])}{', ...' * (len(self.unseen) > 3)}",
                stacklevel=4,
            )

    def _strange(self, module: str, where: object) -> CheckpointError:
        near = did_you_mean(f"{module}.weight", [f"{name}.weight" for name in self.modules()[:80]])
        return CheckpointError(
            f"{where}: the base {self.folder} has no '{module}.weight': is it the right base? {near}"
        )

    def _look(self, layout: Layout) -> None:
        found: dict[str, list[tuple[str, list[Owner]]]] = {}  # by the first owner: tensors of the file, their owners
        for name in self:
            if len(self.shape(name)) < 2 or not math.prod(self.shape(name)):
                continue
            parameter, turned = layout.parameter(name)
            owners = [] if parameter is None else layout.owners(parameter)
            if parameter is None or not owners or owners[0].kind == "other" or turned:
                self.unseen += [] if parameter is None else [name]
            elif len(layout.shape(parameter)) != len(self.shape(name)):  # a part of the parameter: an expert's
                self.matrices += [_matrix(name, self.shape(name), owners[0])]
            else:
                first = next((owner for owner in owners if owner.kind == "embedding"), owners[0])
                own = [owner for owner in owners if owner.stored == parameter]
                found.setdefault(first.stored, []).append((name, [first, *own] if len(owners) > 1 else owners))
                self._tensors |= {owner.name: (name, owner) for owner in owners if owner.name not in self._tensors}
        for stored, tensors in found.items():
            self._take(layout, stored, tensors)
        order = {name: place for place, name in enumerate(self)}
        self.matrices.sort(key=lambda matrix: (order[matrix.name], matrix.expert or 0))

    def _take(self, layout: Layout, stored: str, tensors: list[tuple[str, list[Owner]]]) -> None:
        """The matrices of one parameter, which a file may hold under each of the names that it is tied by."""
        name = next((name for name, owners in tensors if owners[-1].stored == stored), tensors[0][0])
        # what is stored twice and differs is not tied, whatever the configuration says: transformers goes by that too
        apart = {owners[-1].name: other for other, owners in tensors if other != name and not alike(self, name, other)}
        first, *others = sorted(layout.owners(stored), key=lambda owner: owner.stored != stored)
        others = [owner for owner in others if owner.name not in apart]
        tied = ", ".join(owner.name for owner in others) or None
        self.matrices += _matrices(name, self.shape(name), first, tied, first.name)
        self._tensors |= {owner.name: (name, owner) for owner in (first, *others)}
        for owner in layout.owners(stored):
            if owner.name in apart:
                self.matrices += _matrices(apart[owner.name], self.shape(name), owner, None, owner.name)
                self._tensors[owner.name] = (apart[owner.name], owner)
            if owner.kind == "embedding" or owner.module in layout.heads:
                self.words.add(apart.get(owner.name, name))


def alike(shards: Shards, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers."""
    blocks = ((block.clone() for block in shards.raw(name)) for name in (one, other))  # each valid until the next
    return shards.shape(one) == shards.shape(other) and all(torch.equal(a, b) for a, b in zip(*blocks, strict=True))


def _matrix(name: str, shape: tuple[int, ...], owner: Owner, tied: str | None = None, of: str | None = None) -> Matrix:
    turned = owner.kind in ("transposed", "embedding")
    rows, width = shape[0], math.prod(shape[1:])
    of = None if of == name.removesuffix(".weight") else of  # the same matrix is equal, whoever asks for it
    return Matrix(name, (width, rows) if turned else (rows, width), turned, tied, of)


def _matrices(
    name: str, shape: tuple[int, ...], owner: Owner, tied: str | None = None, of: str | None = None
) -> list[Matrix]:
    """One matrix, or one for each expert of a tensor (experts, ..., ...)."""
    if not owner.stacked:
        return [_matrix(name, shape, owner, tied, of)]
    one = _matrix(name, shape[1:], owner, tied, of)
    return [replace(one, expert=expert) for expert in range(shape[0])]
