"""What a run that a Prefect worker started does beside its work: it ends with the worker, and a stop is told as a stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.exceptions import TerminationSignal

from flows.settings import is_started_by_worker, load_settings
from tasks.errors import StoppedError

POLL_SECONDS = 1.0
REPORT_SECONDS = 10.0  # for the engine to tell the server how the run ended


@contextmanager
def under_worker() -> Iterator[None]:
    """The care of one run; nothing where no worker started it."""
    if not is_started_by_worker():
        yield
        return
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except StoppedError as stopped:
        # While ranks train, SIGTERM is theirs. Once they have stopped it is Prefect's again, which knows what it was sent for.
        raise TerminationSignal(signal=signal.SIGTERM) from stopped


def _end_with(worker: int) -> None:
    """End this process when its worker is gone, by SIGTERM: ranks save a checkpoint, and the engine reports the run Crashed.

    Nobody could cancel it any more, and the next worker would start the run a second time beside it.
    """
    while os.getppid() == worker:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(load_settings().stop_seconds + REPORT_SECONDS)
    os._exit(1)
