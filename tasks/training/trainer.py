"""Trainer as seqmill uses it: our data order, whole checkpoints, a validation loss exact to the token.

Shapes: B rows of a batch, T block_size, V vocabulary.
"""

import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.errors import WorkerError
from tasks.schemas import IGNORED_LABEL
from tasks.training.datasets import training_loader, validation_batches
from tasks.training.order import Share, dropout_seed
from tasks.training.rank import StopRequest, report_metrics
from tasks.training.saving import PROGRESS, TRAINER_STATE, CheckpointWriter, Ranks
from tasks.training.state import base_optimizer, restore, snapshot

log = logging.getLogger(__name__)


class SteppedTrainer(Trainer):
    """A Trainer whose rows, dropout and checkpoints depend on nothing but the plan and the step."""

    def __init__(self, plan: dict[str, Any], share: Share, num_rows: int, stop: StopRequest, **options: Any) -> None:
        self.plan = plan
        self.share = share
        self.num_rows = num_rows
        self.stop = stop
        self.ranks = Ranks()
        self.writer = CheckpointWriter(Path(plan["checkpoint_dir"]), plan["facts"], self.ranks)
        self.stopped_step: int | None = None
        self.first_step = 0
        self.validation_loss: float | None = None
        self.validated_step = -1
        self.frozen: Any = None
        self._reported = (0, time.monotonic())
        super().__init__(**options)
        self.add_callback(Steps(self))

    def get_train_dataloader(self) -> Any:
        """This rank's rows from the first step that is still to do."""
        plan, seed = self.plan, self.plan["optimization"]["seed"]
        return training_loader(
            plan["train_files"], seed, self.share, self.first_step, plan["num_steps"], boundary_id=plan["boundary_id"]
        )

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Copy the training state aside; it is written while the next steps run."""
        started = time.monotonic()
        self.writer.finish()  # the one before
        tensors, num_steps = snapshot(self.model_wrapped, self.share.rank, self.share.num_ranks)
        notes = self._notes(num_steps) if self.is_world_process_zero() else {}
        self.writer.begin(self.state.global_step, tensors, notes, time.monotonic() - started)

    def _notes(self, num_steps: float) -> dict[str, bytes]:
        """Where the run stands besides its tensors. DeepSpeed's own count of steps decides nothing here."""
        assert self.lr_scheduler
        schedule = {name: value for name, value in self.lr_scheduler.state_dict().items() if name != "lr_lambdas"}
        trainer_state = json.dumps(dataclasses.asdict(self.state), sort_keys=True)
        return {PROGRESS: orjson.dumps({"num_steps": num_steps, "schedule": schedule}), TRAINER_STATE: trainer_state.encode()}

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Trainer's own, but for what a checkpoint is: ours is read by any number of ranks under any ZeRO stage."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            progress = orjson.loads((folder / PROGRESS).read_bytes())
            restore(self.model_wrapped, folder, progress["num_steps"])
            assert self.lr_scheduler
            groups = base_optimizer(self.model_wrapped.optimizer).param_groups
            self.lr_scheduler.load_state_dict({**progress["schedule"], "lr_lambdas": [None] * len(groups)})  # functions: kept
            for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        return prepared

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss over every supervised token of the validation rows, which no batch size or rank count changes."""
        model, device, plan = self.model_wrapped, self.args.device, self.plan
        most_rows = plan["optimization"]["max_evaluation_rows"]
        total = torch.zeros(2, dtype=torch.float64, device=device)
        model.eval()
        with torch.no_grad():
            for batch in validation_batches(plan["validation_files"], self.share, most_rows, plan["boundary_id"]):
                total += summed_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
        if dist.is_initialized():
            dist.all_reduce(total)
        model.train()
        self.validation_loss = (total[0] / total[1]).item()
        self.validated_step = self.state.global_step
        self.control.should_evaluate = False
        self.log({"validation_loss": self.validation_loss})
        self._reported = (self.state.global_step, time.monotonic())  # a validation's seconds are not training's
        return {"eval_loss": self.validation_loss}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report a loss or a validation loss with its step; stop at a loss that is no number."""
        if "loss" not in logs and "validation_loss" not in logs:
            return
        step = self.state.global_step
        epoch = step * self.share.global_batch_size / self.num_rows
        row = {"step": step, "epoch": round(epoch, 4), **{name: float(value) for name, value in logs.items()}}
        if "loss" in logs:
            row |= self._rates(step)
        if not math.isfinite(row.get("loss", row.get("validation_loss", 0.0))):
            raise WorkerError(
                f"{self.plan['label']}: the loss is not a number after step {step}; lower learning_rate or raise warmup_steps"
            )
        if self.is_world_process_zero():
            report_metrics(row)

    def _rates(self, step: int) -> dict[str, float]:
        (since, then), now = self._reported, time.monotonic()
        self._reported = (step, now)
        tokens = (step - since) * self.share.global_batch_size * self.plan["block_size"]
        return {"num_steps": step - since, "tokens_per_second": round(tokens / (now - then), 1)}

    def start_at(self, step: int) -> None:
        """Count steps and rates from ``step``, where a checkpoint left off."""
        self.first_step = step
        self._reported = (step, time.monotonic())


class Steps(TrainerCallback):
    """What happens around a step: seed before it; report, validate, save after it, when due."""

    def __init__(self, trainer: SteppedTrainer) -> None:
        self.trainer = trainer
        self.plan = trainer.plan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.plan["lora"]:
            from tasks.training.lora import FrozenWeights

            # Here, since DeepSpeed has brought the weights into the number format of computation by now.
            self.trainer.frozen = FrozenWeights(self.trainer.model)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        torch.manual_seed(dropout_seed(self.plan["optimization"]["seed"], state.global_step, self.trainer.share.rank))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        optimization, step, trainer = self.plan["optimization"], state.global_step, self.trainer
        is_stopped, is_written_late = trainer.ranks.any(trainer.stop.is_made(), trainer.writer.is_writing())
        if not is_written_late:
            trainer.writer.finish()
        control.should_save = is_stopped or step % optimization["checkpoint_steps"] == 0
        # A report ends at every checkpoint, so that a resumed run reports the same means.
        control.should_log = control.should_log or control.should_save or step == self.plan["num_steps"]
        every = optimization["evaluation_steps"]
        control.should_evaluate = bool(every and self.plan["validation_files"] and step % every == 0)
        if is_stopped:
            trainer.stopped_step = step
            control.should_training_stop = True
            control.should_evaluate = False  # who asked may not wait for it: the resumed run begins with it

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.writer.finish()


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed loss of a batch, and over how many tokens: float64 (2,)."""
    labels_BT = batch.pop("labels")[:, 1:]
    logits_BTV = model(**batch, use_cache=False).logits[:, :-1]
    loss = labels_BT.new_zeros((), dtype=torch.float64)
    for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True):  # a row at a time: fp32 logits are large
        loss += cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED_LABEL, reduction="sum").double()
    return torch.stack([loss, (labels_BT != IGNORED_LABEL).sum().double()])
