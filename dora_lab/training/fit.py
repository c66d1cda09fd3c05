"""The fine-tuning run: a model, its items and a spec to trained weights, resumed from the newest whole checkpoint.

How a step is made, and where this differs from transformers' Trainer: `trainer`. Under `torchrun` the processes share
the micro-batches of every step (DDP, or FSDP2 for a model that `distributed.shard` has cut); the first one writes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from dora_lab import distributed
from dora_lab.forms import form_of
from dora_lab.models.base import words_of
from dora_lab.runs.checkpoints import Checkpoints, read_manifest, step_of
from dora_lab.runs.directory import RunDir
from dora_lab.runs.record import read_record
from dora_lab.spec import Spec, canonical_json
from dora_lab.tasks.limits import limits
from dora_lab.tasks.sources import Items
from dora_lab.training.batches import MicroBatches
from dora_lab.training.checks import refuse_in_vain
from dora_lab.training.trainer import WEIGHTS, Progress, RunTrainer, Watch, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

TRAINED_STREAMS = ("metrics", "probe", "timing")


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its last step is in a checkpoint."""


def train(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    items: Items,
    run: RunDir,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint_steps: int | None = None,
    recompute: bool = False,
) -> dict[str, Any]:
    """Fine-tune `model` in place as `spec` says, resuming from the newest whole checkpoint of `run`.

    A LLaVA is given with its processor, its items are conversations. recompute: layers run again for the gradient.
    Parameters that require a gradient are trained; adapters are to be injected before. Appends rows to the streams
    metrics (step, tokens, loss in nats per token, learning_rate, grad_norm; and step, eval_loss) and timing (step,
    seconds of training so far) of `run`; what they and the probe hold beyond the resumed step is dropped, and with it
    the rows of an evaluation, unless all steps are done. Returns what belongs into the record: `steps`, `tokens`,
    `shortened` items, `resumed_from` (step or None), `kept_step`; of pictures `unanswered` items, `questions_cut`, too.
    Raises NonFiniteError, Interrupted, ResumeError for a checkpoint of something else, SaveError where a checkpoint
    cannot be written; and before the first step ItemError for items that the model cannot take, SpecError for a
    learning rate that never leaves 0.
    """
    if spec.optim is None:
        raise ValueError(f"method '{spec.method.name}' has optim None and is not trained")
    form = form_of(spec, model, tokenizer, items.pictures)
    encoded = form.learnt(form.encode(items.train, spec.data, words_of(tokenizer), limits(model)))
    held = form.encode(items.validation, spec.data, words_of(tokenizer), limits(model))
    batches = MicroBatches(encoded.examples, spec.optim, spec.seed, form)
    note = refuse_in_vain(spec.optim, batches.steps)
    if note and note not in read_record(run.path).get("notes", []):
        run.note(note)
    saving, rests = (run.checkpoints, model, checkpoint_steps), form.rests(encoded.examples)
    arguments = training_arguments(spec, batches.steps, *saving, rests=rests, recompute=recompute)
    checkpoints = Checkpoints(run, _made_of(spec, run, batches))
    trainer = RunTrainer(spec, model, batches, held.examples, run, checkpoints, arguments, progress)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.add_callback(Watch(trainer, stop))
    checkpoint = distributed.share(_resume(run, checkpoints, batches.steps) if distributed.first() else None)
    step = step_of(checkpoint) if checkpoint else 0
    trainer.continue_counts()
    run.mark_trained(step == batches.steps)
    if step < batches.steps:
        with distributed.connected():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < batches.steps:
            raise Interrupted(f"stopped at step {trainer.state.global_step} of {batches.steps}")
    elif checkpoint:
        trainer.load_trainable(checkpoint / WEIGHTS)
    return {
        "steps": batches.steps,
        "tokens": trainer.tokens,
        "shortened": encoded.shortened,
        "answers_cut": encoded.answers_cut,
        **({"unanswered": encoded.unanswered, "questions_cut": encoded.questions_cut} if items.pictures else {}),
        "resumed_from": step or None,
        "kept_step": trainer.keep(spec.optim),
    }


def _made_of(spec: Spec, run: RunDir, batches: MicroBatches) -> dict[str, Any]:
    """All that a checkpoint's numbers depend on; it is resumed by nothing else."""
    inputs = read_record(run.path).get("inputs") or {}
    return {
        "spec": json.loads(canonical_json(spec)),  # a field that a later version adds is not in it
        "inputs": {name: found for name, found in inputs.items() if isinstance(found, dict) and "sha256" in found},
        "items_sha256": batches.sha256(),
        "steps": batches.steps,
        "processes": distributed.size(),
        "sharded": read_record(run.path).get("sharded", False),
    }


def _resume(run: RunDir, checkpoints: Checkpoints, steps: int) -> Path | None:
    """The checkpoint to go on from, with the run's streams as they were when it was written."""
    checkpoint = checkpoints.newest()
    manifest = read_manifest(checkpoint)[0] if checkpoint else None
    for stream in TRAINED_STREAMS:
        run.cut(stream, manifest["streams"][stream]["bytes"] if manifest else 0)
    if not checkpoint or step_of(checkpoint) < steps:
        run.cut("eval")
    return checkpoint
