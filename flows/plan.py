"""What a run would do, without doing it: every stage found, to be built, or not yet to be known, why, and what it will take."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.dag import Node
from flows.estimate import Estimate, Given, estimate, num_tokens, published
from tasks.corpus.archive import ArchiveSpec
from tasks.corpus.fetch import asking_once
from tasks.corpus.sources import resolve
from tasks.errors import SeqmillError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Digest, Spec, digest_json
from tasks.store.reason import absent, listed, name_of, nearest_to, of_kind, own_changes, reason_for
from tasks.store.reason import differences as differences_of
from tasks.store.records import Record, Records, record_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What would happen to one node. ``key`` is None where an input is not built yet.

    status: "found"; "build"; "unknown" where an input is not built, and may come out as it was. causes: the reason as what
    is made from the artifact tells it. nearest: the artifact that ``reason`` and ``estimate`` are told against.
    published_bytes: of an archive that is to be had, where that is known.
    """

    node: Node
    key: Digest | None
    status: str
    reason: str
    artifact: Artifact | None
    causes: tuple[str, ...] = ()
    nearest: Record | None = None
    estimate: Estimate | None = None
    published_bytes: int | None = None

    def row(self) -> dict[str, Any]:
        """The row of ``seqmill plan --json``."""
        return {
            "name": self.node.name,
            "kind": self.node.kind,
            "key": self.key,
            "status": self.status,
            "reason": self.reason,
            "nearest": self.nearest.ref if self.nearest else None,
            "estimate": _row_of(self.estimate),
        }

    def given(self) -> Given:
        """What is known of the artifact by those that are made from it."""
        stats = self.artifact.stats if self.artifact else {}
        num_bytes = self.artifact.num_bytes if self.artifact else self.estimate.num_bytes if self.estimate else None
        train = stats.get("train")
        num_rows = train.get("num_blocks") if isinstance(train, dict) else stats.get("num_rows")
        return Given(num_bytes, stats.get("block_size") or getattr(self.node.spec, "block_size", None), num_rows)


def plan(nodes: Iterable[Node], store: ArtifactStore, machine: Machine) -> list[Step]:
    """One step a node, in order. Builds nothing and takes no lock; may ask a server what its file is now, and waits for none."""
    steps: dict[str, Step] = {}
    store.learn()
    records = Records(store.root)
    with asking_once():
        for node in nodes:
            inputs = {name: steps[source] for name, source in node.inputs.items()}
            step = _step(node, inputs, store, machine, records)
            if step.status != "found":
                given = {name: other.given() for name, other in inputs.items()}
                num_bytes = published(node.spec, machine)
                step = replace(step, estimate=estimate(node, step.nearest, given, records, num_bytes), published_bytes=num_bytes)
            steps[node.name] = step
    return list(steps.values())


def _step(node: Node, inputs: Mapping[str, Step], store: ArtifactStore, machine: Machine, records: Records) -> Step:
    try:
        source = node.stage.source(node.spec, store, machine)
    except SeqmillError as error:
        return Step(node, None, "unknown", str(error), None, (f"{node.name}: {error}",))
    found = {name: step.artifact for name, step in inputs.items() if step.artifact}
    identity = node.stage.identity(node.spec, {name: artifact.content for name, artifact in found.items()}, source)
    if len(found) < len(inputs):
        return _waiting(node, inputs, identity, machine, records)
    key = digest_json(identity)
    artifact = store.load(node.kind, key)
    if artifact and (damage := store.damage(artifact)):
        reason = f"damaged: {damage}"
        return Step(node, key, "build", reason, None, (f"{node.name} is {reason}",), record_of(artifact.manifest))
    if artifact:
        return Step(node, key, "found", "whole in the store", artifact)
    made_from = {name: record_of(artifact.manifest) for name, artifact in found.items()}
    if missing := _missing(node.spec, machine, records):
        return Step(node, key, "unknown", missing, None, (f"{node.name}: {missing}",))
    url = getattr(node.spec, "url", None)
    why = reason_for(identity, made_from, records, recipe=machine.recipe, url=url)
    return Step(node, key, "build", why.text, None, why.causes, why.nearest)


def _missing(spec: Spec, machine: Machine, records: Records) -> str | None:
    """Of an archive whose file is not here, and whose bytes the store has under no other name: what to do."""
    where = resolve(spec.url, machine.endpoints) if isinstance(spec, ArchiveSpec) else None
    if not isinstance(spec, ArchiveSpec) or not isinstance(where, Path) or where.is_file():
        return None
    stated = {name: value for name in ("sha256", "md5") if (value := getattr(spec, name))}
    if any(all(record.stats.get(name) == value for name, value in stated.items()) for record in records.of_kind("archive")):
        return None
    return f"{where}: no such file; check the path {spec.url}, which is relative to the current directory"


def _waiting(node: Node, inputs: Mapping[str, Step], identity: dict[str, Any], machine: Machine, records: Records) -> Step:
    """The step of a node of which an input is not built: to be built for certain, where no artifact has all that is known."""
    waiting = {name: step for name, step in inputs.items() if not step.artifact}
    unknown, kinds = frozenset(waiting), {name: step.node.kind for name, step in inputs.items()}
    nearest = nearest_to(identity, kinds, records, recipe=machine.recipe, unknown=unknown)
    if nearest is None:
        reason = absent(identity, records)
        return Step(node, None, "build", reason, None, (reason,))
    may_be_found = any(
        all(name_of(line) in unknown for line in differences_of(record.identity, identity))
        for record in records.of_kind(node.kind)
    )
    known = [line for line in differences_of(nearest.identity, identity) if name_of(line) not in unknown]
    upstream = list(dict.fromkeys(cause for step in waiting.values() for cause in step.causes))
    follows = f"{_verdicts(waiting)}: {listed(upstream)}"
    causes = [*(of_kind(node.kind, line) for line in own_changes(nearest, identity)), *upstream]
    status = "unknown" if may_be_found else "build"
    return Step(node, None, status, "; ".join([*known, follows]), None, tuple(dict.fromkeys(causes)), nearest)


def _verdicts(waiting: Mapping[str, Step]) -> str:
    """Which inputs will be built for certain, and which may be found."""
    certain = [name for name, step in waiting.items() if step.status == "build"]
    others = [name for name in waiting if name not in certain]
    told = [f"{listed(names)} {verb} be built" for names, verb in ((certain, "will"), (others, "may")) if names]
    return ", ".join(told)


def beside_estimates(rows: Iterable[dict[str, Any]], steps: Iterable[Step], store: ArtifactStore) -> list[dict[str, Any]]:
    """The rows of a run, each with what its artifact took and what it had been estimated at."""
    estimates = {step.node.name: step.estimate for step in steps}
    return [{**row, **_actual(row, store), "estimate": _row_of(estimates.get(row["name"]))} for row in rows]


def _actual(row: Mapping[str, Any], store: ArtifactStore) -> dict[str, Any]:
    artifact = store.load(row["kind"], row["key"])
    record = record_of(artifact.manifest) if artifact else None
    told = record.produced_by if record and row["status"] == "built" else {}
    return {
        "num_bytes": record.num_bytes if record else 0,
        "num_tokens": num_tokens(record) if record else None,
        "peak_rss_bytes": max(told.get("peak_rss_bytes") or 0, told.get("peak_child_rss_bytes") or 0) or None,
    }


def _row_of(estimated: Estimate | None) -> dict[str, Any] | None:
    return estimated.row() if estimated else None
