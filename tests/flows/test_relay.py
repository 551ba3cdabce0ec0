"""A run over several pools that is tried again: legs of the earlier try are taken over, and ended where nobody wants them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound

from flows.dag import nodes_of
from flows.legs import Leg, legs_of, spelled
from flows.parent import NUM_LOOKS, ParentWatch, cancel
from flows.recipe import Recipe, load_recipe
from flows.relay import Legs
from tasks.errors import WorkerError

POOLS = {"corpus": "cpu", "training": "gpu", "report": "cpu"}
GIVEN = {"blocks": f"blocks/{'0' * 64}", "tokenizer": f"tokenizer/{'1' * 64}"}


class Server:
    """A Prefect server that holds these runs, and is told what to do with them."""

    def __init__(self, *runs: FlowRun, parent: UUID | None = None) -> None:
        self.runs, self.parent, self.cancelled = {run.id: run for run in runs}, parent, list[UUID]()

    def read_flow_run(self, run: UUID) -> FlowRun:
        if run not in self.runs:
            raise ObjectNotFound(Exception())
        return self.runs[run]

    def read_task_run(self, task_run: UUID) -> Any:
        return type("TaskRun", (), {"flow_run_id": self.parent})

    def request(self, method: str, path: str, json: Mapping[str, Any]) -> None:
        assert json["state"]["type"] == "CANCELLING"
        self.cancelled.append(UUID(path.split("/")[2]))

    def tell(self, run: FlowRun, state: StateType) -> None:
        self.runs[run.id] = run.model_copy(update={"state": State(type=state)})


def a_run(state: StateType = StateType.RUNNING, **fields: Any) -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), name="a run", state=State(type=state), **fields)


def a_leg_at_work(recipe: Recipe, leg: Leg, given: Mapping[str, str]) -> FlowRun:
    parameters = {"recipe": spelled(recipe), "stages": leg.names, "given": dict(given)}
    return a_run(work_pool_name=leg.pool, parameters=parameters)


class Started(Legs):
    """Legs that are started in a list, for want of a server."""

    def __init__(self, server: Server, recipe: Recipe, left: list[FlowRun]) -> None:
        super().__init__(server, recipe, left)  # type: ignore[arg-type]
        self.started: list[str] = []

    def _start(self, leg: Leg, parameters: dict[str, Any]) -> str:
        self.started.append(leg.title)
        run = a_run(StateType.FAILED)
        self.client.runs[run.id] = run  # type: ignore[attr-defined]
        return str(run.id)


@pytest.fixture
def recipe(minimal: Path) -> Recipe:
    return load_recipe(str(minimal))


@pytest.fixture
def training(recipe: Recipe) -> Leg:
    _, (leg,), _ = legs_of(nodes_of(recipe), POOLS)
    assert leg.names == ["pretrained"]
    return leg


def test_a_leg_that_an_earlier_try_left_at_work_is_taken_over(recipe: Recipe, training: Leg) -> None:
    run = a_leg_at_work(recipe, training, GIVEN)
    legs = Started(server := Server(run), recipe, [run])
    legs.end_strangers([training])
    legs.begin(training, GIVEN)
    assert (list(legs.runs), legs.started, server.cancelled) == ([str(run.id)], [], [])


def test_a_leg_that_was_given_something_else_is_ended_and_started_anew(recipe: Recipe, training: Leg) -> None:
    run = a_leg_at_work(recipe, training, {**GIVEN, "blocks": f"blocks/{'2' * 64}"})
    legs = Started(server := Server(run), recipe, [run])
    legs.end_strangers([training])
    legs.begin(training, GIVEN)
    assert (legs.started, server.cancelled, legs.left) == (["pretrained"], [run.id], [])


def test_a_leg_of_a_recipe_that_was_changed_meanwhile_is_ended_first(recipe: Recipe, training: Leg) -> None:
    run = a_leg_at_work(recipe.model_copy(update={"name": "before"}), training, GIVEN)
    legs = Started(server := Server(run), recipe, [run])
    legs.end_strangers([training])
    assert (server.cancelled, legs.left, legs.unfinished()) == ([run.id], [], [])


def test_a_leg_that_was_taken_over_and_is_cancelled_all_the_same_is_started_anew(recipe: Recipe, training: Leg) -> None:
    run = a_leg_at_work(recipe, training, GIVEN)
    legs = Started(server := Server(run), recipe, [run])
    legs.begin(training, GIVEN)
    server.tell(run, StateType.CANCELLED)
    with pytest.raises(WorkerError, match="pretrained on the pool gpu: failed: without a word"):  # the second, which failed
        legs.wait()
    assert legs.started == ["pretrained"]


def answered(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://server")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


def test_a_server_that_refuses_ends_the_run(recipe: Recipe, training: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_leg_at_work(recipe, training, GIVEN)
    legs = Started(server := Server(run), recipe, [run])
    legs.begin(training, GIVEN)

    def refuse(run: UUID) -> FlowRun:
        raise answered(403)

    monkeypatch.setattr(server, "read_flow_run", refuse)
    with pytest.raises(httpx.HTTPStatusError):
        legs.wait()
    assert legs.unfinished() == [str(run.id)]


def test_a_server_that_is_away_ends_no_leg(recipe: Recipe, training: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_leg_at_work(recipe, training, GIVEN)
    legs = Started(server := Server(run), recipe, [run])
    legs.begin(training, GIVEN)
    waits = list[float]()

    def away(run: UUID) -> FlowRun:
        raise httpx.ConnectError("Connection refused") if len(waits) < 3 else answered(500)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 5:
            server.tell(run, StateType.COMPLETED)
            monkeypatch.setattr(server, "read_flow_run", server.runs.__getitem__)

    monkeypatch.setattr(server, "read_flow_run", away)
    monkeypatch.setattr("flows.relay.time.sleep", sleep)
    monkeypatch.setattr("flows.relay.references", lambda client, run: {"pretrained": {"key": run}})
    assert legs.wait() == {"pretrained": {"key": str(run.id)}}
    assert (len(waits), server.cancelled, legs.unfinished()) == (5, [], [])


def test_a_leg_that_somebody_deleted_ends_the_run_and_the_others_are_cancelled(recipe: Recipe, training: Leg) -> None:
    run, other = a_leg_at_work(recipe, training, GIVEN), a_run()
    legs = Started(server := Server(run, other), recipe, [run])
    legs.begin(training, GIVEN)
    del server.runs[run.id]
    with pytest.raises(WorkerError, match="pretrained on the pool gpu: its run was deleted"):
        legs.wait()
    cancel(server, [run.id, other.id])  # type: ignore[arg-type]
    assert server.cancelled == [other.id]


def looks(watch: ParentWatch, server: Server, run: FlowRun, number: int) -> list[bool]:
    return [watch.is_over(server, run) for _ in range(number)]  # type: ignore[arg-type]


def a_child(parent: FlowRun, **fields: Any) -> tuple[Server, FlowRun]:
    child = a_run(parent_task_run_id=uuid4(), **fields)
    return Server(parent, child, parent=parent.id), child


def test_a_leg_is_over_once_its_parent_was_seen_to_have_ended_for_a_while() -> None:
    server, child = a_child(parent := a_run(), run_count=1)
    watch = ParentWatch()
    assert looks(watch, server, child, 3) == [False] * 3
    server.tell(parent, StateType.CRASHED)
    assert looks(watch, server, child, NUM_LOOKS) == [*[False] * (NUM_LOOKS - 1), True]


def test_a_parent_that_is_tried_again_in_time_keeps_its_leg() -> None:
    server, child = a_child(parent := a_run(StateType.CRASHED), run_count=1)
    watch = ParentWatch()
    looks(watch, server, child, NUM_LOOKS - 1)
    server.tell(parent, StateType.SCHEDULED)
    looks(watch, server, child, 1)
    server.tell(parent, StateType.FAILED)
    assert looks(watch, server, child, NUM_LOOKS) == [*[False] * (NUM_LOOKS - 1), True]


def test_a_parent_that_was_deleted_has_ended() -> None:
    server, child = a_child(parent := a_run(), run_count=1)
    watch = ParentWatch()
    looks(watch, server, child, 1)
    del server.runs[parent.id]
    assert looks(watch, server, child, NUM_LOOKS)[-1]


def test_a_leg_that_somebody_retried_by_hand_is_on_its_own() -> None:
    server, child = a_child(a_run(StateType.FAILED), run_count=2)
    assert not any(looks(ParentWatch(), server, child, 2 * NUM_LOOKS))


def test_a_run_without_a_parent_waits_for_none() -> None:
    assert not any(looks(ParentWatch(), Server(), a_run(), 2 * NUM_LOOKS))
