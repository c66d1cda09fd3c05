"""Layers whose weight is read by the modules around them instead of being called: an adapter there would do nothing.

Mamba's `dt_proj`, the tables of DETR's queries and DeBERTa's relative positions are never called; the fast path of
`torch.nn.TransformerEncoderLayer` and some fused kernels read what is called elsewhere. The first kind is refused
before anything is changed; of the second, every pass is watched. What is read is found in the source of the classes
around a layer, in what their `forward` reaches.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

_SHAPE = ("dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta", "requires_grad")  # no numbers are read
Path = tuple[str, ...]


def reader_of(model: nn.Module, name: str) -> tuple[nn.Module, bool] | None:
    """(module, whether that calls the layer too) that reads the weight of the layer `name` in its forward, or None."""
    atoms = name.split(".")
    for depth in range(len(atoms) - 1, -1, -1):  # from the parent to the model itself
        around = model.get_submodule(".".join(atoms[:depth]))
        read, called = _used(type(getattr(around, "_orig_mod", around)))  # of a compiled one, that inside
        path = tuple(atom for atom in atoms[depth:] if not atom.isdigit())
        if path in read:
            return around, path in called
    return None


def refuse_read(model: nn.Module, name: str) -> None:
    """Raise ValueError if the layer `name` of `model` is never called, its weight being read in its place."""
    found = reader_of(model, name)
    if found is not None and not found[1]:
        raise ValueError(
            f"is never called: {type(found[0]).__name__} reads its weight, so an adapter here would change nothing "
            "until it is merged; adapt another layer"
        )


class Watch:
    """Sees to it that a layer which its surroundings may either call or read is called in every pass.

    Its hooks alone make the fast path of torch's encoder step aside. Raises RuntimeError, from the forward of what
    reads the layer, where it was not called.
    """

    def __init__(self, around: nn.Module, name: str, layer: nn.Module) -> None:
        self._name, self._called = name, False
        self._handles = [
            around.register_forward_pre_hook(self._before, prepend=True),
            layer.register_forward_pre_hook(self._during),
            around.register_forward_hook(self._after),
        ]

    def end(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        self._called = False

    def _during(self, *_: Any) -> None:
        self._called = True

    def _after(self, around: nn.Module, *_: Any) -> None:
        if not self._called:
            raise RuntimeError(
                f"'{self._name}' is adapted, and {type(around).__name__} computed with its weight without calling it, "
                "so without the adapter: switch that fused path off, merge the adapter, or adapt another layer"
            )


@cache
def _used(kind: type[nn.Module]) -> tuple[frozenset[Path], frozenset[Path]]:
    """What the forward of a class reads the weight of, and what it uses otherwise, as names below `self`."""
    read: set[Path] = set()
    called: set[Path] = set()
    todo, seen = ["forward"], {"forward"}
    while todo:
        for path, is_read in _mentions(_parsed(kind, todo.pop())):
            (read if is_read else called).add(path)
            if len(path) == 1 and path[0] not in seen:
                todo.append(path[0])
                seen.add(path[0])
    return frozenset(read), frozenset(called)


def _parsed(kind: type[nn.Module], name: str) -> ast.AST | None:
    """A method of a class, parsed; None of what is no method of its own, or has no source."""
    method = inspect.getattr_static(kind, name, None)
    if not inspect.isfunction(method) or method is vars(nn.Module).get(name):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(method)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return None


def _mentions(method: ast.AST | None) -> Iterator[tuple[Path, bool]]:
    """(names below `self`, whether their weight or bias is read) of every whole chain of attributes in a method."""
    todo: list[ast.AST] = [] if method is None else [method]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Attribute | ast.Subscript) and (path := _path(node)):
            ends = [at for at, atom in enumerate(path) if atom in ("weight", "bias")]
            if not ends:
                yield path, False
            elif ends[0] and path[ends[0] + 1 : ends[0] + 2] not in [(atom,) for atom in _SHAPE]:
                yield path[: ends[0]], True
            if isinstance(node, ast.Attribute):
                continue
        todo.extend(ast.iter_child_nodes(node))


def _path(node: ast.expr) -> Path:
    """("a", "b") of `self.a[0].b`; empty of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()
