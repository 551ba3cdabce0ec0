"""Processes that outlive the command that starts them: Prefect's server and worker, each known by a file that names it.

Writes  <folder>/<name>.json   the process, when it started, and the address it serves
        <folder>/<name>.log    what it says
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.errors import WorkerError

POLL_SECONDS = 0.1
_HAS_PROC = Path("/proc/self/stat").exists()  # elsewhere ps tells the same
KILL_SECONDS = 10.0  # for the kernel to end what got SIGKILL


@dataclass(frozen=True)
class Service:
    """A process that was started here; ``started`` tells it from a later one of the same number."""

    name: str
    pid: int
    started: str
    url: str

    @property
    def is_running(self) -> bool:
        return started(self.pid) == self.started


def running(folder: Path, name: str) -> Service | None:
    """The service that a file in ``folder`` names, if its process is there still."""
    service = _noted(folder, name)
    return service if service and service.is_running else None


def noted_url(folder: Path, name: str) -> str | None:
    """The address that a service serves, or served before it died; None where none is noted."""
    service = _noted(folder, name)
    return service.url if service else None


def _noted(folder: Path, name: str) -> Service | None:
    try:
        return Service(**json.loads((folder / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def start(folder: Path, name: str, command: list[str], environment: Mapping[str, str], url: str) -> Service:
    """Start a process in a session of its own, and write down which it is."""
    with (folder / f"{name}.log").open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    service = Service(name, process.pid, started(process.pid) or "", url)
    (folder / f"{name}.json").write_text(json.dumps(asdict(service)))
    return service


def stop(folder: Path, name: str, seconds: float) -> Service | None:
    """End the service that ``folder`` names and all that it started; None where none runs.

    By SIGTERM to the service, which passes it on or is missed by its children, and after ``seconds`` by SIGKILL to all.
    """
    service = running(folder, name)
    if service:
        family = {service.pid: service.started, **_descendants(service.pid)}
        with contextlib.suppress(ProcessLookupError):
            os.kill(service.pid, signal.SIGTERM)
        if not _ended(family, seconds):
            for pid in _alive(family):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not _ended(family, KILL_SECONDS):
                raise WorkerError(f"{name}: process {_alive(family)[0]} does not end; it waits for a disk, or is another user's")
    (folder / f"{name}.json").unlink(missing_ok=True)
    return service


def _ended(family: Mapping[int, str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _alive(family):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _alive(family: Mapping[int, str]) -> list[int]:
    return [pid for pid, when in family.items() if started(pid) == when]


def _descendants(ancestor: int) -> dict[int, str]:
    """The processes that ``ancestor`` has started, and they in turn, with when they started."""
    told = {pid: parent_and_start for pid in _pids() if (parent_and_start := _told(pid))}
    found: dict[int, str] = {}
    parents = {ancestor}
    while parents:
        children = {pid: when for pid, (parent, when) in told.items() if parent in parents and pid not in found}
        found.update(children)
        parents = set(children)
    return found


def started(pid: int) -> str | None:
    """When a process started, as the system tells it; None where there is none, or it has ended and nobody has asked yet."""
    told = _told(pid)
    return told[1] if told else None


def _told(pid: int) -> tuple[int, str] | None:
    """A process's parent and start; None where it has ended."""
    if _HAS_PROC:
        try:
            # proc(5): behind the name in parentheses come the state, the parent and, 18 on, the start in ticks since boot.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, parent, when = fields[0], fields[1], fields[19]
    else:
        fields = _ps("-o", "stat=,ppid=,lstart=", "-p", str(pid)).split(maxsplit=2)
        if not fields:
            return None
        state, parent, when = fields
    return None if state.startswith("Z") else (int(parent), when.strip())


def _pids() -> list[int]:
    if _HAS_PROC:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [int(line) for line in _ps("-A", "-o", "pid=").splitlines()]


def _ps(*options: str) -> str:
    return subprocess.run(["ps", *options], capture_output=True, text=True, check=False).stdout
