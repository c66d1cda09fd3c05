"""`transformers.Trainer` with our order of data, our loss, our checkpoints and our records.

Differences from the Trainer's own ways, each for a reason:
- data order from (seed, epoch) alone, never a global generator: resume is bit-exact;
- a NaN or infinite loss, gradient or weight ends the run at that step; the Trainer would log 0.0 and go on;
- the loss is the mean over all answer tokens (or items) of an optimiser step, however it is cut and shared out;
- checkpoints hold the trainable weights only, and are whole, ours and unchanged or not resumed: see `runs.checkpoints`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from dora_lab import distributed
from dora_lab.forms.form import Example
from dora_lab.io.atomic import replacing
from dora_lab.runs.checkpoints import Checkpoints, read_manifest
from dora_lab.runs.directory import RunDir
from dora_lab.runs.errors import ResumeError
from dora_lab.runs.streams import read_stream
from dora_lab.spec import Optim, Spec
from dora_lab.training import trained_weights
from dora_lab.training.batches import MicroBatches, cut
from dora_lab.training.optimizer import make_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, float], None]  # step, steps in all, loss
CHECKPOINT_STEPS = 500  # at most so many optimiser steps are lost by a crash; short runs have four checkpoints
WEIGHTS = "model.safetensors"  # the Trainer looks for a file of this name before it resumes


class NonFiniteError(ArithmeticError):
    """Loss, gradient or weights became NaN or infinite; says at which step and for which items."""


def training_arguments(
    spec: Spec,
    steps: int,
    folder: Path,
    model: PreTrainedModel,
    checkpoint_steps: int | None = None,
    *,
    rests: bool = False,
    recompute: bool = False,
) -> TrainingArguments:
    """rests: as `Form.rests` has it; recompute: layers keep their inputs alone, and run again for the gradient."""
    optim = cast(Optim, spec.optim)
    parts = optim.batch_size // optim.micro_batch_size
    if parts % distributed.size():
        raise ResumeError(  # another number of processes can do it: a run that was begun is not lost
            f"optim.batch_size / optim.micro_batch_size = {parts} micro-batches cannot be shared by "
            f"{distributed.size()} processes; start a number of them that divides it or lower optim.micro_batch_size"
        )
    names = ("activation_checkpointing", "gradient_checkpointing")  # the second in earlier versions of transformers
    name = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    again = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # one entry of the dataset is a whole micro-batch
        gradient_accumulation_steps=parts // distributed.size(),
        # it costs DDP a walk over the graph; without it a parameter that rests is waited for in vain
        ddp_find_unused_parameters=rests,
        **cast(Any, again if recompute else {}),
        max_steps=steps,
        learning_rate=optim.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule),
        warmup_steps=optim.warmup(steps),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optim="adamw_torch_fused",
        adam_epsilon=optim.adam_eps,
        seed=spec.seed,
        data_seed=spec.seed,
        bf16="bfloat16" in (spec.model.dtype, optim.products),
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
    # one process uses one GPU, however many it sees: the Trainer would wrap the model in DataParallel and ask for so
    # many micro-batches at a time, of which the collator hands on the first
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class Watch(TrainerCallback):
    """Refuses weights that became NaN; ends training after the step in which `stop` was set, with a checkpoint."""

    def __init__(self, trainer: RunTrainer, stop: threading.Event | None) -> None:
        self.trainer, self.stop = trainer, stop

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.refuse_weights()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        asked = self.stop is not None and self.stop.is_set()
        if any(distributed.total([asked], args.device)):  # all processes end at the same step
            control.should_save = control.should_training_stop = True


class RunTrainer(Trainer):
    """See the module's docstring."""

    def __init__(
        self,
        spec: Spec,
        model: PreTrainedModel,
        batches: MicroBatches,
        held: list[Example],
        run: RunDir,
        checkpoints: Checkpoints,
        arguments: TrainingArguments,
        progress: Progress | None,
    ) -> None:
        self.spec, self.run, self.batches, self.held, self.progress = spec, run, batches, held, progress
        self.network, self.checkpoints = model, checkpoints
        self._evaluated = (-1, math.nan)  # step of the last validation, and its loss
        self.tokens, self._since = 0, time.monotonic()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=batches,
            eval_dataset=cast(Any, held) or None,
            data_collator=lambda entries: entries[0],
        )
        self.sharded = distributed.is_sharded(model)
        self.is_distributed_loading_by_transformers = self.sharded  # cut already: the Trainer is not to wrap it
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step
        if distributed.size() > 1:  # the processes draw dropout for items of their own
            torch.manual_seed(spec.seed * distributed.size() + distributed.rank())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own, where the spec has neither groups nor another optimiser."""
        optim = cast(Optim, self.spec.optim)
        if self.optimizer is None and (optim.groups or optim.optimizer != "adamw"):
            network = cast(nn.Module, self.model if model is None else model)
            trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
            self.optimizer = make_optimizer(trained, self.get_decay_parameter_names(network), optim)
        return super().create_optimizer(model)

    def continue_counts(self) -> None:
        """Go on counting tokens and seconds from the rows that are there."""
        rows = [row for row in read_stream(self.run.path, "metrics") if "tokens" in row]
        times = read_stream(self.run.path, "timing")
        self.tokens = rows[-1]["tokens"] if rows else 0
        self._since = time.monotonic() - (times[-1]["seconds"] if times else 0.0)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.batches)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Labelled tokens (or items) of the whole step, as a process's share of them: DDP averages over processes."""
        labelled: Any = torch.tensor(sum(self.batches.form.count(batch) for batch in batch_samples))
        read = sum(int(batch["attention_mask"].sum()) for batch in batch_samples)
        if distributed.size() > 1:
            labelled, read = distributed.total([int(labelled), read], device)
            labelled = labelled / distributed.size()
        self.tokens += read
        return labelled

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # shared out after every micro-batch: whole gradients would not fit either

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # not recorded, and counting parameters takes longer than a small step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The form's loss, divided by `num_items_in_batch` (the tokens or items of the whole step)."""
        total = self.batches.form.loss(model, inputs)
        return total / (num_items_in_batch if num_items_in_batch is not None else self.batches.form.count(inputs))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward and backward; raises NonFiniteError before the optimiser can spread a NaN."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if distributed.size() == 1:  # else its gradient reaches all processes, and all end together
            self._refuse(loss, "loss")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = distributed.whole(torch.as_tensor(norm))
        if not self.args.fp16:  # with float16 the scaler meets infinite gradients by skipping the step
            self._refuse(norm, "gradient norm")
        return norm

    def refuse_weights(self) -> None:
        """Raise NonFiniteError, naming them, if the step has made trained weights NaN or infinite."""
        trained = trained_weights.trained(self.network)
        if torch.isfinite(distributed.whole(nn.utils.get_total_norm(list(trained.values())))):
            return
        for name, weight in trained.items():  # the norm of large weights may overflow, so each is looked at
            found = distributed.whole(weight.detach())
            for value in found[~torch.isfinite(found)][:1]:
                self._refuse(value, f"weight '{name}'")

    def _refuse(self, value: Tensor, what: str) -> None:
        if not torch.isfinite(value):
            step = self.state.global_step
            parts = self.args.gradient_accumulation_steps * distributed.size()
            items = sorted(item for part in range(parts) for item in self.batches.items_of(step * parts + part))
            saved = [folder.name for folder in self.checkpoints.all()]
            raise NonFiniteError(
                f"{what} is {value.item()} at step {step + 1}, training items {items}; "
                f"lower optim.learning_rate = {self.args.learning_rate} or look at these items"
                + (f"; the last finite weights are in checkpoints/{saved[-1]}" if saved else "")
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row of metrics.jsonl per logged step; the Trainer's own history would grow with every checkpoint."""
        if "loss" not in logs:
            return
        row = {
            "step": self.state.global_step,
            "tokens": self.tokens,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs["grad_norm"]),
        }
        self.run.append("metrics", row)
        seconds = round(time.monotonic() - self._since, 3)
        self.run.append("timing", {"step": self.state.global_step, "seconds": seconds})
        if self.progress:
            self.progress(self.state.global_step, self.state.max_steps, logs["loss"])

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per labelled token (or item) of the validation items, in nats; the best weights are kept aside."""
        step, loss = self._evaluated
        if step == self.state.global_step:  # the Trainer asks again at its end, after the last checkpoint
            return {"eval_loss": loss}
        was_training = self.network.training
        self.network.eval()
        micro = cast(Optim, self.spec.optim).micro_batch_size
        total, count = 0.0, 0
        with torch.no_grad():
            for part in cut(self.held, micro, by_task=bool(cast(Optim, self.spec.optim).task_batch_sizes)):
                inputs = self._prepare_inputs(self.batches.form.collate(part, [0] * len(part)))
                counted = self.batches.form.count(cast(Any, inputs))
                with self.compute_loss_context_manager():
                    total += float(self.compute_loss(self.network, cast(Any, inputs))) * counted
                count += counted
        self.network.train(was_training)
        loss = total / count
        self._refuse(torch.tensor(loss), "validation loss")
        self.run.append("metrics", {"step": self.state.global_step, "eval_loss": loss})
        best = cast(Optim, self.spec.optim).keep == "best_loss"
        if best and distributed.share(distributed.first() and self._best_step() == self.state.global_step):
            self._write_weights(self._best_file(self.state.global_step))
        self._evaluated = (self.state.global_step, loss)
        return {"eval_loss": loss}

    def keep(self, optim: Optim) -> int:
        """Load the weights that the run is judged by; returns the step they are of.

        accelerate's autocast around the model ends here: an evaluation right after a training is that of a later start.
        """
        for name in ("forward", "_original_forward"):
            self.network.__dict__.pop(name, None)
        if optim.keep == "last":
            return self.batches.steps
        distributed.barrier()  # the first process has written the last row
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
        found = trained_weights.trained_weights(self.network)
        if not distributed.first():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            save_file(found, partial)

    def load_trainable(self, file: Path) -> None:
        """Read trainable weights back; raises ValueError where names differ from what is trained now."""
        trained_weights.fill_trained(self.network, load_file(file), str(file))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_trainable(Path(resume_from_checkpoint) / WEIGHTS)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._write_weights(Path(cast(str, output_dir)) / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        trained_weights.save_optimizer(self.network, self._adamw(), Path(output_dir) / OPTIMIZER_NAME)
        if distributed.first():
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        trained_weights.load_optimizer(self.network, self._adamw(), Path(checkpoint) / OPTIMIZER_NAME)
        cast(Any, self.lr_scheduler).load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _adamw(self) -> torch.optim.Optimizer:
        return cast(Any, self.optimizer).optimizer  # inside accelerate's wrapper

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.partial)  # from where it is moved when it is whole

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        size = sum(weight.numel() * weight.element_size() for weight in trained_weights.trained(self.network).values())
        # weights and AdamW's two moments, in float32 where that is wider, and the rest
        room = 3 * 4 * max(1, size // 4) + (2 << 20)
        best = self._best_step() if cast(Optim, self.spec.optim).keep == "best_loss" else None
        beside = [self._best_file(best)] if best is not None else []
        with self.checkpoints.writing(step, room, beside) if distributed.first() else contextlib.nullcontext():
            distributed.barrier()  # the folder is there
            super()._save_checkpoint(model, trial)
            distributed.barrier()  # every process has written its random state
        distributed.barrier()
        self.run.mark_trained(step == self.batches.steps)
        if distributed.first():
            self._drop_beaten()

    def _drop_beaten(self) -> None:
        """Best weights that no checkpoint needs: each names the best of its time."""
        kept = [read_manifest(folder)[0] for folder in self.checkpoints.all()]
        needed = {name for manifest in kept if manifest for name in manifest["beside"]}
        for file in self.run.checkpoints.glob("best-*.safetensors"):
            if file.name not in needed:
                file.unlink()
