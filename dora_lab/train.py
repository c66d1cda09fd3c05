"""The fine-tuning run: `transformers.Trainer` with our order of data, our loss, our checkpoints and our records.

Differences from the Trainer's own ways, each for a reason:
- data order from (seed, epoch) alone, never a global generator: resume is bit-exact;
- a NaN or infinite loss or gradient ends the run at that step; the Trainer would log 0.0 and go on;
- the loss is the mean over all answer tokens of an optimiser step, however it is cut into micro-batches;
- checkpoints hold the trainable weights only, are renamed into place when whole, and are checked by hash on resume.

Shape suffixes: B items, K last positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from dora_lab.batches import IGNORED, Example, MicroBatches, collate, encode
from dora_lab.load import Items
from dora_lab.spec import Optim, Spec, spec_id
from dora_lab.store import RunDir, read_stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int, float], None]  # step, steps in all, loss
CHECKPOINT_STEPS = 500  # at most so many optimiser steps are lost by a crash; short runs have four checkpoints
KEPT_CHECKPOINTS = 2  # an older one is there if the newest turns out to be damaged
WEIGHTS = "model.safetensors"  # the Trainer looks for a file of this name before it resumes
MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """Loss or gradient became NaN or infinite; says at which step and for which items."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its last step is in a checkpoint."""


