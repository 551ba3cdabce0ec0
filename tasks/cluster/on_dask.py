"""Dask distributed as an engine: a scheduler's address, and as many slots as its workers have threads."""

import threading
import uuid
from collections.abc import Sequence

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from tasks.cluster.engine import LostError
from tasks.cluster.group import Order, Outcome, run_group
from tasks.errors import SettingsError, WorkerError

CONNECT_SECONDS = 30


class DaskEngine:
    """One client of a scheduler."""

    def __init__(self, address: str | None) -> None:
        if not address:
            raise SettingsError(
                "runner: dask needs the address of its scheduler; set SEQMILL_RUNNER_ADDRESS, such as tcp://host:8786"
            )
        self.address = address
        self._ended = threading.Condition()
        try:
            self.client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="seqmill")
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"runner: no Dask scheduler answers at {address} ({error}); start it with `dask scheduler`, or mend the address"
            ) from None

    def num_slots(self) -> int:
        try:
            return sum(self.client.ncores().values())
        except OSError:  # the scheduler is away; what was sent tells how that ends
            return 0

    def send(self, order: Order) -> Future:
        # A key of its own: Dask would take two equal orders for one. retries: what a worker raises is an answer.
        future = self.client.submit(run_group, order, key=f"seqmill-{uuid.uuid4().hex}", pure=False, retries=0)
        future.add_done_callback(self._tell)
        return future

    def wait(self, handles: Sequence[Future], seconds: float) -> list[Future]:
        with self._ended:
            self._ended.wait_for(lambda: any(handle.done() for handle in handles), seconds)
        return [handle for handle in handles if handle.done()]

    def outcome(self, handle: Future) -> Outcome:
        if handle.status in ("cancelled", "lost"):
            raise WorkerError(f"runner: the Dask scheduler at {self.address} ended, or forgot the run; run again to go on")
        try:
            outcome: Outcome = handle.result()
        except KilledWorker as error:
            num_workers = error.allowed_failures + 1  # Dask sends an order again by itself
            raise LostError(f"{error.last_worker.address}, the last of {num_workers}", num_workers) from None
        except Exception as error:
            raise WorkerError(f"runner: Dask: {type(error).__name__}: {error}; run again to go on") from error
        return outcome

    def cancel(self, handle: Future) -> None:
        handle.cancel()

    def _tell(self, _: Future) -> None:
        with self._ended:
            self._ended.notify_all()
