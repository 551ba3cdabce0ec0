"""Trainer as seqmill uses it: our data order, whole checkpoints, a validation loss exact to the token."""

import contextlib
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
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.errors import SeqmillError, WorkerError
from tasks.store import write_atomically
from tasks.training.checkpoints import is_cut_alike, written_facts
from tasks.training.datasets import training_loader, validation_batches
from tasks.training.lines import sealed_line
from tasks.training.loss import summed_loss
from tasks.training.meter import Meter
from tasks.training.order import RowOrder, Share, dropout_seed
from tasks.training.rank import StopRequest, report_metrics, speak
from tasks.training.rows import Rows
from tasks.training.saving import PROGRESS, TRAINER_STATE, CheckpointWriter, Ranks
from tasks.training.state import base_optimizer, restore, snapshot
from tasks.training.watch import Halt, LossWatch

log = logging.getLogger(__name__)


class SteppedTrainer(Trainer):
    """A Trainer whose rows, dropout and checkpoints depend on nothing but the plan and the step."""

    def __init__(self, plan: dict[str, Any], share: Share, rows: Rows, stop: StopRequest, **options: Any) -> None:
        self.plan = plan
        self.share = share
        self.rows = rows
        self.num_rows = num_rows = len(rows)
        self.stop = stop
        self.ranks = Ranks()
        self.writer = CheckpointWriter(
            Path(plan["checkpoint_dir"]),
            plan["facts"],
            self.ranks,
            is_spread=plan["is_spread"],
            on_sealed=lambda step: speak(sealed_line(step)),
        )
        self.stopped_step: int | None = None
        self.first_step = 0
        self.validation_loss: float | None = None
        self.validated_step = -1
        self.frozen: Any = None
        self.watch = LossWatch(share, RowOrder(num_rows, plan["optimization"]["seed"]), plan["optimization"]["loss_jump"])
        self.meter = Meter(share.global_batch_size * plan["block_size"], share.num_ranks, plan["num_steps"])
        super().__init__(**options)
        self.add_callback(Steps(self))

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether an adapter's virtual tokens stand in front of every row, which then is to hold one example."""
        return bool(self.plan["adapter"] and self.plan["adapter"]["num_virtual_tokens"])

    def get_train_dataloader(self) -> Any:
        """This rank's rows from the first step that is still to do."""
        plan, seed = self.plan, self.plan["optimization"]["seed"]
        return training_loader(
            plan["train_files"],
            seed,
            self.share,
            self.first_step,
            plan["num_steps"],
            boundary_id=plan["boundary_id"],
            alone=self.has_virtual_tokens,
            rows=self.rows,
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
        progress = {"num_steps": num_steps, "schedule": schedule, "losses": self.watch.known}
        return {PROGRESS: orjson.dumps(progress), TRAINER_STATE: trainer_state.encode()}

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Trainer's own, but for what a checkpoint is: ours is read by any number of ranks under any ZeRO stage."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            progress = orjson.loads((folder / PROGRESS).read_bytes())
            is_own = is_cut_alike(written_facts(folder), self.plan["facts"])
            restore(self.model_wrapped, folder, progress["num_steps"], is_own=is_own, is_partial=self.plan["is_spread"])
            self.watch.known = progress.get("losses", [])  # of a checkpoint that tells them
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
            rows = (plan["validation_files"], self.share, most_rows, plan["boundary_id"])
            for batch in validation_batches(*rows, alone=self.has_virtual_tokens):
                total += summed_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
        if dist.is_initialized():
            dist.all_reduce(total)
        model.train()
        self.validation_loss = (total[0] / total[1]).item()
        self.validated_step = self.state.global_step
        self.control.should_evaluate = False
        self.log({"validation_loss": self.validation_loss})
        self.meter.start_at(self.state.global_step)
        return {"eval_loss": self.validation_loss}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report a loss or a validation loss with its step; end at one that is no number, or that jumps."""
        if "loss" not in logs and "validation_loss" not in logs:
            return
        step = self.state.global_step
        epoch = step * self.share.global_batch_size / self.num_rows
        row = {"step": step, "epoch": round(epoch, 4), **{name: float(value) for name, value in logs.items()}}
        if "loss" in logs:
            row |= self.meter.read(step)
        if self.is_world_process_zero() and all(map(math.isfinite, row.values())):
            report_metrics(row)
        is_lost = not math.isfinite(row.get("validation_loss", 0.0))
        # A step behind the last report may have spoilt the weights that a validation finds so.
        if ("loss" in logs or is_lost) and (halt := self.watch.judge(step, self.ranks)):
            self._end_at(halt)
        if is_lost:
            raise WorkerError(
                f"{self.plan['label']}: the validation loss is not a number after step {step}; lower learning_rate or raise "
                "warmup_steps"
            )

    def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*given, **options)
        self.watch.note_loss(loss)
        return loss

    def _get_grad_norm(self, *given: Any, **options: Any) -> Any:
        norm = super()._get_grad_norm(*given, **options)
        self.watch.note_norm(norm)
        return norm

    def _end_at(self, halt: Halt) -> None:
        """Raise on every rank, once the launcher can read where, and the checkpoint under way is sealed."""
        with contextlib.suppress(SeqmillError):  # it may hold what made the loss no number; the one before is kept
            self.writer.finish()
        if self.is_world_process_zero():
            write_atomically(Path(self.plan["halt_path"]), orjson.dumps(halt.told()))
        self.ranks.gather(None)  # the first rank that fails takes the others down
        raise WorkerError(f"{self.plan['label']}: step {halt.step}: {halt.what}")

    def start_at(self, step: int) -> None:
        """Count steps and rates from ``step``, where a checkpoint left off."""
        self.first_step = step
        self.meter.start_at(step)


class Steps(TrainerCallback):
    """What happens around a step: seed before it; report, validate, save after it, when due."""

    def __init__(self, trainer: SteppedTrainer) -> None:
        self.trainer = trainer
        self.plan = trainer.plan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        if trainer.is_world_process_zero():
            precision = self.plan["optimization"]["precision"]
            trainer.meter.begin(trainer.model, self.plan["block_size"], precision, args.device)
            trainer.meter.start_at(trainer.first_step)
        if self.plan["adapter"]:
            from tasks.training.adapters.saved import FrozenWeights

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