def train(
    spec: Spec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Items,
    run: RunDir,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint_steps: int | None = None,
) -> dict[str, Any]:
    """Fine-tune `model` in place as `spec` says, resuming from the newest whole checkpoint of `run`.

    Parameters that require a gradient are trained; adapters are to be injected before. Appends rows to the streams
    metrics (step, tokens, loss in nats per token, learning_rate, grad_norm, seconds; and step, eval_loss) of `run`;
    rows after the resumed step are dropped, from probe too. Returns what belongs into the record: `steps`, `tokens`,
    `shortened` items, `resumed_from` (step or None), `kept_step`. Raises NonFiniteError, ItemError, Interrupted.
    """
    if spec.optim is None:
        raise ValueError(f"method '{spec.method.name}' has optim None and is not trained")
    encoded = encode(items.train, spec.data, tokenizer)
    held = encode(items.validation, spec.data, tokenizer)
    batches = MicroBatches(
        encoded.examples, spec.optim, spec.seed, cast(int, tokenizer.pad_token_id), spec.data.pad_to_multiple_of
    )
    arguments = _arguments(spec, batches.steps, run.checkpoints, model, checkpoint_steps)
    trainer = _Trainer(spec, model, batches, held.examples, run, arguments, progress)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.add_callback(_Stop(stop))
    checkpoint = trainer.newest_checkpoint()
    step = _step(checkpoint) if checkpoint else 0
    for stream in ("metrics", "probe"):
        run.truncate(stream, lambda row: row["step"] <= step)
    trainer.continue_counts(read_stream(run.path, "metrics"))
    if step < batches.steps:
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
        "resumed_from": step or None,
        "kept_step": trainer.keep(spec.optim),
    }


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name, detached and contiguous on the CPU."""
    return {
        name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters() if weight.requires_grad
    }


def _arguments(
    spec: Spec, steps: int, folder: Path, model: PreTrainedModel, checkpoint_steps: int | None
) -> TrainingArguments:
    optim = cast(Optim, spec.optim)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # one entry of the dataset is a whole micro-batch
        gradient_accumulation_steps=optim.batch_size // optim.micro_batch_size,
        max_steps=steps,
        learning_rate=optim.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule),
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optim="adamw_torch_fused",
        seed=spec.seed,
        data_seed=spec.seed,
        bf16=spec.model.dtype == "bfloat16",
        fp16=spec.model.dtype == "float16",
        use_cpu=model.device.type == "cpu",
        eval_strategy="steps" if optim.eval_steps else "no",
        eval_steps=optim.eval_steps,
        save_strategy="steps",
        save_steps=checkpoint_steps or min(CHECKPOINT_STEPS, math.ceil(steps / 4)),
        logging_strategy="steps",
        logging_steps=1 if steps <= 2000 else 10,
        logging_nan_inf_filter=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=model.device.type == "cuda",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )


class _Stop(TrainerCallback):
    """Ends training after the step in which `stop` was set, with a checkpoint."""

    def __init__(self, stop: threading.Event | None) -> None:
        self.stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stop is not None and self.stop.is_set():
            control.should_save = control.should_training_stop = True


class _Trainer(Trainer):
    """See the module's docstring."""

    def __init__(
        self,
        spec: Spec,
        model: PreTrainedModel,
        batches: MicroBatches,
        held: list[Example],
        run: RunDir,
        arguments: TrainingArguments,
        progress: Progress | None,
    ) -> None:
        self.spec, self.run, self.batches, self.held, self.progress = spec, run, batches, held, progress
        self.network = model
        self.tokens, self.seconds, self._since = 0, 0.0, time.monotonic()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=batches,
            eval_dataset=cast(Any, held) or None,
            data_collator=lambda entries: entries[0],
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

    def continue_counts(self, rows: list[dict[str, Any]]) -> None:
        """Go on counting tokens and seconds from the metrics rows that are there."""
        last = next((row for row in reversed(rows) if "tokens" in row), None)
        self.tokens, self.seconds = (last["tokens"], last["seconds"]) if last else (0, 0.0)
        self._since = time.monotonic() - self.seconds

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.batches)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        return sum(batch["labels"].ne(IGNORED).sum() for batch in batch_samples)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # not recorded, and counting parameters takes longer than a small step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed cross-entropy over the labelled tokens, divided by `num_items_in_batch` (those of the whole step)."""
        labels_BT = inputs["labels"]
        first = int(labels_BT.ne(IGNORED).any(0).nonzero()[0, 0])  # padding is on the left: answers end together
        keep = labels_BT.shape[1] - first + 1  # and the position before the first of them, which predicts it
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        logits_BKV = model(**rest, logits_to_keep=keep, use_cache=False).logits
        loss = F.cross_entropy(
            logits_BKV[:, -keep:-1].float().flatten(0, 1),
            labels_BT[:, first:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return loss / (num_items_in_batch if num_items_in_batch is not None else labels_BT.ne(IGNORED).sum())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward and backward; raises NonFiniteError before the optimiser can spread a NaN."""
        self.tokens += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse(loss, "loss")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # with float16 the scaler meets infinite gradients by skipping the step
            self._refuse(torch.as_tensor(norm), "gradient norm")
        return norm

    def _refuse(self, value: Tensor, what: str) -> None:
        if not torch.isfinite(value):
            step = self.state.global_step
            parts = self.args.gradient_accumulation_steps
            items = sorted(item for part in range(parts) for item in self.batches.items_of(step * parts + part))
            raise NonFiniteError(
                f"{what} is {value.item()} at step {step + 1}, training items {items}; "
                f"lower optim.learning_rate = {self.args.learning_rate} or look at these items"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row of metrics.jsonl per logged step; the Trainer's own history would grow with every checkpoint."""
        if "loss" not in logs:
            return
        self.seconds = time.monotonic() - self._since
        row = {
            "step": self.state.global_step,
            "tokens": self.tokens,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
            "seconds": round(self.seconds, 3),
        }
        self.run.append("metrics", row)
        if self.progress:
            self.progress(self.state.global_step, self.state.max_steps, logs["loss"])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per labelled token of the validation items, in nats; the best weights so far are kept aside."""
        was_training = self.network.training
        self.network.eval()
        micro = cast(Optim, self.spec.optim).micro_batch_size
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(self.held), micro):
                inputs = self._prepare_inputs(
                    collate(self.held[start : start + micro], self.batches.pad, self.batches.multiple)
                )
                tokens = int(inputs["labels"].ne(IGNORED).sum())
                with self.compute_loss_context_manager():
                    total += float(self.compute_loss(self.network, cast(Any, inputs))) * tokens
                count += tokens
        self.network.train(was_training)
        loss = total / count
        self._refuse(torch.tensor(loss), "validation loss")
        self.run.append("metrics", {"step": self.state.global_step, "eval_loss": loss})
        if cast(Optim, self.spec.optim).keep == "best_loss" and self._best_step() == self.state.global_step:
            self._write_weights(self._best_file(self.state.global_step))
        return {"eval_loss": loss}

    def keep(self, optim: Optim) -> int:
        """Load the weights that the run is judged by; returns the step they are of."""
        if optim.keep == "last":
            return self.batches.steps
        best = self._best_step()
        if best is None:
            raise ValueError(f"optim.keep is best_loss, but training ended before eval_steps = {optim.eval_steps}")
        self.load_trainable(self._best_file(best))
        return best

    def _best_step(self) -> int | None:
        rows = [row for row in read_stream(self.run.path, "metrics") if "eval_loss" in row]
        return min(rows, key=lambda row: (row["eval_loss"], row["step"]))["step"] if rows else None

    def _best_file(self, step: int) -> Path:
        return self.run.checkpoints / f"best-{step}.safetensors"

    def _write_weights(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        save_file(trainable(self.network), partial)
        os.replace(partial, file)

    def load_trainable(self, file: Path) -> None:
        """Read trainable weights back; raises ValueError where names differ from what is trained now."""
        values = load_file(file)
        parameters = {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}
        if values.keys() != parameters.keys():
            differing = sorted(values.keys() ^ parameters.keys())
            raise ValueError(f"{file} holds other weights than are trained: {differing}")
        with torch.no_grad():
            for name, weight in parameters.items():
                weight.copy_(values[name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_trainable(Path(resume_from_checkpoint) / WEIGHTS)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._write_weights(Path(cast(str, output_dir)) / WEIGHTS)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.checkpoints / ".partial")  # _save_checkpoint moves it out when it is whole

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        partial = self.run.checkpoints / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        super()._save_checkpoint(model, trial)
        files = {file.name: _sha256(file) for file in sorted((partial / name).iterdir())}
        (partial / name / MANIFEST).write_text(json.dumps({"spec_id": spec_id(self.spec), "files": files}))
        for file in (partial / name).iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(self.run.checkpoints / name, ignore_errors=True)
        os.replace(partial / name, self.run.checkpoints / name)
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        self._drop_beaten()

    def _drop_beaten(self) -> None:
        """Best weights that no resume can need: beaten before the oldest checkpoint that is kept."""
        oldest = _step(self._checkpoints()[0])
        rows = [row for row in read_stream(self.run.path, "metrics") if "eval_loss" in row]
        needed = {row["step"] for row in rows if row["step"] > oldest}
        early = [row for row in rows if row["step"] <= oldest]
        needed |= {min(early, key=lambda row: (row["eval_loss"], row["step"]))["step"]} if early else set()
        for file in self.run.checkpoints.glob("best-*.safetensors"):
            if int(file.stem.split("-")[1]) not in needed:
                file.unlink()

    def _checkpoints(self) -> list[Path]:
        return sorted(self.run.checkpoints.glob("checkpoint-*"), key=_step)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole and of this spec; damaged ones are removed with a warning."""
        for folder in reversed(self._checkpoints()):
            problem = _damage(folder, self.spec)
            if problem is None:
                return folder
            log.warning("%s: %s; it is removed, an older one or none is used", folder, problem)
            shutil.rmtree(folder)
        return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _damage(folder: Path, spec: Spec) -> str | None:
    """What keeps a checkpoint from being resumed, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return "no readable manifest (killed while saving)"
    if manifest["spec_id"] != spec_id(spec):
        return f"of another spec, {manifest['spec_id']}"
    for name, wanted in manifest["files"].items():
        if not (folder / name).exists() or _sha256(folder / name) != wanted:
            return f"{name} is missing or changed"
    return None


def _sha256(file: Path) -> str:
    content = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()
