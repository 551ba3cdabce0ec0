"""A worker that carries out several training plans one after the other: a launch costs seconds, a plan a fraction of one."""

import os
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from tasks.training.rank import run_rank
from tasks.training.worker import train


def train_all(plan: dict[str, Any]) -> None:
    for each in plan["plans"]:
        train(each)
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()


if __name__ == "__main__":
    run_rank(train_all)
    os._exit(0)  # as the worker does: a thread of gloo that is still there when the interpreter ends aborts the process
