"""What every rank of a worker does around its work: die with its launcher, speak in lines, say how it failed.

A worker module ends with ``if __name__ == "__main__": run_rank(work)``.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.machine import die_with_parent
from tasks.training.lines import failure_line, metrics_line

log = logging.getLogger(__name__)


def rank() -> int:
    """This process's number among the ranks."""
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    """How many ranks work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speak(line: str) -> None:
    """Write one whole line to the launcher: one call, so that two ranks' lines never mix (below 4,096 bytes)."""
    sys.stdout.flush()
    os.write(1, f"{line}\n".encode())


def report_metrics(metrics: dict[str, Any]) -> None:
    """Hand metrics to the launcher's ``on_metrics``."""
    speak(metrics_line(metrics))


def run_rank(work: Callable[[dict[str, Any]], None]) -> None:
    """Call ``work`` with the plan, the JSON file named by the last argument; on failure say so and exit with 1."""
    die_with_parent(os.getppid())
    # Rank 0 speaks; what goes wrong is said by all.
    logging.basicConfig(level=logging.INFO if rank() == 0 else logging.WARNING, format="%(levelname)s:%(name)s: %(message)s")
    try:
        work(json.loads(Path(sys.argv[-1]).read_text()))
    except Exception as error:
        traceback.print_exc()
        speak(failure_line(rank(), error))
        sys.stdout.flush()
        # Not sys.exit: destroying a process group whose peers still wait in a collective hangs.
        os._exit(1)
