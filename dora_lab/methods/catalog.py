"""What is known of each method without running it: how it is shown, counted and saved (no torch; sources are read).

A file here that defines `prepare` is a method. It says what it is in plain literals at the top of the file, all but the
first of which may be left out:

- ``FIELDS``: the fields of `dora_lab.spec.Method`, besides the name, that the method reads; ``target_modules`` stands
  for ``scope`` and ``also_train`` as well, which `inject.wrap` reads for every method;
- ``PARAMETERS``: how many it trains, as arithmetic: of each adapted module with its ``rank`` (0 where the magnitude
  alone is trained), ``inputs`` and ``outputs``; of a method without target modules with ``model``, all parameters of
  the base. Without it a dry run has no estimate;
- ``FORM``: what of it a file of PEFT's or the authors' holds, ``"factors"`` or ``"factors, magnitude"``; left out, its
  layers are saved as named tensors, or the whole model where it has none;
- ``LABEL``, ``COLOUR``, ``MARKER``, ``LINE``, ``ORDER``: its name in tables, its look in figures, its place among the
  others; ``HALF``: (colour, marker) at half the rank; ``WORDS``: its name in prose, where that is another;
- ``SAVED``: what autograd keeps, with dropout and without: see `launch.cost`.
"""

from __future__ import annotations

import ast
import operator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dora_lab.spec import Method, did_you_mean

_COLOURS = ("#6a51a3", "#31a354", "#d4a017", "#17869e")  # of what names none
_ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method, as its file describes it: the literals above, in small letters."""

    name: str
    fields: tuple[str, ...]
    label: str
    words: str
    colour: str
    parameters: str | None = None
    form: str | None = None
    marker: str = "D"
    line: str = "-"
    half: tuple[str, str] | None = None
    order: int = 100
    saved: dict[bool, dict[int, tuple[int, int]]] | None = None

    @property
    def adapts(self) -> bool:
        """Whether modules are adapted, on a frozen base; else the model as it is, or nothing, is trained."""
        return "target_modules" in self.fields

    def trained(self, **sizes: int) -> int:
        """Parameters of one adapted module (rank, inputs, outputs), or of a whole method (model)."""
        return _value(ast.parse(self.parameters or "", mode="eval").body, sizes)


def methods() -> list[str]:
    """Names of the methods there are, by alphabet: the files of this folder that define `prepare`."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if "\ndef prepare(" in file.read_text(encoding="utf-8"))


@cache
def catalog() -> dict[str, Entry]:
    """Every method by its name, in the order of tables and legends.

    Raises ValueError for a file without FIELDS, a literal that is none, and two methods of one label, which would be
    one line of a table.
    """
    found = sorted((_entry(name) for name in methods()), key=lambda entry: (entry.order, entry.name))
    labels = [entry.label for entry in found]
    if double := next((label for label in labels if labels.count(label) > 1), None):
        alike = ", ".join(entry.name for entry in found if entry.label == double)
        raise ValueError(f"two methods have the LABEL '{double}': {alike}; a label is a line of a table, change one")
    return {entry.name: entry for entry in found}


def entry_of(name: str) -> Entry:
    """The method of that name; raises ValueError with the names there are."""
    if name not in catalog():
        raise ValueError(f"unknown method '{name}'; {did_you_mean(name, catalog())}")
    return catalog()[name]


def is_counted(method: Method) -> bool:
    """Whether the parameters that a method trains follow from the shapes of the base alone."""
    entry = catalog().get(method.name)
    if entry is None or entry.parameters is None or method.rank_pattern or method.scope or method.also_train:
        return False
    return method.rank is not None or "rank" not in entry.parameters


def spare_colour(label: str) -> str:
    """One of four colours, the same for a label every time."""
    return _COLOURS[sum(map(ord, label)) % len(_COLOURS)]


def _entry(name: str) -> Entry:
    file = Path(__file__).parent / f"{name}.py"
    said: dict[str, Any] = {"label": name} | _literals(file)
    if "fields" not in said:
        raise ValueError(f"{file}: no FIELDS; say which fields of spec.Method the method reads, () for none")
    if "target_modules" in said["fields"]:
        said["fields"] = (*said["fields"], "scope", "also_train")
    return Entry(name=name, **({"words": said["label"], "colour": spare_colour(said["label"])} | said))


def _literals(file: Path) -> dict[str, Any]:
    """What a file says at its top level of the fields of an `Entry`, by their names."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name = target.id if isinstance(target, ast.Name) else ""
        if name.isupper() and name.lower() in Entry.__dataclass_fields__:
            try:
                found[name.lower()] = ast.literal_eval(node.value)  # type: ignore[union-attr]
            except ValueError:
                raise ValueError(f"{file}: {name} is computed; the catalog reads it unrun, so write it out") from None
    return found


def _value(node: ast.expr, sizes: dict[str, int]) -> int:
    """Arithmetic over names and whole numbers, and nothing else."""
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    raise ValueError(f"PARAMETERS: '{ast.unparse(node)}' is not whole numbers, {', '.join(sizes)} and + - * //")
