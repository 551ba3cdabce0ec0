"""Walk a recipe's DAG as Prefect tasks: what every flow does between its name and its last stage."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect.futures import as_completed
from prefect.logging.handlers import APILogWorker

from flows.checks import check_ranks
from flows.console import console_progress, console_reports
from flows.dag import Node, ending_with, nodes_of
from flows.deployed import turn_of
from flows.legs import taken
from flows.recipe import Recipe, load_recipe
from flows.settings import load_settings
from flows.walk import side_by_side
from tasks.machine import Machine, quiet
from tasks.stages import TASKS, publish_run
from tasks.store import Artifact, ArtifactStore
from tasks.store.pins import recorded_run
from tasks.training.nodes.crew import leading

SEND_SECONDS = 5


def run_recipe(name_or_path: str, overrides: Mapping[str, Any] | None, ends: Iterable[str]) -> list[dict[str, Any]]:
    """Find or build the stages named in ``ends`` and all that they stand on.

    Returns one row a stage, in order: {"name", "kind", "key", "content", "status": "found" | "built", "seconds"}.
    """
    recipe = load_recipe(name_or_path, overrides)
    ends = list(ends)
    nodes = ending_with(nodes_of(recipe), ends)
    with turn_of(recipe.name, load_settings().store_root):
        return run_nodes(recipe, nodes, ends, overrides)


def run_nodes(
    recipe: Recipe,
    nodes: Sequence[Node],
    ends: list[str],
    overrides: Mapping[str, Any] | None = None,
    given: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Find or build these nodes; a row each, as ``run_recipe`` returns.

    given: by the names of nodes that are not among them, references of what they stand on.
    """
    for logger in ("flows", "tasks"):
        logging.getLogger(logger).setLevel(logging.INFO)
    settings = load_settings()
    store = settings.open_store(console_progress())
    machine = replace(settings.machine(console_progress()), on_metrics=console_reports(), recipe=recipe.name)
    check_ranks(nodes, machine)
    with leading(machine.training.nodes), recorded_run(store.notes, recipe.name, ends, overrides) as record:
        walk = Walk(recipe.name, store, machine, record)
        for name, ref in (given or {}).items():
            walk.artifacts[name] = taken(store, ref)
            record(name, ref)
        if (num_slots := machine.training.num_slots) == 1:
            for node in nodes:
                walk.build(node)
        else:
            # Two bars cannot stand in one terminal.
            walk.machine = replace(machine, progress=quiet, on_metrics=None)
            side_by_side(nodes, num_slots, walk.submit, as_completed, walk.done)
    rows = [walk.rows[node.name] for node in nodes]
    publish_run(recipe.name, rows)
    return rows


class Walk:
    """What is built of a recipe's nodes, and how Prefect is told; ``record`` notes each artifact in the run's record."""

    def __init__(self, recipe: str, store: ArtifactStore, machine: Machine, record: Callable[[str, str], None]) -> None:
        self.recipe, self.store, self.machine, self.record = recipe, store, machine, record
        self.artifacts: dict[str, Artifact] = {}
        self.told: dict[str, Any] = {}  # Prefect's state or future of every node that has begun: what others wait for
        self.started: dict[str, float] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def build(self, node: Node) -> None:
        """Find or build one node, in this thread: the one that hears signals."""
        state = TASKS[node.kind](*self._arguments(node), wait_for=self._awaited(node), return_state=True)
        self.told[node.name] = state
        self.done(node, state.result())

    def submit(self, node: Node) -> Any:
        """Begin to find or build one node, in a thread of Prefect's."""
        future = TASKS[node.kind].submit(*self._arguments(node), wait_for=self._awaited(node))
        self.told[node.name] = future
        return future

    def done(self, node: Node, artifact: Artifact) -> None:
        """Note what came of a node."""
        self.artifacts[node.name] = artifact
        self.record(node.name, artifact.ref)
        self.rows[node.name] = _row(node.name, artifact, time.perf_counter() - self.started[node.name])

    def _arguments(self, node: Node) -> tuple[Any, ...]:
        self.started[node.name] = time.perf_counter()
        inputs = {name: self.artifacts[source] for name, source in node.inputs.items()}
        return f"{self.recipe} {node.name}", self.store, self.machine, node.spec, inputs

    def _awaited(self, node: Node) -> list[Any]:
        return [self.told[source] for source in (*node.inputs.values(), *node.after) if source in self.told]


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
