"""The stages of a run, one function each: load, adapt, train, score. What one leaves, the next one takes.

Each writes what it found into the record; none knows how a run begins, ends or goes on: that is `run`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from dora_lab import distributed
from dora_lab.evaluation import instructed, pictured, protocols, text
from dora_lab.evaluation.evaluate import evaluate, prepare
from dora_lab.formats.live import load_adapter, save_trained
from dora_lab.io.errors import LoadError
from dora_lab.io.files import weight_files
from dora_lab.launch import inputs
from dora_lab.launch.runtime import Paths, Runtime
from dora_lab.methods.inject import inject, merge
from dora_lab.methods.saved import saved
from dora_lab.models.base import adapter_folder, model_and_tokenizer, model_folder, token_policy, words_of
from dora_lab.models.layout import Layout
from dora_lab.models.rescale import factor
from dora_lab.probing.callback import LLAMA_KINDS, DecompositionCallback
from dora_lab.runs import provenance
from dora_lab.runs.directory import RunDir
from dora_lab.spec import Spec
from dora_lab.tasks import sources
from dora_lab.training import fit
from dora_lab.training.trained_weights import fill_trained, trained_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


KINDS = {"decoder": None, "vl_bart": ("q_proj", "v_proj"), "llava": None}  # what is probed; None: what is trained


@dataclass
class Loaded:
    """What a run is made of, in memory; each stage leaves `model` as the next one needs it."""

    model: PreTrainedModel
    tokenizer: Any  # of a LLaVA its processor
    items: sources.Items
    text_NT: torch.Tensor | None  # of the base's pretraining, held out; see `evaluation.text`


def load(spec: Spec, paths: Paths, runtime: Runtime, run: RunDir) -> Loaded:
    """The inputs, if they are those that the run was begun with; the model lies on the processor.

    Raises LoadError for what cannot be had and ItemError for what the evaluation could not score with this model;
    ResumeError instead where the run had it before, or for other inputs.
    """
    provenance.reset_peak_memory()
    device = torch.cuda.get_device_name() if runtime.device == "cuda" else "cpu"
    with inputs.begun_is_kept(run):
        found = inputs.fingerprints(spec, paths)
        inputs.go_on_with(run, found, device=device, threads=runtime.threads)
        items = sources.items(spec, paths.data_dir)
        protocols.ready(spec)  # now, not after days of training
        model, tokenizer = model_and_tokenizer(spec, paths.model_dir)
        _, prepared = _asking(items)
        prepared(spec, model, tokenizer, items.split(spec.evaluation.split))  # what it could not score, likewise
        asked = spec.evaluation.text == "pretraining"
        words = words_of(tokenizer)
        text_NT = text.held_out(model_folder(spec.model, paths.model_dir), words) if asked else None
    if text_NT is not None:
        run.record(text_nll={**text.about(text_NT), "before": text.nll(model, text_NT)})
    tokens = {"pad_token": words.pad_token, "tokens": token_policy(words)}
    told = {
        "items": items.counts(),
        "sources": list(items.sources),
        "registered": provenance.registered(spec.experiment),
    }
    seen = {} if items.pictures is None else {"features": {"sha256": items.pictures.sha256}}
    seen |= {} if items.images is None else {"images": items.images}
    run.record(inputs={**found, **told, **tokens, **seen})
    return Loaded(model, tokenizer, items, text_NT)


def adapt(spec: Spec, paths: Paths, runtime: Runtime, run: RunDir, loaded: Loaded) -> None:
    """Put the adapter on the model, in place, and the model on the device; cut over the processes with `shard`."""
    if not runtime.shard:
        loaded.model.to(runtime.device)  # type: ignore[arg-type]
    params = _put_on(loaded.model, spec, paths, runtime)
    run.record(params=params, processes=distributed.size(), sharded=runtime.shard)
    if runtime.shard:
        distributed.shard(loaded.model, str(runtime.device))


def train(spec: Spec, paths: Paths, runtime: Runtime, run: RunDir, loaded: Loaded) -> None:
    """Fine-tune, probe, and save the adapter; after it the first process has the model in one piece."""
    with _probes(spec, paths, run, loaded.model) as callbacks:
        summary = fit.train(
            spec, loaded.model, loaded.tokenizer, loaded.items, run, runtime.stop,
            partial(runtime.progress, "train"), callbacks, runtime.checkpoint_steps, runtime.recompute,
        )  # fmt: skip
    if runtime.shard:
        _put_together(spec, paths, runtime, loaded)
    if distributed.first():
        save_trained(loaded.model, run.adapter, spec.model.name)
    run.record(training=summary)


def score(spec: Spec, runtime: Runtime, run: RunDir, loaded: Loaded) -> None:
    """Evaluate by every protocol, with the adapter merged where `evaluation.weights` says so."""
    if loaded.text_NT is not None:
        run.record(text_nll={"after": text.nll(loaded.model, loaded.text_NT)})
    weights = spec.evaluation.weights
    if weights == "merged" or (weights == "exact" and spec.model.dtype == "float32"):  # narrower types round
        merge(loaded.model, keep=False)
    if spec.evaluation.dtype != "own":
        _rounded_to(getattr(torch, spec.evaluation.dtype), loaded.model)
    asked, (ask, _) = loaded.items.split(spec.evaluation.split), _asking(loaded.items)
    ask(
        spec, loaded.model, loaded.tokenizer, asked, run=run, stop=runtime.stop,
        progress=lambda done, of: runtime.progress("evaluate", done, of, None),
    )  # fmt: skip


def _asking(items: sources.Items) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What evaluates items of their kind, and what prepares that."""
    if items.home is not None:
        return partial(instructed.evaluate, home=items.home), partial(instructed.prepare, home=items.home)
    if items.pictures is not None:
        seen = items.pictures
        return partial(pictured.evaluate, pictures=seen), partial(pictured.prepare, pictures=seen)
    return evaluate, prepare


