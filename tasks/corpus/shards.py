"""Shards of an artifact through the process pool: those found in the store are not handed out again."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tasks.errors import StoreError
from tasks.store import Artifact, ArtifactStore, Digest, ShardEntry, Spec, Stage, Work, digest_json


def sum_stats(entries: Sequence[ShardEntry], *names: str) -> dict[str, int]:
    """The shards' counts of these names, each summed, and how many shards there are."""
    return {**{name: sum(entry.stats[name] for entry in entries) for name in names}, "num_shards": len(entries)}


@dataclass(frozen=True)
class ShardWork:
    """One shard to build: the spec and the inputs of its stage. Picklable."""

    spec: Spec
    inputs: dict[str, Artifact]


def load_shard(store: ArtifactStore, entry: ShardEntry) -> Artifact:
    """The artifact of a listed shard. Raises StoreError where the store lost it."""
    return load_shards(store, [entry])[0]


def load_shards(store: ArtifactStore, entries: Sequence[ShardEntry]) -> list[Artifact]:
    """The artifacts of listed shards. Raises StoreError where the store lost one."""
    artifacts = store.listed(entries)
    for i, entry in enumerate(entries):
        found = artifacts[i] = artifacts[i] or store.rescue(entry.kind, entry.key)
        if found is None or found.content != entry.content:
            store.lose_shard(entry.kind, entry.key)
            raise StoreError(
                f"{store.address}: shard {entry.name} ({entry.kind}/{entry.key[:12]}) is missing; run again to rebuild it"
            )
    return [artifact for artifact in artifacts if artifact]


def build_shards(
    work: Work,
    shard_stage: Stage[Any],
    build: Callable[[ShardWork], Artifact],
    items: Sequence[ShardWork],
    label: str,
    *,
    ready: AbstractContextManager[None] | None = None,
) -> list[Artifact]:
    """The artifact of every item, in order. ``build`` calls ``shard_stage`` on an item, in a worker of the pool.

    ready: what the builds need in this process, entered only where there is something to build.
    """
    found = work.store.find_all(shard_stage.kind, [_key(shard_stage, item) for item in items])
    missing = [item for item, artifact in zip(items, found, strict=True) if artifact is None]
    if not missing:
        return [artifact for artifact in found if artifact]
    with ready or nullcontext():
        built = iter(work.machine.map_shards(build, missing, label))
    return [artifact or next(built) for artifact in found]


def _key(shard_stage: Stage[Any], item: ShardWork) -> Digest:
    contents = {name: artifact.content for name, artifact in item.inputs.items()}
    return digest_json(shard_stage.identity(item.spec, contents))
