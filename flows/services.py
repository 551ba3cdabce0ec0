"""Processes that outlive the command that starts them: Prefect's server and worker, each known by a file that names it.

Writes  <folder>/<name>.json   the process, when it started, and the address it serves
        <folder>/<name>.log    what it says
"""

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
    try:
        service = Service(**json.loads((folder / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return service if service.is_running else None


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
    """End the service that ``folder`` names, by SIGTERM and after ``seconds`` by SIGKILL; None where none runs."""
    service = running(folder, name)
    if service:
        os.kill(service.pid, signal.SIGTERM)
        if not _ended(service, seconds):
            os.killpg(service.pid, signal.SIGKILL)  # its session's, so its own children go too
            if not _ended(service, KILL_SECONDS):
                raise WorkerError(f"{name}: process {service.pid} does not end; it waits for a disk, or is another user's")
    (folder / f"{name}.json").unlink(missing_ok=True)
    return service


def _ended(service: Service, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while service.is_running:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def started(pid: int) -> str | None:
    """When a process started, as the system tells it; None where there is none, or it has ended and nobody has asked yet."""
    if not Path("/proc/self/stat").exists():
        command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
        state, _, when = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
    else:
        try:
            # proc(5): behind the name, in parentheses, come the state and, 19 fields on, the start in ticks since boot.
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            when = fields[18]
        except (FileNotFoundError, ProcessLookupError):
            return None
    return None if not state or state.startswith("Z") else when.strip()
