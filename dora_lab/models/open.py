"""A saved transformers model opened from a folder: safetensors alone, no code of its own, whole and finite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import header, inside, parse_json, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "dora_lab.json"  # in folders that the lab wrote: {"files": {name: sha256}}
INDEX = "model.safetensors.index.json"


def open_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The causal language model of a folder in a torch dtype ("float32", ...; "auto" is the file's).

    Raises CheckpointError, in one line, for pickled weights, a model that asks for code of its own, a broken or foreign
    file, and weights that do not fill the model or are not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    refuse_unsafe(folder)
    kind = getattr(torch, dtype) if dtype != "auto" else "auto"
    model, report = _call(
        folder, AutoModelForCausalLM.from_pretrained, dtype=kind, use_safetensors=True, output_loading_info=True
    )
    if wrong := {key: report[key] for key in ("missing_keys", "mismatched_keys") if report.get(key)}:
        raise CheckpointError(f"{folder}: the weights do not fill the model ({wrong}); fetch the model again")
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{folder}: '{name}' holds numbers that are not finite; fetch the model again")
    return model


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; raises CheckpointError for one that asks for code of its own or is broken."""
    from transformers import AutoTokenizer

    return _call(folder, AutoTokenizer.from_pretrained)


def refuse_unsafe(folder: Path) -> None:
    """Look at a model's folder before transformers does; raises CheckpointError as `open_model` does."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        verify(folder / MANIFEST)
    config = _object(folder / "config.json")
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder}: config.json asks for code of its own (auto_map: {sorted(config['auto_map'])}); the lab runs no "
            "code from a model's folder: use a model type that transformers knows"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        what = f"only {pickles[0]}: a pickle can run code when it is read; convert it" if pickles else "give a model's"
        raise CheckpointError(f"{folder}: no *.safetensors in it; {what}")
    for file in files:
        header(inside(folder, file.name, folder))
    if (folder / INDEX).is_file():
        for name in sorted(set(map(str, dict(_object(folder / INDEX).get("weight_map") or {}).values()))):
            inside(folder, name, folder / INDEX)


def _object(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON {type(value).__name__}, expected an object; fetch the model again")
    return value


def _call(folder: Path, opened: Any, **how: Any) -> Any:
    try:
        return opened(folder, local_files_only=True, trust_remote_code=False, **how)
    except Exception as error:  # of any kind: transformers, tokenizers and safetensors each have their own
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if "trust_remote_code" in str(error):
            first = "it asks for code of its own, and the lab runs no code from a model's folder"
        raise CheckpointError(f"{folder}: cannot be opened ({type(error).__name__}: {first:.300})") from None
