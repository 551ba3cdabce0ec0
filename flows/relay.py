"""The legs of one run over several pools: started, or taken over where an earlier try left them at work; waited for; ended."""

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from flows.dag import Node
from flows.legs import Leg, legs_of, spelled
from flows.parent import cancel
from flows.recipe import Recipe
from flows.stages import REFERENCES
from tasks.errors import SettingsError, WorkerError

log = logging.getLogger(__name__)

POLL_SECONDS = 3.0
WAITING_SECONDS = 60.0  # for a worker to take a leg, before it is told that none has


def relay(recipe: Recipe, nodes: Sequence[Node], pools: Mapping[str, str]) -> list[dict[str, Any]]:
    """Run every leg on its pool, in order; a row a stage. Whatever ends this run ends its legs."""
    rows: dict[str, dict[str, Any]] = {}
    rounds = legs_of(nodes, pools)
    with get_client(sync_client=True) as client:
        left = left_at_work(client, _own_run())
        runner = Legs(client, recipe, left)
        try:
            runner.end_strangers(leg for legs in rounds for leg in legs)
            for legs in rounds:
                for leg in legs:
                    runner.begin(leg, {name: f"{rows[name]['kind']}/{rows[name]['key']}" for name in leg.takes})
                rows |= runner.wait()
        finally:
            cancel(client, runner.unfinished())
    return [rows[node.name] for node in nodes]


def left_at_work(client: SyncPrefectClient, run: UUID | None) -> list[FlowRun]:
    """The legs that an earlier try of this run has started, and that have not ended."""
    if run is None:
        return []
    asked = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [run]}})
    return [child for child in client.read_flow_runs(flow_run_filter=asked) if not _has_ended(child)]


def _own_run() -> UUID | None:
    context = FlowRunContext.get()
    return context.flow_run.id if context and context.flow_run else None


class Legs:
    """The legs of one run; ``left`` are those that an earlier try of it left at work."""

    def __init__(self, client: SyncPrefectClient, recipe: Recipe, left: Sequence[FlowRun]) -> None:
        self.client, self.name, self.recipe = client, recipe.name, spelled(recipe)
        self.left, self.adopted = list(left), set[str]()
        self.began, self.is_told = 0.0, False
        self.runs: dict[str, tuple[Leg, Mapping[str, str]]] = {}  # under way, with what each was given

    def end_strangers(self, legs: Iterable[Leg]) -> None:
        """Cancel what an earlier try left at work and this one has no leg for: the recipe's file was changed meanwhile."""
        wanted = [(leg.pool, leg.names) for leg in legs]
        for run in list(self.left):
            told = run.parameters or {}
            if (run.work_pool_name, told.get("stages")) not in wanted or told.get("recipe") != self.recipe:
                self._forget(run)

    def begin(self, leg: Leg, given: Mapping[str, str]) -> None:
        """Start a leg, or take over the run that an earlier try has started for it."""
        parameters = {"recipe": self.recipe, "stages": leg.names, "given": dict(given)}
        for run in [run for run in self.left if run.work_pool_name == leg.pool and run.parameters["stages"] == leg.names]:
            if run.parameters == parameters and not self._is_taken(leg):
                self.left.remove(run)
                self.adopted.add(str(run.id))
                self.runs[str(run.id)] = leg, given
                log.info("%s: %s is at work on the pool %s, since an earlier try of this run", self.name, leg.title, leg.pool)
            else:
                self._forget(run)  # what it was given has changed
        if not self._is_taken(leg):
            self.runs[self._start(leg, parameters)] = leg, given

    def _is_taken(self, leg: Leg) -> bool:
        return any(leg is other for other, _ in self.runs.values())

    def _forget(self, run: FlowRun) -> None:
        self.left.remove(run)
        cancel(self.client, [run.id])

    def _start(self, leg: Leg, parameters: dict[str, Any]) -> str:
        """Start a leg on its pool; the run's id. Raises SettingsError where nothing is deployed to that pool."""
        deployment = f"stages-flow/{leg.pool}"
        try:
            run = run_deployment(deployment, parameters=parameters, flow_run_name=f"{self.name} {leg.title}", timeout=0)
        except ObjectNotFound:
            raise SettingsError(
                f"pools: no deployment {deployment}; deploy it (`seqmill deploy --pools`), or name a pool that has one"
            ) from None
        log.info("%s: %s on the pool %s", self.name, leg.title, leg.pool)
        return str(run.id)

    def wait(self) -> dict[str, dict[str, Any]]:
        """Wait until all legs have ended; the rows of their stages. Raises WorkerError for the first that did not complete.

        A server that is away is waited for: the legs are at work all the same.
        """
        self.began, self.is_told = time.monotonic(), False
        rows: dict[str, dict[str, Any]] = {}
        failed = list[str]()
        while self.runs:
            for run_id in list(self.runs):
                try:
                    rows |= self._look(run_id)
                except httpx.HTTPError as error:  # as the client says that has tried for a minute
                    if not _is_away(error):
                        raise
                    log.warning("%s: the Prefect server does not answer (%s); waits for it", self.name, type(error).__name__)
                    break
                except WorkerError as error:
                    self.runs.pop(run_id, None)
                    failed.append(str(error))
            if self.runs:
                time.sleep(POLL_SECONDS)
        if failed:
            raise WorkerError(failed[0])
        return rows

    def _look(self, run_id: str) -> dict[str, dict[str, Any]]:
        """The rows of a leg that has completed; none of one at work. Raises WorkerError for one that will not complete.

        One that was taken over and did not complete is started anew: what ended it may have been the end of the try before.
        """
        leg, given = self.runs[run_id]
        try:
            run = self.client.read_flow_run(UUID(run_id))
        except ObjectNotFound:
            raise WorkerError(f"{leg.title} on the pool {leg.pool}: its run was deleted; run again") from None
        rows: dict[str, dict[str, Any]] = {}
        if not _has_ended(run):
            self._tell_that_none_takes(run, leg)
        elif run.state and run.state.is_completed():
            rows = references(self.client, run_id)
            del self.runs[run_id]
        elif run_id in self.adopted:
            del self.runs[run_id]
            self._begin_anew(run_id, leg, given)
        else:
            raise WorkerError(_told(run, leg))
        return rows

    def _begin_anew(self, run_id: str, leg: Leg, given: Mapping[str, str]) -> None:
        try:
            self.begin(leg, given)
        except httpx.HTTPError:
            self.runs[run_id] = leg, given  # to be found ended, and begun, once the server is there
            raise

    def _tell_that_none_takes(self, run: FlowRun, leg: Leg) -> None:
        if not self.is_told and run.state and run.state.is_scheduled() and time.monotonic() - self.began > WAITING_SECONDS:
            self.is_told = True
            log.warning("%s: waits for a worker of the pool %s; `seqmill worker` starts one", leg.title, leg.pool)

    def unfinished(self) -> list[str]:
        """What is at work still."""
        return [*self.runs, *(str(run.id) for run in self.left)]


def _is_away(error: httpx.HTTPError) -> bool:
    """Whether the server, or its database, did not answer; not where it refused."""
    return isinstance(error, httpx.TransportError) or (
        isinstance(error, httpx.HTTPStatusError) and error.response.status_code >= 500
    )


def _has_ended(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def _told(run: FlowRun, leg: Leg) -> str:
    assert run.state
    said = " ".join((run.state.message or "").split())[:600]
    return f"{leg.title} on the pool {leg.pool}: {run.state.name.lower()}: {said or 'without a word'}; see the run {run.name!r}"


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
