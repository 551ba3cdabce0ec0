"""A worker that carries out training plans one after the other, and breaks off where it is told to: a launch costs seconds,
a plan a fraction of one.

A plan's "break": {"stop_after": steps} is told to stop, as by SIGTERM; {"kill_at": step} dies of kill -9 at a step's begin;
{"kill_in_save_of": step} dies half way through writing that step's checkpoint.
"""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from tasks.training import saving, trainer
from tasks.training.rank import StopRequest, rank, report_metrics, run_rank
from tasks.training.worker import train


class StopAfter(StopRequest):
    """Asked to stop after so many steps of this try."""

    def __init__(self, num_steps: int | None) -> None:
        super().__init__(Path("nowhere"))
        self.left = num_steps

    def is_made(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return self.left == 0


def train_all(plan: dict[str, Any]) -> None:
    for each in plan["plans"]:
        trainer.report_metrics = partial(report_as, each["label"])
        order = each.pop("break", {})
        if "kill_at" in order:
            die_at_step(order["kill_at"])
        if "kill_in_save_of" in order:
            die_in_save_of(order["kill_in_save_of"])
        train(each, StopAfter(order.get("stop_after")))
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()


def report_as(label: str, metrics: dict[str, Any]) -> None:
    report_metrics({"label": label, **metrics})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(step: int) -> None:
    begin = trainer.Steps.on_step_begin

    def on_step_begin(self: trainer.Steps, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == step:
            die()
        begin(self, args, state, control, **options)

    trainer.Steps.on_step_begin = on_step_begin  # type: ignore[method-assign]


def die_in_save_of(step: int) -> None:
    """Rank 0 writes half of its tensors and dies; the others have written theirs, or not."""
    write = saving.write_snapshot

    def write_half(path: Path, tensors: saving.Snapshot) -> dict[str, Any]:
        if path.parent.name == f"checkpoint-{step}" and rank() == 0:
            write(path, dict(list(tensors.items())[: len(tensors) // 2]))
            die()
        return write(path, tensors)

    saving.write_snapshot = write_half


if __name__ == "__main__":
    run_rank(train_all)
    os._exit(0)  # as the worker ends
