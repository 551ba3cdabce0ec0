"""Which stages run on which work pool, and what one pool hands to the next: references into the store they share.

A leg is as many stages as one pool can work on without waiting for another: the corpus on a pool of many cores, what is
trained from it on a pool with GPUs.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flows.dag import Node
from flows.recipe import Recipe
from tasks.errors import RecipeError, RefError, SettingsError, StoreError
from tasks.store import Artifact, ArtifactStore, Digest

ROOMS = ("corpus", "training", "report")
REF = re.compile(r"(?P<kind>[a-z][a-z-]*)/(?P<key>[0-9a-f]{64})")


@dataclass(frozen=True)
class Leg:
    """Stages that one pool works on."""

    pool: str
    nodes: tuple[Node, ...]

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]

    @property
    def takes(self) -> list[str]:
        """The names of the nodes that other legs hand it."""
        taken = {name: None for node in self.nodes for name in node.inputs.values() if name not in self.names}
        return list(taken)

    @property
    def title(self) -> str:
        return self.names[0] if len(self.nodes) == 1 else f"{self.names[0]} to {self.names[-1]}"


def legs_of(nodes: Sequence[Node], pools: Mapping[str, str]) -> list[list[Leg]]:
    """The legs of a run: each list's can run at the same time, once those of the lists before have ended.

    pools: the pool of a stage, by its name, its kind, or its room (corpus, training, report). Raises SettingsError.
    """
    places: dict[str, tuple[int, str]] = {}
    for node in nodes:
        pool = pool_of(node, pools)
        before = [places[name] for name in (*node.inputs.values(), *node.after) if name in places]
        places[node.name] = max((round_ + (other != pool) for round_, other in before), default=0), pool
    grouped: dict[tuple[int, str], list[Node]] = {}
    for node in nodes:
        grouped.setdefault(places[node.name], []).append(node)
    last = max((round_ for round_, _ in grouped), default=-1)
    return [[Leg(pool, tuple(members)) for (at, pool), members in grouped.items() if at == round_] for round_ in range(last + 1)]


def pool_of(node: Node, pools: Mapping[str, str]) -> str:
    """The pool that a stage runs on. Raises SettingsError where none is named."""
    room = node.stage.__module__.split(".")[1]
    for name in (node.name, node.kind, room):
        if name in pools:
            return pools[name]
    raise SettingsError(f"pools: no pool for the stage {node.name}; name one for {node.name}, {node.kind} or {room}")


def check_pools(nodes: Iterable[Node], kinds: Iterable[str], pools: Mapping[str, str]) -> None:
    """Raise SettingsError for a name in ``pools`` that neither a stage, nor a kind, nor a room answers to."""
    known = {node.name for node in nodes} | {*kinds, *ROOMS}
    if stranger := next((name for name in pools if name not in known), None):
        raise SettingsError(f"pools: {stranger!r} is no stage; stages are {', '.join(sorted(known))}")


def chosen(nodes: Sequence[Node], names: Iterable[str], given: Iterable[str]) -> tuple[Node, ...]:
    """The named nodes, in order. Raises RecipeError for a stranger, or where one takes what is neither named nor given."""
    names = set(names)
    if stranger := names - {node.name for node in nodes}:
        raise RecipeError(f"stages: {min(stranger)}: the recipe has no such stage; it has {', '.join(n.name for n in nodes)}")
    found = tuple(node for node in nodes if node.name in names)
    for node in found:
        if lacking := set(node.inputs.values()) - names - set(given):
            raise RecipeError(
                f"given: {node.name} takes {min(lacking)}, which is absent; give its reference, or name it in stages"
            )
    return found


def spelled(recipe: Recipe) -> dict[str, Any]:
    """A recipe as another machine takes it, which has no file of it; what it leaves out stays left out."""
    value: dict[str, Any] = json.loads(recipe.model_dump_json(exclude_unset=True))
    return value


def recipe_of(value: Mapping[str, Any]) -> Recipe:
    """The recipe that ``spelled`` spelled. Raises RecipeError where this machine's seqmill does not take it."""
    try:
        return Recipe.model_validate_json(json.dumps(value, allow_nan=False))
    except (ValidationError, ValueError) as error:
        told = " ".join(str(error).split())[:300]
        raise RecipeError(f"recipe: {told}; do both machines run the same release of seqmill?") from None


def taken(store: ArtifactStore, ref: str) -> Artifact:
    """The artifact that another pool hands over. Raises RefError, or StoreError where this machine's store has it not."""
    match = REF.fullmatch(ref)
    if match is None:
        raise RefError(f"given: {ref!r} is no reference; it is spelled <kind>/<64 hexadecimal digits>")
    artifact = store.find(match["kind"], Digest(match["key"]))
    if artifact is None:
        raise StoreError(
            f"{store.address}: {ref} is not there whole; workers of all pools need the same SEQMILL_STORE, "
            "a bucket or a folder that their machines share"
        )
    return artifact
