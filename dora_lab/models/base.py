"""Base model and tokenizer for a spec: the embedded one, a local folder, or a hub id at a pinned commit.

Torch is only imported to load a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dora_lab import mini
from dora_lab.io.errors import CheckpointError, LoadError
from dora_lab.io.files import hash_files
from dora_lab.io.hub import snapshot
from dora_lab.mini import llava, vl
from dora_lab.models.fetch import PACKAGES, fetched
from dora_lab.models.open import open_model, open_tokenizer, refuse_unsafe, unfilled
from dora_lab.models.rescale import rescale
from dora_lab.spec import Model, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

EMBEDDED = {"mini": mini.folder, "mini_vl": vl.folder, "mini_llava": llava.folder}
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.safetensors*")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", "non_lora_trainables.*", "dora_lab.json")
CONVERT = 'python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained(IN).save_pretrained(OUT)"'


def hash_model(folder: Path) -> str:
    """SHA-256 (64 hex digits) of a saved model: its configuration, tokenizer and safetensors files."""
    found = _matching(folder, MODEL_FILES)
    if "config.json" not in found:
        raise LoadError(f"{folder} has no config.json; give the folder of a model saved by save_pretrained")
    _refuse_pickles(folder)
    return hash_files(found)


def hash_adapter(folder: Path) -> str:
    """SHA-256 (64 hex digits) of a saved adapter's files."""
    found = _matching(folder, ADAPTER_FILES)
    if "adapter_config.json" not in found or not any(name.startswith("adapter_model.") for name in found):
        raise LoadError(f"{folder}: no adapter_config.json and adapter_model.safetensors (or .bin) in it")
    return hash_files(found)


def model_identity(model: Model, model_dir: Path | None) -> dict[str, Any]:
    """What identifies the base as it is on this machine now: the hash of a local one, the commit of the hub's."""
    if model_dir is not None or model.name in (*EMBEDDED, *PACKAGES):
        return {"revision": model.revision, "sha256": hash_model(model_folder(model, model_dir))}
    return {"revision": model.revision, "sha256": None}  # a hub commit is its own hash


def adapter_identity(model: Model, adapter_dir: Path | None) -> dict[str, Any]:
    """The same of the adapter that `model` names."""
    sha256 = None if adapter_dir is None else hash_adapter(adapter_folder(model, adapter_dir))
    return {"revision": model.adapter_revision, "sha256": sha256}


