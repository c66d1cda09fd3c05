"""A saved transformers model opened from a folder: safetensors alone, no code of its own, whole and finite."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lab.io.errors import CheckpointError
from dora_lab.io.files import INDEX, SINGLE, header, read_object, verify, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "dora_lab.json"  # in folders that the lab wrote: {"files": {name: sha256}}
# sizes that no model is without, and that transformers, which builds what it is told, takes below 1 as well
SIZES = (
    "vocab_size", "hidden_size", "d_model", "n_embd", "intermediate_size", "num_hidden_layers", "n_layer",
    "encoder_layers", "decoder_layers", "num_attention_heads", "n_head", "num_key_value_heads",
    "max_position_embeddings", "n_positions",
)  # fmt: skip


def open_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The causal language model of a folder in a torch dtype ("float32", ...; "auto" is the file's).

    Raises CheckpointError, in one line, for pickled weights, a model that asks for code of its own, a broken or foreign
    file, and weights that do not fill the model or are not finite.
    """
    from transformers import AutoModelForCausalLM

    return fill(folder, AutoModelForCausalLM, dtype, refuse_unsafe(folder))


def unfilled(folder: Path, tensors: int) -> PreTrainedModel:
    """The causal language model of a folder with so many tensors as its class builds it, on the meta device.

    Raises CheckpointError for a configuration that no such model can have, for quantised weights, and where names of
    tensors and of the model's parameters are not the same.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dora_lab.models.layout import Layout, at_most

    settings = _call(folder, AutoConfig.from_pretrained)
    if (quantised := getattr(settings, "quantization_config", None)) is not None:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise CheckpointError(
            f"{folder}: its weights are quantised ({getattr(how, 'value', how)}), and what is trained here is not; "
            "give the model that it was made from, or dequantise it: model.dequantize().save_pretrained(OUT)"
        )
    with torch.device("meta"), at_most(tensors, folder):
        try:
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        except CheckpointError:
            raise
        except Exception as error:  # of any kind, as each class has its own
            raise CheckpointError(
                f"{folder}: config.json describes no causal language model ({_said(error)})"
            ) from None
    layout = Layout(model)
    held = {key: shape for file in weight_files(folder) for key, (_, shape) in header(file).items()}
    left = [key for key in held if not layout.has(key)]
    _refuse_unfit(folder, model, layout.unfilled(held), left, layout.unlike(held))
    return model


def open_as_saved(folder: Path) -> PreTrainedModel:
    """The model of a folder, of the class that its config.json names in `architectures`, in the file's type.

    Raises CheckpointError as `open_model` does, and for a class that is not transformers' own.
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
    return fill(folder, kind, "auto", tensors)


def fill(folder: Path, kind: Any, dtype: str, tensors: int, *, drawn: str | None = None, **how: Any) -> PreTrainedModel:
    """The model of a folder with so many tensors as a class; no tensor may be left over: half a model trains, too.

    drawn: the beginning of the names that the folder may leave out, and then all of them: transformers draws these.
    """
    import torch

    from dora_lab.models.layout import at_most, quiet

    wide = getattr(torch, dtype) if dtype != "auto" else "auto"
    # with another shape transformers' own error says neither which nor how; what it prints is said below
    how |= {"dtype": wide, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with at_most(tensors, folder), quiet():
        model, report = _call(folder, kind.from_pretrained, **how)
    missing = {*report["missing_keys"]}
    if drawn is not None and missing == {name for name, _ in model.named_parameters() if name.startswith(drawn)}:
        missing = set()
    _refuse_unfit(folder, model, missing, report.get("unexpected_keys") or (), report.get("mismatched_keys") or ())
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):  # quantised numbers are whole
            raise CheckpointError(f"{folder}: '{name}' holds numbers that are not finite; fetch the model again")
    return model


def refuse_not_finite(folder: Path, model: PreTrainedModel) -> None:
    """Read a folder's weights one by one, not kept; raises CheckpointError for one of `model`'s that is not finite.

    Masks that old files hold beside the parameters may be infinite.
    """
    import torch
    from safetensors import safe_open

    from dora_lab.models.layout import Layout

    layout = Layout(model)
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
                if layout.parameter(key)[0] is not None and not bool(torch.isfinite(file.get_tensor(key)).all()):
                    raise CheckpointError(f"{path}: '{key}' holds numbers that are not finite; fetch the model again")


def _refuse_unfit(
    folder: Path, model: Any, missing: Collection[str], left: Collection[str], unlike: Collection[tuple[Any, ...]]
) -> None:
    """Raises CheckpointError for parameters that no tensor fills, for tensors that fill none, and for those of another
    shape: (name, shape in the file, in the model)."""
    name = type(model).__name__
    if missing:
        raise CheckpointError(
            f"{folder}: the weights do not fill the model: {len(missing)} of a {name}'s parameters, the first is "
            f"'{min(missing)}', are not in the file; fetch the model again, or correct config.json"
        )
    if unlike:
        key, stored, wanted = min(unlike)
        raise CheckpointError(
            f"{folder}: the weights do not fill the model: '{key}' is {tuple(stored)} in the file and {tuple(wanted)} "
            f"in a {name} of config.json; fetch the model again, or correct config.json"
        )
    left = [key for key in left if not key.endswith(".masked_bias")]  # a constant in old files of GPT-2 and GPT-Neo
    if left:
        raise CheckpointError(
            f"{folder}: {len(left)} of the file's tensors, the first is '{min(left)}', have no place in a {name}; "
            "correct config.json (architectures, number of layers), or fetch the model again"
        )


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
    _refuse_sizes(config, folder / "config.json")
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder}: config.json asks for code of its own (auto_map: {sorted(config['auto_map'])}); the lab runs no "
            "code from a model's folder: use a model type that transformers knows"
        )
    if not (files := weight_files(folder)):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        what = f"only {pickles[0]}: a pickle can run code when it is read; convert it" if pickles else "give a model's"
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} in it; {what}")
    return sum(len(header(file)) for file in files)


def _refuse_sizes(config: dict[str, Any], file: Path, within: str = "") -> None:
    """Raises CheckpointError for a size that is no number above 0; a model's parts have objects of their own."""
    for name, value in config.items():
        if name in SIZES and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CheckpointError(
                f"{file}: {within}{name} = {value!r:.40} is no size (1, 2, ...); correct it, or fetch the model again"
            )
        if name.endswith("_config") and isinstance(value, dict):
            _refuse_sizes(value, file, f"{within}{name}.")


def _said(error: Exception) -> str:
    """What an error says, on one line; the reason often stands in the second."""
    return " ".join(str(error).split())[:400]


def _call(folder: Path, opened: Any, **how: Any) -> Any:
    try:
        return opened(folder, local_files_only=True, trust_remote_code=False, **how)
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: transformers, tokenizers and safetensors each have their own
        said = _said(error)
        if "trust_remote_code" in said:
            said = "it asks for code of its own, and the lab runs no code from a model's folder"
        raise CheckpointError(f"{folder}: cannot be opened ({type(error).__name__}: {said})") from None
