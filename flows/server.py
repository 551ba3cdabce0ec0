"""A Prefect server of our own for one command: started, waited for, stopped; its database lives in the store.

The ephemeral server that Prefect would start by itself loses task runs; this one keeps them, and `seqmill ui` shows them.
"""

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from flows.services import running
from flows.settings import LOOPBACK, Settings, environment, inherited_environment, prefect_api_url, prefect_environment
from flows.underway import crash_gone
from tasks.errors import SettingsError, WorkerError

log = logging.getLogger(__name__)

# The first start makes the database: 17 s on two busy cores. Later ones take 3 s.
START_SECONDS = 120.0
STOP_SECONDS = 10.0

# The server ends with the command that started it, even by kill -9. It does not hear SIGTERM: schedulers send that to every
# process of a run, and the run still has to tell the server how it ended.
_SERVER = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
from tasks.machine import die_with_parent
die_with_parent(int(sys.argv[1]))
sys.argv = ["prefect", "server", "start", "--host", sys.argv[2], "--port", sys.argv[3]]
from prefect.cli import app
app()
"""


@contextmanager
def prefect_server(settings: Settings, *, verbose: bool = False, port: int | None = None) -> Iterator[str]:
    """Make Prefect ready to be imported; yields the API's address.

    Uses the server that PREFECT_API_URL names, or the store's that `seqmill up` started; where there is none, starts one
    on loopback and stops it at the end.
    """
    if staying := staying_url(settings):
        with environment(prefect_environment(settings, None if prefect_api_url() else staying, verbose)):
            crash_gone(prefect_folder(settings))
            yield staying
        return
    folder, port = prefect_folder(settings), port or free_port()
    url = f"http://{LOOPBACK}:{port}/api"
    folder.mkdir(parents=True, exist_ok=True)
    with environment(prefect_environment(settings, url, verbose)):
        process = _start(folder, port, url)
        try:
            crash_gone(folder)
            yield url
        finally:
            _stop(process)


def staying_url(settings: Settings) -> str | None:
    """The API of the server that PREFECT_API_URL names, or that `seqmill up` started; None where there is neither."""
    service = running(prefect_folder(settings), "server")
    return prefect_api_url() or (service.url if service else None)


def asked_url(settings: Settings) -> str:
    """``staying_url`` for what makes no sense without one. Raises SettingsError where there is none."""
    if url := staying_url(settings):
        return url
    raise SettingsError("PREFECT_API_URL: not set, and no server of this store is up; name the server, or call seqmill up")


def prefect_folder(settings: Settings) -> Path:
    """Where Prefect keeps its database, and we what we know of its processes."""
    return settings.store_root / ".prefect"


def server_command(host: str, port: int) -> list[str]:
    """What starts a server that stays until it is told to end."""
    return [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _start(folder: Path, port: int, url: str) -> subprocess.Popen[bytes]:
    log_path = folder / "server.log"
    # Two servers that make one database at once would fail: one starts at a time.
    with (folder / "start.lock").open("a") as lock, log_path.open("ab") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(os.getpid()), LOOPBACK, str(port)],
            env=inherited_environment(),
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the command, which still tells the server how the run ended
        )
        try:
            wait_until_healthy(lambda: process.poll() is None, url, log_path)
        except BaseException:
            _stop(process)
            raise
    log.debug("prefect server at %s", url)
    return process


def wait_until_healthy(is_running: Callable[[], bool], url: str, log_path: Path) -> None:
    """Wait until a server answers. Raises WorkerError where its process ends, or says nothing for START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if not is_running():
            raise WorkerError(f"prefect server: ended at its start; read {log_path}")
        try:
            if httpx.get(f"{url}/health", timeout=2.0, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass  # not yet
        time.sleep(0.1)
    raise WorkerError(f"prefect server: not healthy after {START_SECONDS:.0f} s; read {log_path}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
