"""The linear layers of a decoder's blocks, by their leaf names: what an adapter is put on where nobody names it.

Asked of the model's class, built on the meta device: no weight is read, and a layer is what the class makes of it, not
what its name sounds like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dora_lab.io.errors import LoadError
from dora_lab.methods.layers import kind_of
from dora_lab.methods.readers import refuse_read
from dora_lab.models import layout


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The layers of a model's blocks that can be adapted, and the matrices there that cannot."""

    leaves: tuple[str, ...]  # leaf names, in the model's order: "q_proj", ...
    scope: str | None  # regular expression of the blocks, where a leaf name stands outside of them, too
    count: int  # of blocks
    narrowest: int  # features: the fewest that one of the layers takes or gives
    left_out: tuple[str, ...]  # "leaf: why", of matrices that no adapter can be put on


def blocks_of(model: nn.Module, where: Path | str) -> Blocks:
    """The blocks of a model: its list of modules that holds the most parameters.

    Raises LoadError naming `where`, the model's folder, for a model without such a list, or none of whose layers there
    can be adapted.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    if not lists:
        raise LoadError(f"{where}: a {type(model).__name__} has no list of blocks; name what to adapt in an experiment")
    # the outermost of several that hold the same: an expert's list lies in a block
    place = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    found: dict[str, list[Any]] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not name.startswith(f"{place}."):
            continue
        leaf = name.rpartition(".")[2]
        if type(module).__name__ not in ("Linear", "Conv1D"):
            left |= {
                f"{leaf}.{own}": f"a weight of {type(module).__name__} itself, no layer"
                for own, weight in module.named_parameters(recurse=False)
                if weight.dim() > 1 and layout.kind_of(module, own, weight.dim()) != "embedding"
            }
            continue
        try:
            kind = kind_of(module)
            refuse_read(model, name)
            found.setdefault(leaf, []).append(kind)
        except ValueError as error:
            left[leaf] = str(error)
    leaves = tuple(leaf for leaf in found if leaf not in left)
    if not leaves:
        told = "; ".join(f"{leaf}: {why}" for leaf, why in left.items()) or "there is no linear layer"
        raise LoadError(f"{where}: nothing in the blocks of a {type(model).__name__} can be adapted ({told})")
    sizes = [size for leaf in leaves for kind in found[leaf] for size in (kind.in_features, kind.out_features)]
    outside = any(
        name.rpartition(".")[2] in leaves and not name.startswith(f"{place}.") for name, _ in model.named_modules()
    )
    return Blocks(
        leaves=leaves, scope=rf"^{re.escape(place)}\." if outside else None, count=len(lists[place]),
        narrowest=min(sizes), left_out=tuple(f"{leaf}: {why}" for leaf, why in left.items()),
    )  # fmt: skip
