"""What each tensor of a saved model is, as the model's own class says it, built from config.json without any weights.

Whether a weight is stored as (out, in) or (in, out), or is no matrix product at all, stands neither in a file of
weights nor in a name: it is a property of the code that uses it. So the class is built on the meta device and asked.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import read_object

# modules to a tensor of its file that a class may build: beyond, its configuration speaks of another model
MODULES_EACH, MODULES_AT_LEAST = 50, 20_000

_FIRST = r"(?:[^,()]|\((?:[^()]|\([^()]*\))*\))+"  # of a call's arguments, with brackets in it two deep


@dataclass(frozen=True)
class Owner:
    """A module that uses a parameter."""

    module: str
    leaf: str  # of the parameter: "weight"
    kind: str  # "linear" (out, in, rest); "transposed", "embedding" (in, out); "other"
    stacked: bool = False  # one matrix for each expert: (experts, out, in) or (experts, in, out)

    @property
    def stored(self) -> str:
        """The parameter's name in the model."""
        return f"{self.module}.{self.leaf}".lstrip(".")

    @property
    def name(self) -> str:
        """The module, and the parameter's leaf where it is not `weight`."""
        return self.module if self.leaf == "weight" else self.stored


class Layout:
    """The modules of a model by the names in its files."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        conversions = get_model_conversion_mapping(model)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._state = dict(model.state_dict())
        self._buffers = {name for name, _ in model.named_buffers()}
        heads = {id(part) for part in (_asked(model, "get_output_embeddings"),) if part is not None}
        self.heads: set[str] = set()
        self._owners: dict[int, list[Owner]] = {}
        self._ids: dict[str, int] = {}
        for module_name, module in model.named_modules(remove_duplicate=False):
            if id(module) in heads:
                self.heads.add(module_name)
            for leaf, parameter in module.named_parameters(recurse=False):
                stacked = parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
                owner = Owner(module_name, leaf, kind_of(module, leaf, parameter.dim()), stacked)
                self._owners.setdefault(id(parameter), []).append(owner)
                self._ids[owner.stored] = id(parameter)

    def parameter(self, key: str) -> tuple[str | None, bool]:
        """(name of the model's parameter that a tensor of a file is or is a part of, whether it is turned on the way).

        None for what the class does not have.
        """
        from transformers.core_model_loading import Transpose, rename_source_key

        prefix = self.model.base_model_prefix
        found, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if found not in self._state and key in self._state:
            found, pattern = key, None
        if found not in self._state:
            return None, False
        turned = False
        if pattern is not None:
            used = next(one for one in self._converters if pattern in one.source_patterns)
            turned = any(isinstance(step, Transpose) for step in used.operations)
        return found, turned

    def owners(self, parameter: str) -> list[Owner]:
        """Every module that uses a parameter: more than one where weights are tied; none of a buffer."""
        return self._owners.get(self._ids.get(parameter, 0), [])

    def has(self, key: str) -> bool:
        """Whether a tensor of a file is the class's: a parameter, a buffer, or what it says that it ignores."""
        if self.parameter(key)[0] is not None or key in self._buffers:
            return True
        tails = {".".join(name.split(".")[-2:]) for name in self._buffers}
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        return ".".join(key.split(".")[-2:]) in tails or any(re.search(pattern, key) for pattern in ignored)

    def unfilled(self, keys: Iterable[str]) -> list[str]:
        """Parameters that none of a file's tensors is, under any of their names where weights are tied."""
        filled = {self._ids.get(self.parameter(key)[0] or "") for key in keys}
        return [name for name, number in self._ids.items() if number not in filled]

    def whole(self, keys: Iterable[str]) -> dict[str, str]:
        """Name of a parameter -> the tensor of a file that is all of it, the way the model stores it."""
        found: dict[str, list[str]] = {}
        for key in keys:
            name, turned = self.parameter(key)
            if name is not None and not turned:
                found.setdefault(name, []).append(key)
        return {name: parts[0] for name, parts in found.items() if len(parts) == 1}

    def unlike(self, shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, Sequence[int], tuple[int, ...]]]:
        """(name, shape in the file, in the model) of tensors that are a parameter whole and of another shape."""
        shaped = [(key, shapes[key], self.shape(name)) for name, key in self.whole(shapes).items()]
        return [(key, held, wanted) for key, held, wanted in shaped if tuple(held) != wanted]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of a parameter in the model, which a file may hold in parts."""
        return tuple(self._state[parameter].shape)


def layout_of(folder: Path, tensors: int) -> Layout | str:
    """The layout of a model's folder that holds so many tensors, or why it is not known, in words.

    Raises CheckpointError for a config.json that is broken, or that no model of so many tensors can have.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        return f"{folder} has no config.json, which says what its layers are; put the model's there"
    config = read_object(folder, "config.json")
    try:
        with quiet():
            return Layout(_built(folder, config, tensors))
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: each class of transformers has its own
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{folder / 'config.json'} describes no model that can be built ({type(error).__name__}: {first:.200})"


def _built(folder: Path, config: dict[str, Any], tensors: int) -> Any:
    import transformers as T
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    settings: Any = T.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    named: Any = getattr(T, str((config.get("architectures") or [None])[0]), None)
    if not (isinstance(named, type) and issubclass(named, T.PreTrainedModel)):
        known = next((m for m in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING) if type(settings) in m), None)
        if known is None:
            raise ValueError(f"no model of type '{settings.model_type}' is known")
        named = known[type(settings)]
        named = named[0] if isinstance(named, tuple) else named
    with torch.device("meta"), at_most(tensors, folder):
        return named._from_config(settings, attn_implementation="eager")


@contextlib.contextmanager
def at_most(tensors: int, folder: Path) -> Iterator[None]:
    """Stop a class that builds more modules than a model of so many tensors can have: no size is believed.

    The limit is far above any model's, and raises CheckpointError.
    """
    seen, most = 0, MODULES_AT_LEAST + MODULES_EACH * tensors

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > most:
            raise CheckpointError(
                f"{folder / 'config.json'}: describes a model of more than {most} modules, which the tensors beside it "
                "cannot fill; fetch the folder again"
            )

    handle = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What transformers says of weights and settings concerns nobody: what is wrong with them is an error here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _asked(model: Any, name: str) -> Any:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def kind_of(module: Any, leaf: str, dimensions: int) -> str:
    """How a module uses one of its parameters, see `Owner`."""
    from transformers.pytorch_utils import Conv1D

    if dimensions < 2:
        return "other"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, Conv1D):
        return "transposed"
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "linear"
    return _in_code(type(module), leaf)


@cache
def _in_code(module: type, leaf: str) -> str:
    """How a class's forward multiplies by a parameter: by `linear`, as (out, in), or by a product, as (in, out)."""
    try:
        code = inspect.getsource(inspect.unwrap(module.forward))
    except (OSError, TypeError, AttributeError):
        return "other"
    weight = rf"self\.{re.escape(leaf)}\b(\[[^\]]*\])?(?!\s*\.(t\(|T\b|mT\b|transpose|permute))"
    linear = re.search(rf"\blinear\({_FIRST},\s*{weight}", code)
    plain = re.search(rf"(@\s*|\b(bmm|matmul)\({_FIRST},\s*){weight}", code)
    return "other" if bool(linear) == bool(plain) else "linear" if linear else "transposed"
