"""What a build may use of this machine: workers, ranks, progress.

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
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
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

# Up to so many workers are threads of one process, which loads a tokenizer once: nearly all that a shard costs runs outside
# Python's lock. The lock is held for 0.12 s of 75 MB of documents: some 13 threads would wait for it.
MOST_THREADS = 8

Advance = Callable[[int], None]


class Progress(Protocol):
    """Opens a progress bar: a label, the total in ``unit`` (None where it is not known), the unit ("B", "documents", "steps")."""

    def __call__(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Advance]: ...


class ShardRunner(Protocol):
    """Applies a function to every item and returns the results in the items' order.

    The function and the items are picklable; the results are small.
    """

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]: ...


class Groups(Protocol):
    """Where groups of shards run, when that is not this machine: see tasks.cluster."""

    def run(self, function: Callable[[Any], Any], items: Sequence[Any], label: str, advance: Advance) -> list[Any]:
        """Apply a function to every item and return the results in the items' order; ``advance`` is told the items done."""


@contextmanager
def quiet(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """The progress bar that shows nothing."""
    yield lambda amount: None


@dataclass(frozen=True)
class Nodes:
    """The machines that train together; the one with the number 0 leads, the others join it."""

    least: int  # with fewer, no training begins
    most: int
    host: str  # of the one that leads, as the others reach it
    port: int
    wait_seconds: float = 600.0  # for the least number of nodes, and for the node that leads
    settle_seconds: float = 15.0  # from the least number on, for the others
    secret: str = field(default="", repr=False)  # which all nodes know; never told to anybody


@dataclass(frozen=True)
class TrainingSettings:
    """How the launcher runs ranks here."""

    num_ranks: int | None = None  # None: every GPU, or on CPU the most cores that divide the global batch
    deepspeed_config: Path | None = None  # None: the preset zero2.json
    picks_preset: bool = False  # the cheapest that fits, in place of deepspeed_config: see tasks.training.memory
    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    hostfile: Path | None = None
    micro_batch_size: int | None = None  # rows per device per forward; None: what divides the global batch
    monitors: tuple[str, ...] = ()  # what keeps the ranks' reports besides the manifest: see tasks.training.monitors
    threads_per_rank: int = 1  # 2 threads beside a busy neighbor ran 7 times slower than 1
    # From SIGTERM on, for the step under way, its checkpoint and the ranks' end. Who asked mostly waits for less: Slurm,
    # Kubernetes and Prefect for 30 s, and torchrun too, where the signal went to the whole process group.
    stop_seconds: float = 600
    nodes: Nodes | None = None  # None: this machine trains alone, or with the hosts of a hostfile
    checkpoints: Path | None = None  # a folder that all nodes see; None: the store's staging
    num_slots: int = 1  # so many stages that train or evaluate may run at the same time, each on its share of the cores


@dataclass(frozen=True)
class Machine:
    """What the build functions are given of this machine."""

    num_workers: int = 1
    pool: Literal["threads", "processes"] | None = None  # None: threads, up to MOST_THREADS workers
    endpoints: Mapping[str, str] = field(default_factory=dict)  # "huggingface", "modelscope": where the hubs answer
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)  # by host: what opens it; never told to anybody else
    training: TrainingSettings = field(default_factory=TrainingSettings)
    progress: Progress = quiet
    runner: ShardRunner | None = None
    cluster: Groups | None = None  # None: this machine's own pool
    on_metrics: Callable[[dict[str, Any]], None] | None = None
    recipe: str | None = None  # who asks for the work, by its name: manifests tell it

    def map_shards(self, function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]:
        """Apply ``function`` to every item, in the pool, and return the results in the items' order."""
        if self.runner:
            return self.runner(function, items, label)
        with self.progress(label, len(items), "shards") as advance:
            return self.run_in_pool(function, items, label, advance)

    def run_in_pool(
        self, function: Callable[[Any], Any], items: Sequence[Any], label: str, advance: Advance = lambda amount: None
    ) -> list[Any]:
        """Apply ``function`` to every item in the pool of ``num_workers``, which is started once; one worker is this thread.

        Where there is a cluster, it is the pool.

        ``advance`` is told 1 as each item is done. The first item that fails fails the call: what had not begun is dropped, and
        what had begun ends before the call does, so that nothing writes behind the back of who calls again.
        """
        if self.cluster:
            return self.cluster.run(function, items, label, advance)
        results = []
        if self.num_workers == 1:
            for item in items:
                results.append(function(item))
                advance(1)
            return results
        pool = _pool(self.num_workers, self.has_processes)
        futures: list[Future[Any]] = []
        try:
            futures.extend(pool.submit(function, item) for item in items)
            for future in futures:
                results.append(future.result())
                advance(1)
        except BrokenProcessPool as error:
            _forget_pool(pool)
            raise WorkerError(
                f"{label}: a worker process died (killed, or out of memory); finished shards are kept: run again"
            ) from error
        finally:
            wait([future for future in futures if not future.cancel()])
        return results

    @property
    def has_processes(self) -> bool:
        """Whether the pool's workers are processes, not threads of this one."""
        if self.cluster:
            return True
        return self.num_workers > 1 and (self.num_workers > MOST_THREADS if self.pool is None else self.pool == "processes")


_pools: dict[tuple[int, bool], Executor] = {}
_pools_lock = threading.Lock()


def _pool(num_workers: int, has_processes: bool) -> Executor:
    with _pools_lock:
        if (num_workers, has_processes) not in _pools:
            _pools[num_workers, has_processes] = _start_pool(num_workers, has_processes)
        return _pools[num_workers, has_processes]


def _start_pool(num_workers: int, has_processes: bool) -> Executor:
    if not has_processes:
        return ThreadPoolExecutor(num_workers, thread_name_prefix="shards")
    # spawn: the parent holds threads (Prefect, Arrow), and forking those is undefined.
    return ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),))


def _forget_pool(broken: Executor) -> None:
    with _pools_lock:
        for key in [key for key, pool in _pools.items() if pool is broken]:
            del _pools[key]


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides what ends
    end_with_parent(parent)


def give_back_memory() -> None:
    """Return freed memory to the system, which glibc does not do by itself where small blocks lie between large ones."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)


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
