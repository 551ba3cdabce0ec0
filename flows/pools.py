"""pools-flow: the whole DAG, each stage on the work pool that is meant for it; between pools go references alone."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from flows.dag import Node, ending_with, nodes_of
from flows.deployed import under_worker
from flows.legs import Leg, check_pools, legs_of, spelled
from flows.overrides import Overrides, dotted
from flows.recipe import Recipe, load_recipe
from flows.stages import REFERENCES, publish_references
from tasks.errors import SettingsError, WorkerError
from tasks.stages import TASKS

log = logging.getLogger(__name__)

POLL_SECONDS = 3.0
WAITING_SECONDS = 60.0  # for a worker to take a leg, before it is told that none has

POOLS = {"corpus": "cpu", "training": "gpu", "report": "cpu"}


@flow(name="pools-flow", flow_run_name="{recipe} to {until}, on pools")
def pools_flow(
    recipe: str = "demo", overrides: Overrides = None, until: str = "report", pools: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Archive to report, each stage on the work pool that is meant for it.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file on the worker's machine
        overrides: fields of the recipe to change, such as {"blocks": {"block_size": 1024}} or {"blocks.block_size": 1024}
        until: the last stage, by its kind or its name
        pools: the pool of a stage, by room (corpus, training, report), kind or name; corpus and report go to cpu, training to gpu
    """
    for logger in ("flows", "tasks"):
        logging.getLogger(logger).setLevel(logging.INFO)
    with under_worker():
        loaded = load_recipe(recipe, dotted(overrides))
        nodes = nodes_of(loaded)
        places = {**POOLS, **(pools or {})}
        check_pools(nodes, TASKS, places)
        rows = relay(loaded, ending_with(nodes, [until]), places)
        publish_references(loaded.name, rows)
    return rows


def relay(recipe: Recipe, nodes: Sequence[Node], pools: Mapping[str, str]) -> list[dict[str, Any]]:
    """Run every leg on its pool, in order; a row a stage. Whatever ends this run ends its legs."""
    rows: dict[str, dict[str, Any]] = {}
    for legs in legs_of(nodes, pools):
        runs: dict[str, Leg] = {}
        with get_client(sync_client=True) as client:
            try:
                for leg in legs:
                    refs = {name: f"{rows[name]['kind']}/{rows[name]['key']}" for name in leg.takes}
                    runs[start(recipe, leg, refs)] = leg
                wait(client, runs)
            except BaseException:
                cancel(client, runs)
                raise
            for run in runs:
                rows |= references(client, run)
    return [rows[node.name] for node in nodes]


def start(recipe: Recipe, leg: Leg, given: Mapping[str, str]) -> str:
    """Start a leg on its pool; the run's id. Raises SettingsError where nothing is deployed to that pool."""
    name = f"stages-flow/{leg.pool}"
    parameters = {"recipe": spelled(recipe), "stages": leg.names, "given": dict(given)}
    try:
        run = run_deployment(name, parameters=parameters, flow_run_name=f"{recipe.name} {leg.title}", timeout=0)
    except ObjectNotFound:
        raise SettingsError(
            f"pools: no deployment {name}; deploy it (`seqmill deploy --pools`), or name a pool that has one"
        ) from None
    log.info("%s: %s on the pool %s", recipe.name, leg.title, leg.pool)
    return str(run.id)


def wait(client: SyncPrefectClient, runs: Mapping[str, Leg]) -> None:
    """Wait until all have ended. Raises WorkerError for the first that did not complete, with what it says."""
    began, waiting = time.monotonic(), dict(runs)
    is_told, failed = False, list[str]()
    while waiting:
        for run_id, leg in list(waiting.items()):
            run = client.read_flow_run(run_id)
            if run.state and run.state.is_final():
                del waiting[run_id]
                failed += [] if run.state.is_completed() else [_told(run, leg)]
            elif not is_told and run.state and run.state.is_scheduled() and time.monotonic() - began > WAITING_SECONDS:
                is_told = True
                log.warning("%s: waits for a worker of the pool %s; `seqmill worker` starts one", leg.title, leg.pool)
        if waiting:
            time.sleep(POLL_SECONDS)
    if failed:
        raise WorkerError(failed[0])


def _told(run: FlowRun, leg: Leg) -> str:
    assert run.state
    said = " ".join((run.state.message or "").split())[:600]
    return f"{leg.title} on the pool {leg.pool}: {run.state.name.lower()}: {said or 'without a word'}; see the run {run.name!r}"


def cancel(client: SyncPrefectClient, runs: Mapping[str, Leg]) -> None:
    """Cancel what has not ended yet."""
    for run in runs:
        with suppress(httpx.HTTPError):  # a server that is away; what this run ends for is told all the same
            state = client.read_flow_run(run).state
            if state is None or not state.is_final():
                wanted = {"state": {"type": "CANCELLING", "message": "the run that started it has ended"}}
                client.request("POST", f"/flow_runs/{run}/set_state", json=wanted)


def references(client: SyncPrefectClient, run: str) -> dict[str, dict[str, Any]]:
    """What a leg hands over, by stage. Raises WorkerError where it does not say."""
    asked = {"flow_runs": {"id": {"any_": [run]}}, "artifacts": {"key": {"any_": [REFERENCES]}}, "sort": "CREATED_DESC"}
    found = client.request("POST", "/artifacts/filter", json=asked).json()
    if not found:
        raise WorkerError(f"run {run}: it has completed and hands nothing over; does its worker run this release of seqmill?")
    table = found[0]["data"]
    rows = {}
    for row in json.loads(table) if isinstance(table, str) else table:
        kind, _, key = row["Reference"].partition("/")
        rows[row["Stage"]] = {"name": row["Stage"], "kind": kind, "key": key, "status": row["State"]}
    return rows
