"""The runs that persons started here: one whose process is gone, by kill -9 or a power cut, is told as Crashed.

Writes  <store>/.prefect/runs/<flow run id>   the host; held with flock(2) by the run's process, and so free once it is gone

A worker tells the server of its own runs. Of a run in a terminal only its process did, and the server would show it as Running
for ever.
"""

import contextlib
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

log = logging.getLogger(__name__)

RUNS = "runs"
MESSAGE = "its process was killed; what is finished is kept, run it again to go on"
# A process that has run more flows than this one after the other is a suite of tests: the oldest are no longer held.
MOST_HELD = 64
FORGOTTEN_SECONDS = 30 * 86_400.0  # of a run that no server knows of which was asked so long

_held: list[int] = []


def hold(folder: Path, run: UUID) -> None:
    """Note that this process works on a run, until it ends. A folder that cannot be written, or locked, keeps no note."""
    path = folder / RUNS / str(run)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(handle, platform.node().encode())
        _held.append(handle)
        while len(_held) > MOST_HELD:
            os.close(_held.pop(0))


def gone(folder: Path) -> list[Path]:
    """The notes of this host's runs whose process is gone."""
    return [path for path in sorted((folder / RUNS).glob("*-*")) if _is_gone(path)]


def _is_gone(path: Path) -> bool:
    """Whether nobody holds the note, and this host wrote it: another's lock need not be seen here."""
    with contextlib.suppress(OSError), path.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return handle.read() == platform.node().encode()
    return False


def crash_gone(folder: Path) -> None:
    """Tell the server that PREFECT_API_URL names of every run whose process is gone, where it takes that for under way."""
    if notes := gone(folder):
        try:
            told = _tell(UUID(note.name) for note in notes)
        except Exception as error:  # what is shown of a run of yesterday is not worth today's
            log.debug("prefect: cannot be told of runs that are gone: %s", error)
            return
        for note in notes:
            with contextlib.suppress(OSError):
                if UUID(note.name) in told or time.time() - note.stat().st_mtime > FORGOTTEN_SECONDS:
                    note.unlink()


def _tell(runs: Iterable[UUID]) -> set[UUID]:
    """Mark those Crashed, with their tasks, that are not told as ended; the runs that the server knows."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import State, StateType

    known = set()
    with get_client(sync_client=True) as client:
        asked = FlowRunFilter.model_validate({"id": {"any_": list(runs)}})
        for run in client.read_flow_runs(flow_run_filter=asked):
            known.add(run.id)
            if run.state is None or not run.state.is_final():
                for task in client.request("POST", "/task_runs/filter", json=_under_way(run.id)).json():
                    crashed = {"state": {"type": "CRASHED", "message": MESSAGE}, "force": True}
                    client.request("POST", f"/task_runs/{task['id']}/set_state", json=crashed)
                client.set_flow_run_state(run.id, State(type=StateType.CRASHED, message=MESSAGE), force=True)
                log.info("prefect: the run %r of an earlier command is told as crashed: %s", run.name, MESSAGE)
    return known


def _under_way(run: UUID) -> dict[str, Any]:
    """What asks the server for the tasks of a run that it takes for under way."""
    return {"flow_runs": {"id": {"any_": [str(run)]}}, "task_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
