"""Ray as an engine: a cluster's address, and as many slots as its nodes have CPUs."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import exceptions as ex

from tasks.cluster.engine import LostError
from tasks.cluster.group import Order, Outcome, run_group
from tasks.errors import SettingsError, WorkerError

LOST = (
    ex.WorkerCrashedError, ex.NodeDiedError, ex.LocalRayletDiedError, ex.OutOfMemoryError, ex.ObjectLostError,
    ex.OwnerDiedError, ex.TaskCancelledError, ex.TaskUnschedulableError,
)  # fmt: skip


@contextmanager
def own_signals() -> Iterator[None]:
    """Ray takes SIGTERM from whoever starts it; a flow that is told to stop keeps what it has first."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class RayEngine:
    """This process as a driver of a cluster. A process has one at most."""

    def __init__(self, address: str | None) -> None:
        try:
            with own_signals():
                ray.init(address=address or "auto", log_to_driver=False, logging_level="warning", ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            told = " ".join(str(error).split())[:200]
            raise SettingsError(
                f"runner: no Ray cluster answers at {address or 'auto'} ({told}); run where `ray start` has made a node, "
                "or set SEQMILL_RUNNER_ADDRESS to ray://host:10001"
            ) from None
        # max_retries: a lost group is sent again by us, who count and tell it.
        self.remote = ray.remote(num_cpus=1, max_retries=0)(run_group)

    def num_slots(self) -> int:
        return int(ray.cluster_resources().get("CPU", 0))

    def send(self, order: Order) -> Any:
        return self.remote.remote(order)

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        ready, _ = ray.wait(list(handles), num_returns=1, timeout=seconds)
        return list(ready)

    def outcome(self, handle: Any) -> Outcome:
        try:
            outcome: Outcome = ray.get(handle)
        except LOST as error:
            raise LostError(" ".join(str(error).split())[:200]) from None
        except ex.RayError as error:
            raise WorkerError(f"runner: Ray: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
        return outcome

    def cancel(self, handle: Any) -> None:
        with contextlib.suppress(ex.RayError, ValueError):
            ray.cancel(handle)
