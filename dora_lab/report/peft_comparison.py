"""A run in the form of PEFT's method_comparison (huggingface/peft, method_comparison/MetaMathQA/results/*.json).

The form is that of its results of January 2026: run_info, train_info, meta_info. What a record does not hold is null,
and `dora_lab.null` says why; PEFT's own reader wants numbers in some of those fields (memory reserved, file size) and
must be told what to do without them. Beside the three stands `dora_lab`, which that reader passes over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dora_lab.methods.catalog import entry_of
from dora_lab.runs.record import spec_of
from dora_lab.runs.streams import read_rows
from dora_lab.runs.survey import verified
from dora_lab.spec import Spec, SpecError, leaves

_WHY = {
    "run_info.created_at": "records hold no dates: a run that is made again has the same bytes",
    "run_info.peft_branch": "not made by PEFT",
    "run_info.peft_config": "full fine-tuning has no adapter",
    "run_info.train_config.compile": "a record does not say",
    "run_info.train_config.eval_steps": "no validation loss was measured while training",
    "run_info.peft_config.revision": "an embedded or local model: its hash is in dora_lab",
    "run_info.train_config.use_amp": "not a field of a spec: model.dtype is the type of the frozen weights",
    "run_info.train_config.autocast_adapter_dtype": "PEFT's own; what is trained here is float32",
    "run_info.train_config.query_template": "each task has its own; data.template in dora_lab.spec names them",
    "run_info.train_config.lr_scheduler": "PEFT's form knows cosine and none; optim.schedule in dora_lab.spec",
    "run_info.train_config.attn_implementation": "a record does not say",
    "train_info.accelerator_memory_reserved_avg": "the peak alone is recorded",
    "train_info.accelerator_memory_reserved_99th": "the peak alone is recorded",
    "train_info.accelerator_memory_max": "no accelerator: the peak of a processor's memory is in dora_lab",
    "train_info.file_size": "records hold no sizes of adapters",
    "train_info.metrics.0.forgetting": "PEFT measures it on another text",
    "train_info.metrics.0.train total tokens": "the record is from before tokens were counted",
    "meta_info.model_info.sha": "an embedded or local model: its hash is in dora_lab",
    "meta_info.model_info.created_at": "a record does not say",
    "meta_info.dataset_info.train.sha": "embedded or local data: their hash is in dora_lab",
    "meta_info.dataset_info.train.created_at": "a record does not say",
    "meta_info.package_info.peft-version": "not made by PEFT",
    "meta_info.package_info.bitsandbytes-version": "not used",
    "meta_info.system_info.accelerator": "none: the run was on a processor",
    "meta_info.pytorch_info": "a record does not say",
}


def comparison(path: Path) -> dict[str, Any]:
    """A complete run as one of PEFT's result files; accuracy is the mean over tasks, of the spec's first protocol.

    Raises SpecError for a run that is not complete, and for one of a method that PEFT's file cannot tell from another;
    StoreError where `verified` refuses it.
    """
    record = verified(path)
    spec = spec_of(record)
    if record["status"] != "complete" or spec.optim is None:
        raise SpecError(f"{path}: a {record['status']} run of {spec.method.name}; give a complete run that was trained")
    evals = [row for row in read_rows(path, "eval") if row["protocol"] == spec.evaluation.protocols[0]]
    if other := sorted({row["metric"] for row in evals} - {"accuracy"}):
        raise SpecError(f"{path}: scored by {', '.join(other)}; PEFT's file holds accuracies alone")
    losses = [row["loss"] for row in read_rows(path, "metrics") if row.get("loss") is not None]
    training, seconds, params = (record.get(name) or {} for name in ("training", "seconds", "params"))
    steps = training.get("steps") or len(losses)
    last = {
        "step": steps,
        "test accuracy": sum(row["value"] for row in evals) / len(evals),
        "train loss": losses[-1],
        "train samples": steps * spec.optim.batch_size,
        "train total tokens": training.get("tokens"),
        "forgetting": None,
    }
    cuda = record.get("device") == "cuda"
    found = {
        "run_info": {
            "created_at": None,
            "total_time": sum(seconds.values()),
            "experiment_name": f"{spec.method.name}/{spec.experiment}-{record['spec_id']}",
            "peft_branch": None,
            "train_config": _train_config(spec, steps),
            "peft_config": _peft_config(spec, path),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": record.get("peak_memory_bytes") if cuda else None,
            "accelerator_memory_reserved_99th": None,
            "train_time": seconds.get("train"),
            "file_size": None,
            "num_trainable_params": params.get("trainable"),
            "num_total_params": params.get("total"),
            "status": "success",
            "metrics": [last],
        },
        "meta_info": _meta_info(record),
    }
    null = [name for name, value in (leaves(found) | leaves(last, "train_info.metrics.0.")).items() if value is None]
    own = {name: record.get(name) for name in ("spec_id", "spec", "code", "inputs", "device", "peak_memory_bytes")}
    own |= {"protocol": spec.evaluation.protocols[0], "null": {name: _WHY.get(name, "not recorded") for name in null}}
    return found | {"dora_lab": own}


def _train_config(spec: Spec, steps: int) -> dict[str, Any]:
    optim, evaluation = spec.optim, spec.evaluation
    assert optim is not None
    return {
        "model_id": spec.model.name,
        "dtype": spec.model.dtype,
        "max_seq_length": spec.data.cutoff,
        "batch_size": optim.batch_size,
        "batch_size_eval": evaluation.batch_size,
        "max_steps": steps,
        "eval_steps": optim.eval_steps,
        "compile": None,
        "query_template": None,
        "seed": spec.seed,
        "grad_norm_clip": optim.max_grad_norm,
        "optimizer_type": {"adamw": "AdamW", "sgd": "SGD"}[optim.optimizer],
        "optimizer_kwargs": {"lr": optim.learning_rate, "weight_decay": optim.weight_decay},
        "lr_scheduler": "cosine" if optim.schedule == "cosine" else None,
        "use_amp": None,
        "autocast_adapter_dtype": None,
        "generation_kwargs": {"max_new_tokens": evaluation.max_new_tokens, "num_beams": evaluation.num_beams},
        "attn_implementation": None,
    }


def _peft_config(spec: Spec, path: Path) -> dict[str, Any] | None:
    """What adapts, as PEFT would say it; None for full fine-tuning, which its reader takes a missing one for."""
    method, entry = spec.method, entry_of(spec.method.name)
    if not entry.adapts:
        return None
    if entry.form is None or method.magnitude_modules:
        raise SpecError(
            f"{path}: PEFT has no configuration of {entry.words} with these fields; it stays out of its form"
        )
    return {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "base_model_name_or_path": spec.model.name,
        "revision": spec.model.revision,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": list(method.target_modules),
        "use_dora": "magnitude" in entry.form,
        "use_rslora": method.rslora,
        "rank_pattern": dict(_pair(text, int) for text in method.rank_pattern),
        "alpha_pattern": dict(_pair(text, float) for text in method.alpha_pattern),
        "bias": "none",
    }


def _pair(text: str, number: type) -> tuple[str, Any]:
    pattern, _, value = text.rpartition("=")
    return pattern, number(value)


def _meta_info(record: dict[str, Any]) -> dict[str, Any]:
    inputs, versions = record.get("inputs") or {}, record.get("packages") or {}
    revisions = {name: (inputs.get(name) or {}).get("revision") for name in ("model", "data")}
    used = {f"{name}-version": versions.get(name) for name in ("transformers", "datasets", "torch")}
    machine = record.get("machine") or {}
    return {
        "model_info": {"sha": revisions["model"], "created_at": None},
        "dataset_info": {"train": {"sha": revisions["data"], "created_at": None}},
        "package_info": used | {"peft-version": None, "bitsandbytes-version": None},
        "system_info": {
            "system": str(machine.get("system", "")).partition(" ")[0],
            "processor": machine.get("processor"),
            "accelerator": machine.get("gpu"),
        },
        "pytorch_info": None,
    }
