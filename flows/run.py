"""Walk a recipe's DAG as Prefect tasks: what every flow does between its name and its last stage."""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from prefect.logging.handlers import APILogWorker

from flows.checks import check_ranks
from flows.console import console_progress
from flows.dag import ending_with, nodes_of
from flows.recipe import load_recipe
from flows.settings import load_settings
from tasks.stages import TASKS
from tasks.store import Artifact, ArtifactStore

SEND_SECONDS = 5


def run_recipe(name_or_path: str, overrides: Mapping[str, Any] | None, ends: Iterable[str]) -> list[dict[str, Any]]:
    """Find or build the stages named in ``ends`` and all that they stand on.

    Returns one row a stage, in order: {"name", "kind", "key", "content", "status": "found" | "built", "seconds"}.
    """
    for logger in ("flows", "tasks"):
        logging.getLogger(logger).setLevel(logging.INFO)
    recipe = load_recipe(name_or_path, overrides)
    settings = load_settings()
    store, machine = ArtifactStore(settings.store_root), settings.machine(console_progress())
    nodes = ending_with(nodes_of(recipe), ends)
    check_ranks(nodes, machine)
    artifacts: dict[str, Artifact] = {}
    states: dict[str, Any] = {}
    rows = []
    for node in nodes:
        start = time.perf_counter()
        state = TASKS[node.kind](
            f"{recipe.name} {node.name}",
            store,
            machine,
            node.spec,
            {name: artifacts[source] for name, source in node.inputs.items()},
            wait_for=[states[source] for source in (*node.inputs.values(), *node.after)],
            return_state=True,
        )
        states[node.name] = state
        artifact = artifacts[node.name] = state.result()
        rows.append(_row(node.name, artifact, time.perf_counter() - start))
    return rows


def send_logs() -> None:
    """Send Prefect the log lines that still wait, before its server is stopped."""
    APILogWorker.drain_all(timeout=SEND_SECONDS)


def _row(name: str, artifact: Artifact, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": artifact.kind,
        "key": artifact.key,
        "content": artifact.content,
        "status": "found" if artifact.found else "built",
        "seconds": round(seconds, 3),
    }
