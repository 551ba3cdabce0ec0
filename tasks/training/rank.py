"""What every rank of a worker does around its work: die with its launcher, speak in lines, say how it failed.

A worker module ends with ``if __name__ == "__main__": run_rank(work)``.
"""

import json
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.machine import die_with_parent
from tasks.training.lines import failure_line, metrics_line


def rank() -> int:
    """This process's number among the ranks."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number among the ranks of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_ranks() -> int:
    """How many ranks work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def die_with_agent() -> None:
    """End this process when tasks.training.agent dies, whose pid the environment holds on the agent's own host.

    Under torchrun the agent is the parent; DeepSpeed's launcher puts a process between, which outlives the agent.
    """
    agent = os.environ.get("SEQMILL_AGENT")
    if agent is None or not hasattr(os, "pidfd_open"):
        return
    try:
        alive = os.pidfd_open(int(agent))
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([alive], [], [])  # readable once the process has ended
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class StopRequest:
    """Whether this run was asked to save a checkpoint and end: by SIGTERM to this rank, or by a file of the launcher's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard = False

    def listen(self) -> None:
        """From here on SIGTERM asks, and no longer ends this process."""
        signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_: Any) -> None:
        self.heard = True

    def is_made(self) -> bool:
        """Asked after every step."""
        return self.heard or (rank() == 0 and self.path.exists())


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
    die_with_agent()
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
