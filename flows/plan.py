"""What a run would do, without doing it: every stage found, to be built, or not yet to be known, and why."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flows.dag import Node
from tasks.errors import SeqmillError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Digest, digest_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What would happen to one node. ``key`` is None where an input is not built yet."""

    node: Node
    key: Digest | None
    status: str  # "found" | "build" | "unknown"
    reason: str
    artifact: Artifact | None

    def row(self) -> dict[str, Any]:
        """The row of ``seqmill plan --json``."""
        return {
            "name": self.node.name,
            "kind": self.node.kind,
            "key": self.key,
            "status": self.status,
            "reason": self.reason,
        }


def plan(nodes: Iterable[Node], store: ArtifactStore, machine: Machine) -> list[Step]:
    """One step a node, in order. Builds nothing and takes no lock; may ask a server what its file is now."""
    steps: dict[str, Step] = {}
    for node in nodes:
        steps[node.name] = _step(node, {name: steps[source] for name, source in node.inputs.items()}, store, machine)
    return list(steps.values())


def _step(node: Node, inputs: Mapping[str, Step], store: ArtifactStore, machine: Machine) -> Step:
    contents = {name: step.artifact.content for name, step in inputs.items() if step.artifact}
    if waiting := [name for name in inputs if name not in contents]:
        return Step(node, None, "unknown", f"{_listed(waiting)} not built yet", None)
    try:
        source = node.stage.source(node.spec, store, machine)
    except SeqmillError as error:
        return Step(node, None, "unknown", str(error), None)
    identity = node.stage.identity(node.spec, contents, source)
    key = digest_json(identity)
    artifact = store.load(node.kind, key)
    if artifact is None:
        return Step(node, key, "build", _why(identity, store), None)
    if damage := store.damage(artifact):
        return Step(node, key, "build", f"damaged: {damage}", None)
    return Step(node, key, "found", "whole in the store", artifact)


def _why(identity: dict[str, Any], store: ArtifactStore) -> str:
    """The differences from the nearest artifact of the kind; the newest of those equally near."""
    kind = identity["kind"]
    candidates = [list(differences(artifact.manifest.identity, identity)) for artifact in store.artifacts(kind)]
    if not candidates:
        return f"no {kind} in the store"
    if kind == "archive":  # a recipe has several, which have nothing to do with each other
        return f"the store has no bytes of {_short(identity['inputs']['source'])}"
    nearest = min(reversed(candidates), key=len)
    return "; ".join(nearest) or "its manifest cannot be read"


def differences(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The fields in which two identities differ, one line each: ``spec.block_size 2048 -> 1024``."""
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        path = f"{where}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{path}.")
        elif old != new:
            yield f"{path} {_short(old)} -> {_short(new)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:12]}…"
