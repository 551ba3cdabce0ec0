"""Several work pools on one server: their deployments, and a worker of one of them on this machine.

Reads   deployments/pools.yaml
"""

import os
import sys
from pathlib import Path

import yaml

from flows.server import asked_url
from flows.settings import Settings, environment, export_settings, prefect_environment
from flows.up import project_root, worker_environment


def register_pools(root: Path) -> list[str]:
    """Tell the server the work pools of deployments/pools.yaml, and what is deployed to them; the pools' names."""
    from flows.registration import deploy, make_pool

    path = root / "deployments" / "pools.yaml"
    names = sorted({entry["work_pool"]["name"] for entry in yaml.safe_load(path.read_text())["deployments"]})
    for name in names:
        make_pool(name)
    deploy(path, root)
    return names


def become_worker(settings: Settings, pool: str, limit: int) -> None:
    """Replace this process by a worker of ``pool``, which takes at most ``limit`` runs at a time.

    The server is the one that PREFECT_API_URL names, or the store's own. Raises SettingsError where there is neither.
    """
    url = asked_url(settings)
    root = project_root()
    settings.store_root.mkdir(parents=True, exist_ok=True)
    export_settings(settings)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
    os.chdir(root)
    with environment(prefect_environment(settings, url, verbose=False)):
        os.execve(sys.executable, command, worker_environment(root))  # noqa: S606 (a list, and no shell)
