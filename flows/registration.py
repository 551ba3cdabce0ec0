"""What a Prefect server must know before it can run our flows: the work pool, the deployments, the automations.

Reads   deployments/prefect.yaml, deployments/automations.yaml
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, PREFECT_PROFILES_PATH, temporary_settings
from prefect.settings.profiles import Profile, load_profiles, save_profiles

from flows.settings import inherited_environment
from tasks.errors import WorkerError

POOL = "seqmill"
PROFILE = "seqmill"
UNDER_WAY = ["RUNNING", "PENDING", "CANCELLING"]


def register(root: Path) -> None:
    """Tell the server our work pool, deployments and automations; what it knows already is updated.

    Raises WorkerError where the server cannot be reached, or refuses.
    """
    try:
        make_pool()
        deploy(root / "deployments" / "prefect.yaml", root)
        register_automations(root / "deployments" / "automations.yaml")
    except httpx.HTTPError as error:
        told = " ".join(str(error).split())[:300]
        raise WorkerError(f"prefect server {PREFECT_API_URL.value()}: {told or type(error).__name__}; is it there?") from error


def make_pool(name: str = POOL) -> None:
    """Make the process work pool, if the server has none of that name."""
    with get_client(sync_client=True) as client:
        if all(pool["name"] != name for pool in client.request("POST", "/work_pools/filter", json={}).json()):
            client.request("POST", "/work_pools/", json={"name": name, "type": "process"})


def deploy(prefect_file: Path, root: Path) -> None:
    """Deploy all that ``prefect_file`` holds, as Prefect's own command does. Raises WorkerError with its last words."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_file)]
    told = subprocess.run(
        command, cwd=root, env={**inherited_environment(), "PWD": str(root)}, capture_output=True, text=True, check=False
    )
    if told.returncode:
        raise WorkerError(f"prefect deploy: {' '.join((told.stdout + told.stderr).split())[-600:]}; mend {prefect_file}")


def register_automations(path: Path) -> None:
    """Create the automations that a file holds, or update those of the same names."""
    wanted = [AutomationCore.model_validate(entry) for entry in yaml.safe_load(path.read_text())["automations"]]
    with get_client(sync_client=True) as client:
        known = {entry["name"]: entry["id"] for entry in _automations(client)}
        for automation in wanted:
            body = automation.model_dump(mode="json", exclude={"owner_resource"})  # None, and not to be updated
            if automation.name in known:
                client.request("PUT", f"/automations/{known[automation.name]}", json=body)
            else:
                client.request("POST", "/automations/", json=body)


def _automations(client: SyncPrefectClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.request("POST", "/automations/filter", json={}).json()
    return found


def workers_online(pool: str = POOL) -> set[str]:
    """The names of the pool's workers that the server has heard of in the last 90 s."""
    with get_client(sync_client=True) as client:
        return {worker["name"] for worker in _workers(client, pool) if worker["status"] == "ONLINE"}


def forget_workers(prefix: str, pool: str = POOL) -> None:
    """Tell the server that the workers whose names begin so are gone; it would take them for online for 90 s more."""
    with get_client(sync_client=True) as client:
        for worker in _workers(client, pool):
            if worker["name"].startswith(f"{prefix}-"):
                client.request("DELETE", f"/work_pools/{pool}/workers/{quote(worker['name'])}")


def _workers(client: SyncPrefectClient, pool: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.request("POST", f"/work_pools/{pool}/workers/filter", json={}).json()
    return found


def cancel_runs(seconds: float, pool: str = POOL) -> None:
    """Cancel the pool's runs under way and wait until they have ended: a worker that ends kills them without a word."""
    with get_client(sync_client=True) as client:
        cancelled = set(_runs_in(client, pool, ["RUNNING", "PENDING"]))
        for run in cancelled:
            _set_state(client, run, {"type": "CANCELLING", "message": "seqmill down"})
        deadline = time.monotonic() + seconds
        # Its own engine tells of a run as crashed, before the worker says what it was ended for.
        while cancelled & set(_runs_in(client, pool, [*UNDER_WAY, "CRASHED"])) and time.monotonic() < deadline:
            time.sleep(0.5)


def crash_orphans(pool: str = POOL) -> None:
    """Mark runs Crashed that are told to be under way while the pool has no worker, as after a power cut."""
    if workers_online(pool):
        return
    with get_client(sync_client=True) as client:
        for run in _runs_in(client, pool, UNDER_WAY):
            _set_state(client, run, {"type": "CRASHED", "message": "its worker is gone; run it again to go on"})


def _runs_in(client: SyncPrefectClient, pool: str, states: list[str]) -> list[str]:
    body = {"work_pools": {"name": {"any_": [pool]}}, "flow_runs": {"state": {"type": {"any_": states}}}}
    return [run["id"] for run in client.request("POST", "/flow_runs/filter", json=body).json()]


def _set_state(client: SyncPrefectClient, run: str, state: dict[str, str]) -> None:
    client.request("POST", f"/flow_runs/{run}/set_state", json={"state": state, "force": state["type"] == "CRASHED"})


def enter_profile(profiles_path: Path, url: str) -> str | None:
    """Make a profile of the server at ``url`` the active one, in which a deployment's bare name is enough.

    Returns the name of the profile that was active before; None where it was this one.
    """
    with temporary_settings({PREFECT_PROFILES_PATH: profiles_path}):
        profiles = load_profiles()
        before = profiles.active_name
        settings = {"PREFECT_API_URL": url, "PREFECT_PLUGINS_ENABLED": "true"}
        if PROFILE in profiles:
            profiles.remove_profile(PROFILE)
        profiles.add_profile(Profile(name=PROFILE, settings=settings, source=profiles_path))
        profiles.set_active(PROFILE)
        save_profiles(profiles)
    return before if before != PROFILE else None


def leave_profile(profiles_path: Path, before: str | None, url: str | None) -> None:
    """Take the profile out again, and where it is the active one make that from before active.

    A file that then holds nothing goes. The profile stays where it is another server's than that at ``url``: that of a store
    which went up later.
    """
    with temporary_settings({PREFECT_PROFILES_PATH: profiles_path}):
        profiles = load_profiles()
        if PROFILE not in profiles or (url and _url_of(profiles[PROFILE]) != url):
            return
        if profiles.active_name == PROFILE:
            profiles.set_active(before if before in profiles else "ephemeral")
        profiles.remove_profile(PROFILE)
        save_profiles(profiles)
        if profiles.active_name == "ephemeral" and all(
            profile.source != profiles_path for profile in profiles.profiles_by_name.values()
        ):
            profiles_path.unlink()  # as it was: without the file Prefect has its own profiles, and this one is active


def _url_of(profile: Profile) -> str | None:
    return next((str(value) for setting, value in profile.settings.items() if setting.name == "PREFECT_API_URL"), None)
