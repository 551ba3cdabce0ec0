"""One way to train, on one rank, for benchmarks.train_step: it waits for its turn, trains a few steps, and tells how long.

Reads   PLAN.json, a training plan with "way", "turns" and "steps_per_turn"; turn-<rank>, a pipe: a byte is a turn
Writes  told-<rank>, a pipe: a line of JSON a turn
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tasks.training import worker
from tasks.training.datasets import collate, open_rows, training_loader
from tasks.training.meter import flops_per_token, peak_flops
from tasks.training.order import Share
from tasks.training.rank import rank, run_rank
from tasks.training.trainer import SteppedTrainer
from tasks.training.weights import new_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Turns(TrainerCallback):  # type: ignore[misc]  # Transformers is not followed here
    """Waits for a turn before its first step, and ends it behind its last."""

    def __init__(self, plan: dict[str, Any]) -> None:
        folder, self.steps = Path(plan["turns"]), plan["steps_per_turn"]
        self.turn = os.open(folder / f"turn-{rank()}", os.O_RDONLY)
        self.told = os.open(folder / f"told-{rank()}", os.O_WRONLY)
        self.facts: dict[str, float] = {}
        self.began = (0.0, 0.0)

    def before(self, step: int) -> None:
        if step % self.steps == 0:
            os.read(self.turn, 1)
            self.began = time.perf_counter(), time.process_time()

    def after(self, step: int) -> None:
        if step % self.steps == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
            line = {"seconds": wall, "cpu_seconds": cpu, **self.facts}
            os.write(self.told, (json.dumps(line) + "\n").encode())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.after(state.global_step)


def bare(plan: dict[str, Any], turns: Turns) -> None:
    """A plain PyTorch loop: autocast, the model's own loss, the gradient's norm clipped, fused AdamW."""
    told = plan["optimization"]
    model = new_model(plan["model"]).to(DEVICE).train()
    dtype = torch.bfloat16 if told["precision"] == "bf16" else torch.float32
    optimizer = torch.optim.AdamW(model.parameters(), lr=told["learning_rate"], fused=True)
    turns.facts = {"flops_per_token": flops_per_token(model, plan["block_size"]), "peak_flops": 0.0}
    share = Share(0, 1, plan["batch"]["micro_batch_size"], plan["batch"]["accumulation"])
    batches = iter(training_loader(plan["train_files"], told["seed"], share, 0, plan["num_steps"]))
    for step in range(plan["num_steps"]):
        if step % turns.steps == 0:  # the fastest of all turns counts: a busy neighbor makes the others slow
            turns.facts["peak_flops"] = max(turns.facts["peak_flops"], peak_flops(DEVICE, dtype))
        turns.before(step)
        for batch in next_batches(batches, share.accumulation):
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}, use_cache=False).loss
            (loss / share.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), told["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        turns.after(step + 1)


def next_batches(batches: Iterator[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return [next(batches) for _ in range(number)]


def trainer(plan: dict[str, Any], turns: Turns) -> None:
    """Trainer as it comes, with a DeepSpeed file where the plan has one."""
    told, batch = plan["optimization"], plan["batch"]
    if plan["deepspeed"]:
        worker.quiet_libraries()
        worker.join_ranks()
    arguments = TrainingArguments(
        output_dir=plan["checkpoint_dir"],
        per_device_train_batch_size=batch["micro_batch_size"],
        gradient_accumulation_steps=batch["accumulation"],
        max_steps=plan["num_steps"],
        learning_rate=told["learning_rate"],
        bf16=told["precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if plan["deepspeed"] and not torch.cuda.is_available() else None,
        deepspeed={**plan["deepspeed"], "steps_per_print": 1 << 60, "zero_force_ds_cpu_optimizer": False}
        if plan["deepspeed"]
        else None,
        save_strategy="no",
        logging_steps=1 << 30,
        report_to="none",
        disable_tqdm=True,
    )
    model = new_model(plan["model"])
    model.config.use_cache = False
    rows: Any = open_rows(plan["train_files"])
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[turns]).train()


def ours(plan: dict[str, Any], turns: Turns) -> None:
    """The worker, whole."""

    class WaitingTrainer(SteppedTrainer):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            self.add_callback(turns)

    vars(worker)["SteppedTrainer"] = WaitingTrainer
    worker.train(plan)


WAYS = {"bare": bare, "trainer": trainer, "ours": ours}


def train(plan: dict[str, Any]) -> None:
    WAYS[plan["way"]](plan, Turns(plan))


if __name__ == "__main__":
    run_rank(train)
    os._exit(0)  # as the worker does: DeepSpeed and gloo threads may hold the interpreter's exit for seconds
