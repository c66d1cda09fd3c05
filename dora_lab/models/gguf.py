"""A GGUF file as a plain float32 folder: dequantised by transformers, whatever quantisation its tensors have.

What comes out is another model than the one that was quantised, and its manifest says so.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
from contextlib import nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dora_lab.io.atomic import disk_errors, fsync, write_text
from dora_lab.io.errors import LoadError
from dora_lab.io.files import ADAPTER, parse_json, sha256
from dora_lab.models.open import MANIFEST

PACKAGES = ("torch", "transformers", "gguf")


def dequantise(file: Path, out: Path, source: dict[str, Any]) -> Path:
    """Write the model and tokenizer of a GGUF file to the new folder `out`; returns it.

    The folder is what save_pretrained writes in float32, with a manifest: the hash of every file, `source` with the
    hash of the GGUF file, the types that its tensors were stored in, and the versions that read it. It is there whole
    or not at all.
    Raises LoadError for a file that is no GGUF, or of a model or tokenizer that transformers cannot make of it.
    """
    kinds = _types(file)
    half = out.with_name(f".{out.name}.half")
    shutil.rmtree(half, ignore_errors=True)  # of a call that was cut short
    half.mkdir(parents=True)
    try:
        # transformers draws its bars wherever it is: a log gets none
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            model, tokenizer = _open(file)
            with disk_errors(half):
                model.save_pretrained(half)
                tokenizer.save_pretrained(half)
        _without_version(half / "config.json")
        about = source | {"gguf": file.name, "gguf_sha256": sha256(file), "types": kinds}
        files = {path.name: sha256(path) for path in sorted(half.iterdir())}
        packages = {name: version(name) for name in PACKAGES}
        manifest = {"schema": 1, "format": "model", "source": about, "files": files, "packages": packages}
        write_text(half / MANIFEST, _json(manifest))
        half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    fsync(out.parent)
    return out


def _types(file: Path) -> dict[str, int]:
    """How many tensors of each type a GGUF file holds."""
    from gguf import GGUFReader

    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise LoadError(f"{file}: not a GGUF file (it does not begin with 'GGUF'); fetch it again")
    try:
        tensors = GGUFReader(file).tensors
    except Exception as error:  # numpy's and the reader's own, of every kind
        raise LoadError(f"{file}: a broken GGUF file ({type(error).__name__}: {error}); fetch it again") from None
    found: dict[str, int] = {}
    for tensor in tensors:
        found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + 1
    return found


def _open(file: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (file.parent / ADAPTER).exists():
        raise LoadError(f"{file}: {ADAPTER} lies beside it, and transformers would put that adapter on; move it away")
    how: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **how
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
    except Exception as error:  # of any kind: an architecture that transformers has no table for, say
        raise LoadError(
            f"{file}: transformers {version('transformers')} makes no model of it ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); take a GGUF of an architecture that it dequantises"
        ) from None
    model, report = loaded
    if wrong := {key: report[key] for key in ("missing_keys", "mismatched_keys") if report.get(key)}:
        raise LoadError(f"{file}: its tensors do not fill the model ({wrong}); take another GGUF of it")
    return _plain(model), tokenizer


def _plain(model: Any) -> Any:
    """The same weights in a model that was never quantised: one that was, transformers does not save."""
    import torch

    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    plain.tie_weights()
    return plain


def _without_version(config: Path) -> None:
    """The same model has the same fingerprint whichever version of transformers wrote its configuration."""
    values = parse_json(config.read_bytes())
    values.pop("transformers_version", None)
    write_text(config, _json(values))


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"
