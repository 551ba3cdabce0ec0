"""What a run that a Prefect worker started does beside its work: it waits for its turn, it ends with its worker and with the run
that started it, and a stop is told as a stop."""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException, TerminationSignal

from flows.parent import ENDED, ParentWatch, cancel
from flows.server import prefect_folder
from flows.settings import is_started_by_worker, load_settings
from flows.turn import turn
from flows.underway import hold
from tasks.errors import StoppedError

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
REPORT_SECONDS = 10.0  # for the engine to tell the server how the run ended
LIFE_SECONDS = 10.0  # no stage can begin while the run is told as crashed
NO_HEARTBEAT = "no heartbeat"  # how the message of deployments/automations.yaml begins
AWAITING = "AwaitingTurn"


@contextmanager
def under_worker() -> Iterator[None]:
    """The care of one run; where no worker started it, a note that this process is at work on it."""
    context = FlowRunContext.get()
    run = context.flow_run.id if context and context.flow_run else None
    if not is_started_by_worker():
        if run:
            hold(prefect_folder(load_settings()), run)
        yield
        return
    threading.Thread(target=_end_with, args=(os.getppid(), run), daemon=True).start()
    try:
        yield
    except StoppedError as stopped:
        # While ranks train, SIGTERM is theirs. Once they have stopped it is Prefect's again, which knows what it was sent for.
        raise TerminationSignal(signal=signal.SIGTERM) from stopped


def turn_of(recipe: str, root: Path) -> AbstractContextManager[None]:
    """The turn of a recipe on the store at ``root``; nothing where no worker started this run: a person who did is not kept."""
    context = FlowRunContext.get()
    if not is_started_by_worker() or context is None or context.flow_run is None:
        return nullcontext()
    return turn(root, recipe, context.flow_run.name, _told_as_waiting)


@contextmanager
def _told_as_waiting(holder: str) -> Iterator[None]:
    """While it lasts, the UI shows the run as waiting for another, and then as running again."""
    _tell(State(type=StateType.RUNNING, name=AWAITING, message=f"waits for the recipe's run {holder!r} to end"))
    yield
    _tell(State(type=StateType.RUNNING, name="Running"))


def _tell(state: State[None]) -> None:
    context = FlowRunContext.get()
    assert context
    assert context.flow_run
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(context.flow_run.id, state, force=True)
    except (httpx.HTTPError, PrefectException) as error:  # the turn is worth more than what is shown of it
        log.warning("prefect: not told that this run is %s: %s", state.name, error)


def _end_with(worker: int, run: UUID | None) -> None:
    """End this process when its worker is gone, by SIGTERM: ranks save a checkpoint, and the engine reports the run Crashed.

    Nobody could cancel it any more, and the next worker would start the run a second time beside it. As long as the worker is
    there, cancel the run where the one that started it has ended.
    """
    looked, watch = time.monotonic(), ParentWatch()
    while os.getppid() == worker and _is_of_prefect(worker):
        time.sleep(POLL_SECONDS)
        if run and time.monotonic() - looked >= LIFE_SECONDS:
            _look_up(run, watch)
            looked = time.monotonic()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(load_settings().stop_seconds + REPORT_SECONDS)
    os._exit(1)


def _look_up(run: UUID, watch: ParentWatch) -> None:
    """Ask the server how this run is told, and whether its parent is there still."""
    try:
        with get_client(sync_client=True) as client:
            told = client.read_flow_run(run)
            _say_that_it_lives(client, told)
            if watch.is_over(client, told):
                log.warning("prefect: %s; this one is cancelled, and what is finished is kept", ENDED)
                cancel(client, [run])
    except Exception as error:  # away still, or the run was deleted; the watch over the worker is worth more
        log.debug("prefect: cannot be asked how this run is told: %s", error)


def _say_that_it_lives(client: SyncPrefectClient, run: FlowRun) -> None:
    """Take back that the run crashed, where only its heartbeats were missed: the server was away, or the machine slept."""
    state = run.state
    if state and state.is_crashed() and (state.message or "").startswith(NO_HEARTBEAT):
        client.set_flow_run_state(run.id, State(type=StateType.RUNNING, name="Running"), force=True)
        log.warning("prefect: this run was told as crashed, for the server heard nothing of it; it is under way")


def _is_of_prefect(pid: int) -> bool:
    """False for what takes a dead worker's children: it died while this process started, and was never its parent."""
    try:
        return b"prefect" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # no /proc, or another container's process
        return True
