"""PEFT's folders and the DoRA authors' release, which has PEFT's keys but for the magnitude's.

- PEFT: lora_A and lora_B (lora_embedding_A and _B), lora_magnitude_vector (out,);
- the authors: lora_A and lora_B, weight_m_wdecomp.weight (out, 1), pickled in the release.

What a file holds and this module does not understand is refused by name: an adapter that is read in part is another
function. Shape suffixes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

from dora_lab.formats.neutral import CONFIG, PREFIX, Factors
from dora_lab.io.errors import CheckpointError
from dora_lab.spec import pattern_matches


def write_config(layers: Mapping[str, Factors], format: str, targets: list[str] | str, **more: Any) -> dict[str, Any]:
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
    # anchored: unanchored, a pattern means every module whose name ends in it
    config["rank_pattern"] = {f"^{re.escape(name)}": ranks[name] for name in sorted(odd)}
    config["alpha_pattern"] = {f"^{re.escape(name)}": alphas[name] for name in sorted(odd)}
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


def write_whole(
    format: str, kept: Mapping[str, Tensor], parameters: Collection[str], adapted: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What parameters that are saved whole add to configuration and tensors.

    PEFT saves modules whole (``modules_to_save``), and by themselves the biases of adapted modules or all there are.

    Args: kept: by name; parameters, adapted: names of the base's parameters, and of the modules that are adapted.
    Raises CheckpointError for what the format cannot hold.
    """
    if kept and format != "peft":
        raise CheckpointError(f"'{min(kept)}' is saved whole, which format '{format}' cannot hold")
    owners = {name: name.rpartition(".")[0] for name in parameters}
    partly = {*adapted, *(owners[name] for name in parameters if name not in kept)}
    modules = sorted({owners[name] for name in kept} - partly)
    for module in modules:
        if any(owner != module and f"{owner}.".startswith(f"{module}.".lstrip(".")) for owner in owners.values()):
            raise CheckpointError(f"'{module}' is saved whole but for the modules in it, which PEFT has no form for")
    loose = {name for name in kept if owners[name] in partly}
    biases = {name for name in parameters if name.rpartition(".")[2] == "bias"}
    bias = "lora_only" if loose == {name for name in biases if owners[name] in adapted} else "all"
    if loose and bias == "all" and not (loose <= biases <= kept.keys()):
        raise CheckpointError(f"'{min(loose)}' is saved whole; PEFT takes all of a module's parameters, or all biases")
    config: dict[str, Any] = {"bias": bias} if loose else {}
    inside = {name: f"{owners[name]}.base_layer.bias" for name in kept if owners[name] in adapted}
    tensors = {PREFIX + inside.get(name, name): tensor for name, tensor in kept.items()}
    return config | ({"modules_to_save": modules} if modules else {}), tensors


def read_peft(
    folder: Path, file: Path, tensors: Mapping[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Layers, and the parameters saved whole beside them, of PEFT's LoRA or DoRA. Raises CheckpointError."""
    layers, saved = _from_keys(file, tensors, _peft_settings(folder, config), "lora_magnitude_vector")
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
    return layers, saved


def read_authors(folder: Path, file: Path, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Factors]:
    """Layers of the authors' release. Raises CheckpointError."""
    return _from_keys(file, tensors, _settings(folder / CONFIG, config), "weight_m_wdecomp")[0]


# fields of a PEFT configuration that say how it was trained, or where from, and not what it computes
_SILENT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "runtime_config",
    "corda_config", "loftq_config",  # read by the starts of these names alone, which _STARTS does not have
}  # fmt: skip
_BIASES = ("all", "lora_only")
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others (pissa, olora, corda, loftq) change the base


def trains_biases(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says that biases of adapted modules were trained, so that the file has to hold them."""
    return config.get("bias") in _BIASES


MOST_PATTERNS = 20_000  # of one kind in a configuration
LONG, MOST_WAYS = 64, 1e7  # characters of a module's name, and what may be tried on it: a second
_REPEATS = tuple(getattr(_parser, f"{how}_REPEAT", None) for how in ("MAX", "MIN", "POSSESSIVE"))


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
        rank = next((value for key, value in self.ranks.items() if pattern_matches(key, module)), self.rank)
        alpha = next((value for key, value in self.alphas.items() if pattern_matches(key, module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def _peft_settings(folder: Path, config: dict[str, Any]) -> _Settings:
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {config.get('peft_type')!r}; LORA (with or without use_dora) is read"
        )
    strange = [name for name, value in config.items() if name not in _SILENT and value]
    strange += ["bias"] if config.get("bias", "none") not in ("none", *_BIASES) else []
    start = config.get("init_lora_weights", True)
    strange += ["init_lora_weights"] if not any(start is known or start == known for known in _STARTS) else []
    if strange:
        named = ", ".join(f"{name} = {config[name]!r}" for name in strange)
        raise CheckpointError(
            f"{where}: {named}: changes what the adapter computes in a way that is not supported here"
        )
    return _settings(where, config)


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
        if len(table) > MOST_PATTERNS:
            raise CheckpointError(f"{where}: {name}: {len(table)} patterns; more than {MOST_PATTERNS} are not read")
        for key, value in table.items():
            positive(f"{name}[{key!r}]", value, kinds)
            try:
                re.compile(key)
                ways = ways_to_match(key)
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{where}: {name}: {key!r} is not a regular expression: {error}") from None
            if ways > MOST_WAYS:
                raise CheckpointError(
                    f"{where}: {name}: {key!r:.200} can match in too many ways to be tried: write the modules' names"
                )
        patterns.append(table)
    for name in ("use_rslora", "fan_in_fan_out", "use_dora"):
        if not isinstance(value := config.get(name), bool | None):  # PEFT would take the text "false" for true
            raise CheckpointError(f"{where}: {name} = {value!r:.40} must be true or false")
    rank = positive("r", config.get("r"), (int,))
    alpha = positive("lora_alpha", config.get("lora_alpha"), (int, float))
    return _Settings(
        rank, alpha, bool(config.get("use_rslora")), patterns[0], patterns[1], bool(config.get("fan_in_fan_out"))
    )


def ways_to_match(pattern: str) -> float:
    """A bound on what a backtracking search tries for a pattern on a name of `LONG` characters; never runs it."""
    return _ways(_parser.parse(pattern))


def _ways(tree: Any) -> float:
    """The product over what follows one another, the sum over alternatives; a repeat of what varies, to the power."""
    product = 1.0
    for operation, argument in tree:
        if operation is _parser.BRANCH:
            product *= sum(_ways(branch) for branch in argument[1])
        elif operation in _REPEATS:
            least, most, inner = argument
            times = min(int(most), LONG)
            once = _ways(inner)
            varied = once > 1 or any(one[0] in _REPEATS for one in inner)
            product *= (times - min(int(least), times) + 1) * (once**times if varied and times > 1 else once)
        elif operation is _parser.SUBPATTERN:
            product *= _ways(argument[-1])
        elif operation in (_parser.ASSERT, _parser.ASSERT_NOT):
            product *= _ways(argument[1])
        elif operation in (_parser.GROUPREF, _parser.GROUPREF_EXISTS, getattr(_parser, "ATOMIC_GROUP", None)):
            return math.inf  # nobody needs these in a name
        if product > MOST_WAYS:
            return math.inf
    return product


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
