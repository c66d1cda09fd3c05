"""Adapter files as one neutral value: PEFT's folders, the DoRA authors' release, LyCORIS / ComfyUI files.

- "peft": a folder, lora_A and lora_B (lora_embedding_A and _B), lora_magnitude_vector (out,);
- "authors": a folder, lora_A and lora_B, weight_m_wdecomp.weight (out, 1), pickled in the release;
- "lycoris": a safetensors file, lora_down, lora_up, alpha, dora_scale (out, 1); one of (1, in) is refused.

What a file holds and this module does not understand is refused by name: an adapter that is read in part is another
function. Shape suffixes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dora_lab.formats.shards import read_pickle
from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import header, inside, parse_json, refuse_what_is_no_weights
from dora_lab.spec import did_you_mean

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every key in a PEFT file


@dataclass(frozen=True)
class Factors:
    """One adapted module, on the CPU, for the (out, in) view of its base weight.

    Raises CheckpointError, on construction, for shapes that do not belong together and numbers that are not finite.
    """

    A: Tensor | None  # (rank, in); None where only the magnitude is trained
    B: Tensor | None  # (out, rank)
    scaling: float  # s: the update is s B A
    magnitude: Tensor | None = None  # (out,); None for LoRA
    kind: str = "linear"  # or "conv1d" (weight stored as (in, out)), "embedding" (the same), "conv" (flattened)

    def __post_init__(self) -> None:
        if (self.A is None) != (self.B is None):
            raise CheckpointError(f"lora_{'A' if self.A is None else 'B'} is missing")
        if self.A is None and self.magnitude is None:
            raise CheckpointError("has neither factors nor a magnitude")
        if self.A is not None and self.B is not None:
            if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
                raise CheckpointError(f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} have no common rank")
            if self.magnitude is not None and self.magnitude.shape != self.B.shape[:1]:
                raise CheckpointError(f"{self.magnitude.numel()} magnitudes for {self.B.shape[0]} output features")
        for name, tensor in (("A", self.A), ("B", self.B), ("magnitude", self.magnitude)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{name} holds numbers that are not finite")
        if not math.isfinite(self.scaling):
            raise CheckpointError(f"its scale is {self.scaling}")


@dataclass(frozen=True)
class Adapter:
    """A whole adapter file."""

    format: str  # "peft", "authors" or "lycoris"
    layers: dict[str, Factors]  # module name in the base -> factors
    saved: dict[str, Tensor] = field(default_factory=dict)  # parameter name in the base -> its replacement
    config: dict[str, Any] = field(default_factory=dict)  # the file's own configuration

    @property
    def method(self) -> str:
        """ "dora" if there are magnitudes, else "lora"."""
        return "dora" if any(layer.magnitude is not None for layer in self.layers.values()) else "lora"


def read_adapter(path: Path, modules: Iterable[str] = (), *, allow_pickle: bool = False) -> Adapter:
    """Read an adapter folder (PEFT's or the authors') or a LyCORIS file; the format is recognised by its keys.

    modules: names of the base's modules; needed for LyCORIS, whose keys write a dot and an underscore alike.
    allow_pickle: read ``adapter_model.bin`` where there is no safetensors file (tensors only, ``weights_only=True``).

    Raises CheckpointError for anything missing, broken, ambiguous, or beyond what the lab computes.
    """
    path = Path(path)
    if path.is_dir():
        config, file = _read_config(inside(path, CONFIG, path)), _weights_in(path)
    else:
        config, file = {}, path
    tensors = read_tensors(file, allow_pickle=allow_pickle)
    keys = " ".join(tensors)
    if "dora_scale" in keys or "lora_down" in keys:
        return Adapter("lycoris", _lycoris(file, tensors, tuple(modules)), {}, config)
    if not path.is_dir():
        raise CheckpointError(f"{path}: give the folder that holds {CONFIG} and {WEIGHTS}, not the file alone")
    if "weight_m_wdecomp" in keys:
        return Adapter(
            "authors", _from_keys(file, tensors, _authors_settings(path, config), "weight_m_wdecomp")[0], {}, config
        )
    layers, saved = _from_keys(file, tensors, _peft_settings(path, config), "lora_magnitude_vector")
    magnitudes = [name for name, layer in layers.items() if layer.magnitude is not None]
    if config.get("use_dora") and len(magnitudes) < len(layers):
        lost = next(name for name in layers if name not in magnitudes)
        raise CheckpointError(
            f"{file}: use_dora is true but '{lost}' has no lora_magnitude_vector: without it DoRA is LoRA"
        )
    if magnitudes and not config.get("use_dora"):
        raise CheckpointError(
            f"{file}: '{magnitudes[0]}' has a magnitude but use_dora is not true in {CONFIG}; correct it"
        )
    return Adapter("peft", layers, saved, config)


def read_tensors(file: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; CheckpointError says what the file is if it is something else."""
    refuse_what_is_no_weights(file)
    if file.suffix in (".bin", ".pt", ".pth"):
        if not allow_pickle:
            raise CheckpointError(
                f"{file}: a pickle can run code when it is read; convert it to safetensors, or allow_pickle"
            )
        return read_pickle(file)
    header(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None


def write_config(layers: Mapping[str, Factors], format: str, targets: list[str], **more: Any) -> dict[str, Any]:
    """The `adapter_config.json` of layers; ranks and scales that differ go into patterns."""
    ranks = {name: layer.A.shape[0] for name, layer in layers.items() if layer.A is not None}
    if not ranks:
        raise CheckpointError(f"an adapter without factors has no {format} form")
    alphas = {name: layers[name].scaling * rank for name, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dora = any(layer.magnitude is not None for layer in layers.values())
    config: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "bias": "none", "inference_mode": True, **more}
    config |= {"fan_in_fan_out": any(layer.kind == "conv1d" for layer in layers.values()), "target_modules": targets}
    odd = {name for name in ranks if (ranks[name], alphas[name]) != (rank, alpha)}
    bare = sorted(name for name, layer in layers.items() if layer.A is None)
    if format == "authors":
        if odd:
            raise CheckpointError(f"the authors' format holds one rank and alpha; '{min(odd)}' has others")
        leaves = sorted({name.rpartition(".")[2] for name in bare})
        return config | {"peft_type": "DORA", "Wdecompose_target_modules": leaves or None, "dora_simple": True}
    if bare:
        raise CheckpointError(
            f"PEFT cannot hold a magnitude without factors ('{bare[0]}'); save in the authors' format"
        )
    config |= {"peft_type": "LORA", "use_dora": dora, "use_rslora": False}
    config["rank_pattern"] = {re.escape(name): ranks[name] for name in sorted(odd)}
    config["alpha_pattern"] = {re.escape(name): alphas[name] for name in sorted(odd)}
    return config


def write_tensors(
    layers: Mapping[str, Factors], format: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Keys and tensors of layers in a format; `shapes` are those of the base weights, by module name."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key, extra = f"{PREFIX}{name}.", len(shapes[name]) - 2
        if layer.A is not None and layer.B is not None:
            if layer.kind == "embedding":
                found |= {f"{key}lora_embedding_A": layer.A, f"{key}lora_embedding_B": layer.B}
            else:
                A = layer.A.view(-1, *shapes[name][1:]) if layer.kind == "conv" else layer.A
                found |= {f"{key}lora_A.weight": A, f"{key}lora_B.weight": layer.B.view(*layer.B.shape, *(1,) * extra)}
        if layer.magnitude is not None and format == "authors":
            found[f"{key}weight_m_wdecomp.weight"] = layer.magnitude[:, None]
        elif layer.magnitude is not None:
            shape = (1, -1, *(1,) * extra) if layer.kind == "conv" else (-1,)
            found[f"{key}lora_magnitude_vector"] = layer.magnitude.view(shape)
    return {key: tensor.contiguous() for key, tensor in found.items()}


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; an adapter folder holds {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def _weights_in(folder: Path) -> Path:
    found = [file for name in (WEIGHTS, PICKLE) if (file := inside(folder, name, folder)).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: no {WEIGHTS} in it")
    return found[0]


# fields of a PEFT configuration that say how it was trained, or where from, and not what it computes
_SILENT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "runtime_config",
}  # fmt: skip
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others (pissa, olora, corda, loftq) change the base


@dataclass(frozen=True)
class _Settings:
    """Scale of every module, from a configuration."""

    rank: int
    alpha: float
    rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    transposed: bool = False

    def of(self, module: str) -> tuple[int, float]:
        """(rank, scale) of one module."""
        rank = next((value for key, value in self.ranks.items() if _matches(key, module)), self.rank)
        alpha = next((value for key, value in self.alphas.items() if _matches(key, module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _peft_settings(folder: Path, config: dict[str, Any]) -> _Settings:
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {config.get('peft_type')!r}; LORA (with or without use_dora) is read"
        )
    strange = [name for name, value in config.items() if name not in _SILENT and value]
    strange += ["bias"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights", True)
    strange += ["init_lora_weights"] if not any(start is known or start == known for known in _STARTS) else []
    if strange:
        named = ", ".join(f"{name} = {config[name]!r}" for name in strange)
        raise CheckpointError(
            f"{where}: {named}: changes what the adapter computes in a way that is not supported here"
        )
    return _settings(where, config)


def _authors_settings(folder: Path, config: dict[str, Any]) -> _Settings:
    return _settings(folder / CONFIG, config)


def _settings(where: Path, config: dict[str, Any]) -> _Settings:
    def positive(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"{where}: {name} = {value!r} must be a positive number")
        return value

    patterns: list[dict[str, Any]] = []
    for name, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        table = config.get(name) or {}
        if not isinstance(table, dict):
            raise CheckpointError(f"{where}: {name} = {table!r} must be a JSON object")
        for key, value in table.items():
            positive(f"{name}[{key!r}]", value, kinds)
            try:
                re.compile(key)
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{where}: {name}: {key!r} is not a regular expression: {error}") from None
        patterns.append(table)
    rank = positive("r", config.get("r"), (int,))
    alpha = positive("lora_alpha", config.get("lora_alpha"), (int, float))
    return _Settings(
        rank, alpha, bool(config.get("use_rslora")), patterns[0], patterns[1], bool(config.get("fan_in_fan_out"))
    )


_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|weight_m_wdecomp)"
    r"(\.weight)?"
)


def _from_keys(
    file: Path, tensors: Mapping[str, Tensor], settings: _Settings, magnitude: str
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Layers, and the whole tensors beside them, of a file with PEFT's keys."""
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{file}: key '{key}' does not begin with '{PREFIX}'")
        if (match := _KEY.fullmatch(key[len(PREFIX) :])) is not None:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif "lora_" in key:
            raise CheckpointError(f"{file}: key '{key}' is of a kind of adapter that is not supported here")
        else:
            saved[key[len(PREFIX) :].replace(".modules_to_save.default.", ".")] = tensor
    layers: dict[str, Factors] = {}
    for module, part in parts.items():
        rank, scaling = settings.of(module)
        try:
            layers[module] = _factors(part, scaling, magnitude, settings.transposed)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: '{module}': {error}") from None
        A = layers[module].A
        if A is not None and A.shape[0] != rank:
            raise CheckpointError(f"{file}: '{module}' has rank {A.shape[0]}, its configuration says {rank}")
    if not layers:
        raise CheckpointError(f"{file}: no adapter in it; its keys begin with {sorted(tensors)[:3]}")
    return layers, saved


def _factors(part: Mapping[str, Tensor], scaling: float, magnitude: str, transposed: bool) -> Factors:
    kind = "conv1d" if transposed else "linear"
    A, B = part.get("lora_A"), part.get("lora_B")
    if "lora_embedding_A" in part or "lora_embedding_B" in part:
        kind, A, B = "embedding", part.get("lora_embedding_A"), part.get("lora_embedding_B")
    if A is not None and A.dim() > 2:
        kind, A, B = "conv", A.flatten(1), None if B is None else B.flatten(1)
    m = part.get(magnitude)
    if m is not None and m.numel() != max(m.shape, default=0):
        raise CheckpointError(f"a magnitude of shape {tuple(m.shape)}: it has one number per output feature")
    return Factors(A, B, scaling, None if m is None else m.reshape(-1), kind)


def _lycoris(file: Path, tensors: Mapping[str, Tensor], modules: tuple[str, ...]) -> dict[str, Factors]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        flat, _, part = key.partition(".")
        if part.removesuffix(".weight") not in ("lora_down", "lora_up", "alpha", "dora_scale"):
            raise CheckpointError(f"{file}: key '{key}' is of a kind of adapter that is not supported here")
        parts.setdefault(flat, {})[part.removesuffix(".weight")] = tensor
    layers: dict[str, Factors] = {}
    for flat, part in parts.items():
        try:
            layers[_unflatten(flat, modules)] = _lycoris_factors(part)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: '{flat}': {error}") from None
    return layers


def _lycoris_factors(part: Mapping[str, Tensor]) -> Factors:
    A, B = part.get("lora_down"), part.get("lora_up")
    if A is None or B is None:
        raise CheckpointError(f"lora_{'down' if A is None else 'up'} is missing")
    kind = "conv" if A.dim() > 2 else "linear"
    channels = A.shape[1]
    A_RI, B_OR = A.flatten(1), B.flatten(1)
    alpha = float(part["alpha"]) if "alpha" in part else float(A_RI.shape[0])
    m, out = part.get("dora_scale"), B_OR.shape[0]
    if m is not None:
        if m.dim() < 2 and out == channels:
            raise CheckpointError(f"dora_scale {tuple(m.shape)} of a square layer does not say its axis: out or in")
        if m.dim() >= 2 and m.shape[0] == 1 and out != 1:
            raise CheckpointError(
                f"dora_scale {tuple(m.shape)} has one magnitude per input feature; DoRA as published has one per "
                f"output ({out}, 1): another function, trained with wd_on_output=False, which cannot be converted"
            )
        if m.numel() != out:
            raise CheckpointError(f"dora_scale {tuple(m.shape)} fits neither axis of a layer with {out} outputs")
    return Factors(A_RI, B_OR, alpha / A_RI.shape[0], None if m is None else m.reshape(-1), kind)


def _unflatten(flat: str, modules: tuple[str, ...]) -> str:
    """The module that a key with underscores for dots means; refused when there is none, or more than one."""
    if not modules:
        raise CheckpointError("its name writes dots as underscores: give the base's module names to resolve it")
    short = re.sub(r"^(lora_unet|lora_te\d?|lora_transformer|lycoris|lora)_", "", flat)
    found = [name for name in modules if name.replace(".", "_") in (flat, short)]
    if len(found) != 1:
        meant = f"could be {', '.join(found)}" if found else did_you_mean(short, [n for n in modules if n][:40])
        raise CheckpointError(f"names {'several modules' if found else 'no module'} of the base: {meant}")
    return found[0]
