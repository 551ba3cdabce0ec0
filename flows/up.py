"""`seqmill up`: a Prefect server and a worker that stay, with our deployments; `seqmill down` ends both.

Writes  <store>/.prefect/{server,worker}.{json,log}   the processes and what they say
        <store>/.prefect/profile.json                 the profile that was active before
        Prefect's profiles.toml                       the profile "seqmill", active until down
"""

import fcntl
import json
import logging
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

import flows
from flows import services
from flows.database import check_database, without_database
from flows.server import prefect_folder, server_command, wait_until_healthy
from flows.settings import LOOPBACK, Settings, environment, export_settings, inherited_environment, prefect_environment
from flows.underway import crash_gone
from tasks.errors import SettingsError, WorkerError
from tasks.store import digest_bytes

log = logging.getLogger(__name__)

WORKER_SECONDS = 120.0  # until the server has heard of the worker: 6 s, on two busy cores 20
DOWN_SECONDS = 30.0
STOP_SECONDS = 12.0  # a cancelled run's ranks are gone within 15 s
CANCEL_SECONDS = 60.0  # until the runs are told as cancelled: STOP_SECONDS, and 10 s that Prefect's worker takes to say so

# Where a user limits a deployment or a pool, a run holds a lease. In memory, the default, leases are lost with the server, and
# Prefect ends every run that had one.
SERVER_ENVIRONMENT = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",  # to server.log: a database that is away, a pool that is used up
}

# What a worker and its runs are told beside what the user has set.
WORKER_ENVIRONMENT = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; the least that Prefect takes. deployments/automations.yaml waits for 3
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # a run that is due starts so soon
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",  # to worker.log; all lines go to the server
    # A server whose database is away for a moment answers 500, which Prefect's clients take for final. Five tries, a minute.
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
    "SEQMILL_STOP_SECONDS": f"{STOP_SECONDS:g}",
}


def bring_up(settings: Settings, host: str, port: int) -> str:
    """Start what does not run yet, deploy, and return the API's address. Raises SettingsError for a port that is taken."""
    root, folder, profiles = project_root(), prefect_folder(settings), profiles_path()
    folder.mkdir(parents=True, exist_ok=True)
    export_settings(settings)
    with _alone(folder):
        server = services.running(folder, "server") or _start_server(settings, folder, host, port)
        if server.url != (wanted := address(host, port)):
            log.warning("the server is up at %s, not at %s; to move it, call seqmill down first", server.url, wanted)
        with environment(_speaking_to(settings, server.url)):
            from flows import registration

            registration.register(root)
            crash_gone(folder)
            if not services.running(folder, "worker"):
                registration.forget_workers(worker_prefix(folder))
                registration.crash_orphans()
                _start_worker(folder, server.url, root)
            if before := registration.enter_profile(profiles, server.url):
                (folder / "profile.json").write_text(json.dumps(before))
    return server.url


def take_down(settings: Settings) -> list[str]:
    """End the worker with its runs, then the server; the names of what ran."""
    folder, profiles = prefect_folder(settings), profiles_path()
    if not folder.is_dir():
        return []
    with _alone(folder):
        server = services.running(folder, "server")
        url = server.url if server else services.noted_url(folder, "server")
        with environment(_speaking_to(settings, url)):
            from flows import registration

            if server and services.running(folder, "worker"):
                with suppress(httpx.HTTPError):  # a server that does not answer is ended all the same
                    registration.cancel_runs(CANCEL_SECONDS)
            ended = [service for name in ("worker", "server") if (service := services.stop(folder, name, DOWN_SECONDS))]
            registration.leave_profile(profiles, _profile_before(folder), url)
        (folder / "profile.json").unlink(missing_ok=True)
    return [service.name for service in ended]


def project_root() -> Path:
    """The folder that deployments run in: the clone that this code lies in. Raises SettingsError where it is none."""
    root = Path(flows.__file__).parents[1]
    if not (root / "deployments" / "prefect.yaml").is_file():
        raise SettingsError(f"{root}: no deployments/prefect.yaml; deploy from a clone, installed with pip install --editable")
    return root


def _start_server(settings: Settings, folder: Path, host: str, port: int) -> services.Service:
    if host not in (LOOPBACK, "localhost") and not inherited_environment().get("PREFECT_SERVER_API_AUTH_STRING"):
        raise SettingsError(
            f"--host {host}: others could reach the server and run code here; "
            "set PREFECT_SERVER_API_AUTH_STRING first (docs/operations.md, Security)"
        )
    _check_port(host, port)
    url = address(host, port)
    database = check_database(inherited_environment())
    with environment(_speaking_to(settings, url) | SERVER_ENVIRONMENT):
        log.info("prefect server at %s on %s", url, database)
        command = server_command(host, port)
        server = services.start(folder, "server", command, inherited_environment(), url)
        try:
            wait_until_healthy(lambda: server.is_running, url, folder / "server.log")
        except BaseException:
            services.stop(folder, "server", DOWN_SECONDS)
            raise
    return server


def address(host: str, port: int) -> str:
    """The API's address, as this machine reaches a server that listens on ``host``."""
    reached = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104 (asked for by the user, who then has to set a password)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}/api"


def _speaking_to(settings: Settings, url: str | None) -> dict[str, str]:
    """Prefect's environment with this very server: the user's own PREFECT_API_URL may name another."""
    return prefect_environment(settings, url, verbose=False) | ({"PREFECT_API_URL": url} if url else {})


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was served a moment ago is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"port {port} of {host}: {error.strerror}; end what listens there, or name another with --port"
            ) from None


def _start_worker(folder: Path, url: str, root: Path) -> None:
    from flows import registration

    name = f"{worker_prefix(folder)}-{secrets.token_hex(4)}"
    pool = ["--pool", registration.POOL, "--type", "process"]
    command = [sys.executable, "-m", "prefect", "worker", "start", *pool, "--name", name]
    worker = services.start(folder, "worker", command, worker_environment(root), url)
    deadline = time.monotonic() + WORKER_SECONDS
    while name not in registration.workers_online():
        if not worker.is_running or time.monotonic() > deadline:
            services.stop(folder, "worker", DOWN_SECONDS)
            raise WorkerError(f"prefect worker: the server has not heard of it; read {folder / 'worker.log'}")
        time.sleep(0.5)


def worker_prefix(folder: Path) -> str:
    """What the names of this store's workers begin with, one after the other: this machine, and the store's folder."""
    return f"{platform.node()}-{digest_bytes(os.fsencode(folder))[:8]}"


def worker_environment(root: Path) -> dict[str, str]:
    """The environment of a worker, and so of every run that it starts; ``root`` is the folder that they run in."""
    return {**without_database(inherited_environment()), **WORKER_ENVIRONMENT, "PWD": str(root)}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One `up` or `down` of a store at a time."""
    with (folder / "up.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def profiles_path() -> Path:
    """The file in which the user's own `prefect` command finds its profiles."""
    named = inherited_environment()
    home = Path(named.get("PREFECT_HOME", "~/.prefect"))
    return Path(named.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()


def _profile_before(folder: Path) -> str | None:
    try:
        before = json.loads((folder / "profile.json").read_text())
    except (OSError, ValueError):
        return None
    return before if isinstance(before, str) else None
