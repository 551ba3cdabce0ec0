"""The training worker as benchmarks start it: it trains as its plan says, then tells its rank's peak of resident memory.

Reads   PLAN.json, a training plan
Writes  peak-<rank>.json beside the plan's result: the rank's VmHWM (proc_pid_status(5)), in bytes
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from tasks.training.rank import rank, run_rank

VMHWM = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def train_and_tell(plan: dict[str, Any]) -> None:
    from tasks.training.worker import train  # heavy, and a part of what is measured

    train(plan)
    found = VMHWM.search(Path("/proc/self/status").read_text())
    assert found, "no VmHWM in /proc/self/status"
    peak_path(plan["result_path"], rank()).write_text(json.dumps(int(found[1]) * 1024))


def peak_path(result_path: str, of_rank: int) -> Path:
    """Where a rank tells its peak."""
    return Path(result_path).with_name(f"peak-{of_rank}.json")


if __name__ == "__main__":
    run_rank(train_and_tell)
    os._exit(0)  # as the worker does: DeepSpeed and gloo threads may hold the interpreter's exit for seconds
