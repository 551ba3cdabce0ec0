"""watch-flow: says when the bytes that a recipe starts from have changed; an automation runs the recipe then."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.events import Event
from prefect.states import Completed

from flows.changes import Change, last_seen, look, memory, remember
from flows.dag import nodes_of
from flows.overrides import Overrides, dotted
from flows.recipe import load_recipe, recipe_path
from flows.settings import load_settings

log = logging.getLogger(__name__)

CHANGED = "corpus.changed"


@flow(name="watch-flow", flow_run_name="{recipe}")
def watch_flow(recipe: str = "demo", overrides: Overrides = None) -> State[Any]:
    """Look at a recipe's sources, and emit the event corpus.changed where the bytes of one are not those last seen.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file on the worker's machine
        overrides: fields of the recipe to change, such as {"archive": {"url": "..."}}; the run that follows gets them too
    """
    for logger in ("flows", "tasks"):
        logging.getLogger(logger).setLevel(logging.INFO)
    loaded = load_recipe(recipe, changed_fields := dotted(overrides))
    settings = load_settings()
    store = settings.open_store()
    with memory(store.root, loaded.name, recipe_path(recipe), changed_fields) as path:
        found = look(nodes_of(loaded), last_seen(path), store, settings.machine())
        if found.changes:
            emit(recipe, loaded.name, changed_fields, found.changes)
        # Only now: where the event did not reach the server, the next look finds the same changes.
        remember(path, found.seen)
    if found.errors:
        raise found.errors[0]
    names = ", ".join(change.name for change in found.changes)
    message = f"changed: {names}" if names else f"nothing changed in {len(found.seen)} sources"
    log.info("%s: %s", loaded.name, message)
    return Completed(message=message, data=[asdict(change) for change in found.changes])


def emit(recipe: str, name: str, overrides: dict[str, Any], changes: tuple[Change, ...]) -> None:
    """Send the event to the server and wait until it has it."""
    event = Event(
        event=CHANGED,
        resource={"prefect.resource.id": f"seqmill.recipe.{name}", "prefect.resource.name": name},
        payload={"recipe": recipe, "overrides": overrides, "changes": [asdict(change) for change in changes]},
    )
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event.model_dump(mode="json")])
    for change in changes:
        log.info("%s: %s -> %s", change.name, change.old, change.new)


def tell(changes: Iterable[Mapping[str, Any]] | None) -> None:
    """Say in a run's log which sources' new bytes it was started for."""
    for change in changes or ():
        told = (change.get(name) for name in ("name", "old", "new"))
        get_run_logger().info("started because %s changed: %s -> %s", *told)