def model_and_tokenizer(
    spec: Spec, model_dir: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """The base model of `spec` in `model.dtype` and its tokenizer, from `model_dir`, the package or the hub.

    The tokenizer pads on the left with the token that `model.pad` says. Raises LoadError for weights that do not fill
    the model, and for a tokenizer that answers could not end with or that ends every text by itself.
    """
    folder = model_folder(spec.model, model_dir)
    try:
        if spec.model.family == "vl_bart":
            return _vl_bart(spec, folder)
        if spec.model.family == "llava":
            return _llava(spec, folder)
        refuse_unsafe(folder)
        tokenizer = open_tokenizer(folder)
        _prepare_tokenizer(tokenizer, spec.model.pad, folder)
        model = open_model(folder, spec.model.dtype)  # transformers' own default is the file's type
        if spec.model.rescale:
            rescale(model, spec.model.rescale)
    except CheckpointError as error:
        raise LoadError(str(error)) from None
    _refuse_foreign(tokenizer, model, folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def outline_and_tokenizer(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `model_and_tokenizer` gives of a folder, the model on the meta device: everything but its weights.

    Raises LoadError for what the weights are not needed to refuse.
    """
    hash_model(folder)
    try:
        tensors = refuse_unsafe(folder)
        tokenizer = open_tokenizer(folder)
        _prepare_tokenizer(tokenizer, "own", folder)
        model = unfilled(folder, tensors)
    except CheckpointError as error:
        raise LoadError(str(error)) from None
    _refuse_foreign(tokenizer, model, folder)
    return model, tokenizer


def _refuse_foreign(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> None:
    """Raises LoadError for special tokens that the model has no embedding of."""
    rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
    for name in ("pad", "bos", "eos"):
        if (number := cast("int | None", getattr(tokenizer, f"{name}_token_id"))) is not None and number >= rows:
            raise LoadError(
                f"{folder}: the tokenizer's {name} token '{getattr(tokenizer, f'{name}_token')}' has id {number}, the "
                f"model has {rows} embeddings; resize them (resize_token_embeddings) and save the model"
                + (", or set model.pad to zero" if name == "pad" else "")
            )


def _vl_bart(spec: Spec, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """VL-BART of a folder with BART; texts begin and end with a token of their own, and are padded on the right."""
    from dora_lab.models.vl_bart import open_vl_bart

    model, tokenizer = open_vl_bart(folder, spec.data.feature_shape[1], spec.seed, spec.model.dtype)
    tokenizer.padding_side = "right"
    ids = cast("list[int]", tokenizer("a")["input_ids"])
    if tokenizer.pad_token_id is None or (ids[0], ids[-1]) != (tokenizer.bos_token_id, tokenizer.eos_token_id):
        raise LoadError(f"{folder}: the tokenizer does not begin and end texts as BART's does; save BART's with it")
    if spec.model.rescale or spec.model.pad != "own":
        raise LoadError(f"{folder}: model.rescale and model.pad are for causal models; leave them at their defaults")
    return model, tokenizer


def _llava(spec: Spec, folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA of a folder, with its processor in the tokenizer's place."""
    from dora_lab.models.llava import open_llava

    model, processor = open_llava(folder, spec.model.dtype)
    _prepare_tokenizer(words_of(processor), spec.model.pad, folder)
    model.config.pad_token_id = words_of(processor).pad_token_id
    return model, processor


def words_of(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer itself, of a processor its own."""
    return cast(Any, tokenizer).tokenizer if hasattr(tokenizer, "tokenizer") else cast(Any, tokenizer)


def token_policy(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The special tokens as a run uses them, for its record: text and id of each, and what is added to a text."""
    special = {
        name: {"text": getattr(tokenizer, f"{name}_token"), "id": getattr(tokenizer, f"{name}_token_id")}
        for name in ("pad", "bos", "eos")
    }
    ids = cast("list[int]", tokenizer("a")["input_ids"])
    begins = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return {**special, "adds_bos": begins, "padding_side": tokenizer.padding_side, "class": type(tokenizer).__name__}


def model_folder(model: Model, model_dir: Path | None = None) -> Path:
    """The local folder of a model: `model_dir`, the package's, or the hub cache (fetched at need, pinned)."""
    if model_dir is not None:
        found = hash_model(model_dir)
        if model.revision is not None and not found.startswith(model.revision):
            raise LoadError(f"{model_dir} has the fingerprint {found[:12]}, the spec asks for {model.revision}")
        return Path(model_dir)
    if model.name in EMBEDDED:
        return Path(EMBEDDED[model.name]())
    if model.name in PACKAGES:
        return fetched(model.name)
    files = [*MODEL_FILES, "*.model"]
    pin, instead = "--with model.revision=COMMIT", "give the folder of a saved model with --model-dir"
    folder = snapshot(model.name, model.revision, "model", files, pin, instead)
    _refuse_pickles(folder)
    return folder


def adapter_folder(model: Model, adapter_dir: Path | None = None) -> Path:
    """The local folder of the adapter that `model` names: `adapter_dir`, or the hub cache (fetched at need, pinned)."""
    if adapter_dir is not None:
        found = hash_adapter(adapter_dir)
        if model.adapter_revision is not None and not found.startswith(model.adapter_revision):
            raise LoadError(
                f"{adapter_dir} has the fingerprint {found[:12]}, the spec asks for {model.adapter_revision}"
            )
        return Path(adapter_dir)
    name, _, below = cast(str, model.adapter).partition(":")  # "org/name:folder/in/it"
    files = [f"{below}/{pattern}" if below else pattern for pattern in ADAPTER_FILES]
    folder = snapshot(name, model.adapter_revision, "model", files, "--revision COMMIT", "give its folder") / below
    hash_adapter(folder)
    return folder


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    found = sorted({file for pattern in patterns for file in Path(folder).glob(pattern) if file.is_file()})
    return {file.name: file for file in found}


def _refuse_pickles(folder: Path) -> None:
    if not any(Path(folder).glob("*.safetensors")):
        raise LoadError(
            f"{folder} has no *.safetensors; pickled weights (.bin, .pt) can run code and are not loaded: if you trust "
            f"them, convert them ({CONVERT}), put the tokenizer's files beside them, and give OUT with --model-dir"
        )


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, pad: str, where: Path) -> None:
    if tokenizer.eos_token_id is None:
        raise LoadError(f"{where}: the tokenizer has no end-of-sequence token; answers could not end")
    if not tokenizer.is_fast:
        raise LoadError(f"{where}: the tokenizer gives no character offsets; save it in the tokenizer.json format")
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        raise LoadError(f"{where}: the tokenizer ends every text; switch that off (add_eos_token=False) and save it")
    if pad == "zero":
        tokenizer.pad_token = cast(str, tokenizer.convert_ids_to_tokens(0))
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # the last token of every prompt stands next to the first one generated
