"""A saved transformers model opened from a folder: safetensors alone, no code of its own, whole and finite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import header, inside, read_object, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "dora_lab.json"  # in folders that the lab wrote: {"files": {name: sha256}}
INDEX = "model.safetensors.index.json"


def open_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The causal language model of a folder in a torch dtype ("float32", ...; "auto" is the file's).

    Raises CheckpointError, in one line, for pickled weights, a model that asks for code of its own, a broken or foreign
    file, and weights that do not fill the model or are not finite.
    """
    from transformers import AutoModelForCausalLM

    return fill(folder, AutoModelForCausalLM, dtype, refuse_unsafe(folder))[0]


def unfilled(folder: Path, tensors: int) -> PreTrainedModel:
    """The causal language model of a folder with so many tensors as its class builds it, on the meta device.

    Raises CheckpointError for a configuration that no such model can have.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dora_lab.models.layout import at_most

    settings = _call(folder, AutoConfig.from_pretrained)
    with torch.device("meta"), at_most(tensors, folder):
        try:
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: config.json describes no causal language model ({str(error).splitlines()[0]:.300})"
            ) from None


def open_as_saved(folder: Path) -> PreTrainedModel:
    """The model of a folder, of the class that its config.json names in `architectures`, in the file's type.

    Raises CheckpointError as `open_model` does, and for a class that is not transformers' own or that leaves a part of
    the weights out: what is written again has to be whole.
    """
    import transformers

    tensors = refuse_unsafe(folder)
    names = read_object(Path(folder), "config.json").get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name is None:
        raise CheckpointError(
            f"{folder}: config.json names no class in 'architectures'; add that which saved the model"
        )
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder}: architectures = {names!r} in config.json is no model that transformers knows")
    model, report = fill(folder, kind, "auto", tensors)
    if left := sorted(report.get("unexpected_keys") or ()):
        raise CheckpointError(
            f"{folder}: {len(left)} tensors of the file, the first is '{left[0]}', have no place in a {name}; correct "
            "'architectures' in config.json"
        )
    return model


def fill(
    folder: Path, kind: Any, dtype: str, tensors: int, *, drawn: str | None = None, **how: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model, transformers' report of the loading) of a folder with so many tensors as a class.

    drawn: the beginning of the names that the folder may leave out, and then all of them: transformers draws these.
    """
    import torch

    from dora_lab.models.layout import at_most

    wide = getattr(torch, dtype) if dtype != "auto" else "auto"
    how |= {"dtype": wide, "use_safetensors": True, "output_loading_info": True}
    with at_most(tensors, folder):
        model, report = _call(folder, kind.from_pretrained, **how)
    missing = {*report["missing_keys"]}
    if drawn is not None and missing == {name for name, _ in model.named_parameters() if name.startswith(drawn)}:
        report["missing_keys"] = missing = set()
    if wrong := {key: report[key] for key in ("missing_keys", "mismatched_keys") if report.get(key)}:
        raise CheckpointError(f"{folder}: the weights do not fill the model ({wrong}); fetch the model again")
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):  # quantised numbers are whole
            raise CheckpointError(f"{folder}: '{name}' holds numbers that are not finite; fetch the model again")
    return model, report


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; raises CheckpointError for one that asks for code of its own or is broken."""
    from transformers import AutoTokenizer

    return _call(folder, AutoTokenizer.from_pretrained)


def refuse_unsafe(folder: Path) -> int:
    """Look at a model's folder before transformers does; returns how many tensors its files hold.

    Raises CheckpointError as `open_model` does.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        verify(folder / MANIFEST)
    config = read_object(folder, "config.json")
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
    tensors = sum(len(header(inside(folder, file.name, folder))) for file in files)
    if (folder / INDEX).is_file():
        for name in sorted(set(map(str, dict(read_object(folder, INDEX).get("weight_map") or {}).values()))):
            inside(folder, name, folder / INDEX)
    return tensors


def _call(folder: Path, opened: Any, **how: Any) -> Any:
    try:
        return opened(folder, local_files_only=True, trust_remote_code=False, **how)
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: transformers, tokenizers and safetensors each have their own
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if "trust_remote_code" in str(error):
            first = "it asks for code of its own, and the lab runs no code from a model's folder"
        raise CheckpointError(f"{folder}: cannot be opened ({type(error).__name__}: {first:.300})") from None