def _rounded_to(dtype: torch.dtype, model: torch.nn.Module) -> None:
    """Weights in a narrower type; buffers, a rotary embedding's frequencies say, stay as they are."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def _put_on(model: PreTrainedModel, spec: Spec, paths: Paths, runtime: Runtime) -> dict[str, int]:
    """The adapter: a new one to be trained, or the saved one that `model.adapter` names; returns what is counted."""
    params = inject(model, spec.method, spec.seed)
    if spec.model.adapter is None:
        return params
    load_adapter(model, adapter_folder(spec.model, paths.adapter_dir), allow_pickle=runtime.allow_pickle)
    whole = {own for _, own in saved(model).values()}  # that came with the adapter: trained once, now at rest
    counted = [(one.numel(), one.requires_grad or one in whole) for one in model.parameters()]
    return {"trainable": sum(n for n, trained in counted if trained), "total": sum(n for n, _ in counted)}


def _put_together(spec: Spec, paths: Paths, runtime: Runtime, loaded: Loaded) -> None:
    """What was trained in shares, on a base of its own: in the first process, the only one that goes on."""
    trained = trained_weights(loaded.model)
    del loaded.model  # the shares give their memory back before the whole takes its own
    if distributed.first():
        loaded.model, _ = model_and_tokenizer(spec, paths.model_dir)
        loaded.model.to(runtime.device)  # type: ignore[arg-type]
        _put_on(loaded.model, spec, paths, runtime)
        fill_trained(loaded.model, trained, "the run")


@contextlib.contextmanager
def _probes(spec: Spec, paths: Paths, run: RunDir, model: PreTrainedModel) -> Iterator[list[Any]]:
    """The decomposition callback of the spec, reading initial weights from the base model's file where it can."""
    if spec.probe is None:
        yield []
        return
    base = model_folder(spec.model, paths.model_dir)
    with contextlib.ExitStack() as stack:
        files = {
            name: file
            for path in weight_files(base)
            for file in [stack.enter_context(safe_open(path, "pt"))]
            for name in file.keys()  # noqa: SIM118  (a safetensors file is not a mapping)
        }
        initial = partial(_initial, files, Layout(model).whole(files), spec)
        # of a Llama all seven matrices, as published, also those that a method leaves alone; else what is trained
        leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        llama = spec.model.family == "decoder" and leaves.issuperset(LLAMA_KINDS)
        kinds = LLAMA_KINDS if llama else KINDS[spec.model.family]
        yield [
            DecompositionCallback(lambda row: run.append("probe", _rounded(row)), spec.probe.fractions, kinds, initial)
        ]


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Seven digits, what float32 weights hold: all sixteen would be twice the bytes of a record, and rounding noise."""
    return {name: float(f"{value:.7g}") if isinstance(value, float) else value for name, value in row.items()}


def _initial(files: dict[str, safe_open], stored: dict[str, str], spec: Spec, name: str) -> Any:
    """W0 as the run loaded it: in `model.dtype`, and rescaled where the run's base is."""
    if name not in stored:
        raise LoadError(f"'{name}' is not in the base model's files, so its change cannot be measured")
    W0 = files[stored[name]].get_tensor(stored[name]).to(getattr(torch, spec.model.dtype))
    return W0 * scale if (scale := factor(spec.model.rescale, name)) != 1 else W0
