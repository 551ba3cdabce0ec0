"""What a build may use of this machine: processes, ranks, progress.

Nothing here enters a key: it decides how fast an artifact is made and on what, not what it is.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Protocol

from tasks.errors import WorkerError

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PARENT_POLL_SECONDS = 1.0

Advance = Callable[[int], None]


class Progress(Protocol):
    """Opens a progress bar: a label, the total in ``unit`` (None where it is not known), the unit ("B", "documents", "steps")."""

    def __call__(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Advance]: ...


class ShardRunner(Protocol):
    """Applies a function to every item and returns the results in the items' order.

    The function and the items are picklable; the results are small.
    """

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]: ...


@contextmanager
def quiet(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """The progress bar that shows nothing."""
    yield lambda amount: None


@dataclass(frozen=True)
class TrainingSettings:
    """How the launcher runs ranks here."""

    num_ranks: int | None = None  # None: every GPU, or on CPU the most cores that divide the global batch
    deepspeed_config: Path | None = None  # None: the preset zero2.json
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    hostfile: Path | None = None
    micro_batch_size: int | None = None  # rows per device per forward; None: what divides the global batch
    threads_per_rank: int = 1  # 2 threads beside a busy neighbor ran 7 times slower than 1


@dataclass(frozen=True)
class Machine:
    """What the build functions are given of this machine."""

    num_workers: int = 1
    endpoints: Mapping[str, str] = field(default_factory=dict)  # "huggingface", "modelscope": where the hubs answer
    training: TrainingSettings = field(default_factory=TrainingSettings)
    progress: Progress = quiet
    runner: ShardRunner | None = None
    on_metrics: Callable[[dict[str, Any]], None] | None = None

    def map_shards(self, function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]:
        """Apply ``function`` to every item, in the process pool, and return the results in the items' order."""
        if self.runner:
            return self.runner(function, items, label)
        if self.num_workers == 1 or len(items) <= 1:
            return [function(item) for item in items]
        return self.run_in_pool(function, items, label)

    def run_in_pool(self, function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]:
        """Apply ``function`` to every item in the pool of ``num_workers`` processes, which is started once."""
        try:
            return list(_pool(self.num_workers).map(function, items))
        except BrokenProcessPool as error:
            _pools.pop(self.num_workers, None)
            raise WorkerError(
                f"{label}: a worker process died (killed, or out of memory); finished shards are kept: run again"
            ) from error


_pools: dict[int, ProcessPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool(num_workers: int) -> ProcessPoolExecutor:
    with _pools_lock:
        if num_workers not in _pools:
            # spawn: the parent holds threads (Prefect, Arrow), and forking those is undefined.
            _pools[num_workers] = ProcessPoolExecutor(
                num_workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)
            )
        return _pools[num_workers]


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides what ends
    end_with_parent(parent)


def die_with_parent(parent: int) -> None:
    """End this process at once when ``parent``, or the thread of it that started this process, ends, even by kill -9.

    Linux's PDEATHSIG speaks for the *thread*: not for a process that a passing thread starts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """End this process within PARENT_POLL_SECONDS of the process ``parent``, whichever of its threads started it.

    A flow's threads start the pool's processes, and end with the flow; the pool serves the next flow too.
    """
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)
