"""Manifests read for what they say, not checked: what a reason, an estimate and a lineage are made of.

Reads   <root>/<kind>/<key>/manifest.json
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tasks.store.artifact import MANIFEST_NAME, Manifest
from tasks.store.digest import Digest

TAKEN = ("kind", "key", "content", "identity", "created", "stats", "produced_by")


@dataclass(frozen=True)
class Record:
    """A manifest without its lists of files and shards."""

    kind: str
    key: Digest
    content: Digest
    identity: Mapping[str, Any]
    created: str
    stats: Mapping[str, Any]
    produced_by: Mapping[str, Any]
    num_bytes: int
    num_shards: int

    @property
    def ref(self) -> str:
        return f"{self.kind}/{self.key}"

    @property
    def short(self) -> str:
        """The reference as a line of a table has room for it."""
        return f"{self.kind}/{self.key[:12]}"

    @property
    def inputs(self) -> dict[str, Digest]:
        """The contents of the artifacts that it was made from, by input name."""
        return {name: Digest(text) for name, text in self.identity.get("inputs", {}).items() if name != "source"}


def record_of(manifest: Manifest) -> Record:
    """What a manifest that is at hand says."""
    return Record(
        **{name: getattr(manifest, name) for name in TAKEN},
        num_bytes=sum(file.num_bytes for file in manifest.files) + sum(shard.num_bytes for shard in manifest.shards),
        num_shards=len(manifest.shards),
    )


def read_record(path: Path) -> Record | None:
    """What the manifest at ``path`` says; None where it cannot be read."""
    try:
        manifest = orjson.loads(path.read_bytes())
        files, shards = manifest["files"], manifest["shards"]
        return Record(
            **{name: manifest[name] for name in TAKEN},
            num_bytes=sum(entry["num_bytes"] for entry in files) + sum(entry["num_bytes"] for entry in shards),
            num_shards=len(shards),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Records:
    """The records of a store, each kind read once, when it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_kind: dict[str, dict[str, Record]] = {}

    def of_kind(self, kind: str) -> list[Record]:
        """All of one kind, oldest first."""
        return list(self._of_kind(kind).values())

    def by_ref(self, ref: str) -> Record | None:
        """The one of that reference; a shard is read by itself, for there may be a million of them."""
        kind, _, key = ref.partition("/")
        known = None if kind.endswith("-shard") else self._of_kind(kind).get(key)
        return known or read_record(self.root / kind / key / MANIFEST_NAME)  # committed since the kind was read

    def input_of(self, record: Record, name: str) -> Record | None:
        """What a record names as its input, or another of the same content; None where the store has neither."""
        content, ref = record.inputs.get(name), record.produced_by.get("inputs", {}).get(name, "")
        if content is None or not ref:
            return None
        named = self.by_ref(ref)
        if named and named.content == content:
            return named
        kind = ref.partition("/")[0]
        if kind.endswith("-shard"):
            return None
        return next((other for other in self.of_kind(kind) if other.content == content), None)

    def _of_kind(self, kind: str) -> dict[str, Record]:
        if kind not in self._by_kind:
            read = (read_record(path) for path in self.root.glob(f"{kind}/*/{MANIFEST_NAME}")) if kind else ()
            found = sorted((record for record in read if record), key=lambda record: (record.created, record.key))
            self._by_kind[kind] = {record.key: record for record in found}
        return self._by_kind[kind]
