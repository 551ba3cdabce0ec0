"""What is needed: artifacts, the shards that they list, and what they were made from, by their manifests below a root.

Reads   <root>/<kind>/<key>/manifest.json
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson

from tasks.store.artifact import MANIFEST_NAME
from tasks.store.records import Record, Records


class Reach:
    """The artifacts and shards that were reached so far. unread: references that led on to nothing that can be read."""

    def __init__(self, root: Path, records: Records | None = None) -> None:
        self.root, self.records = root, records or Records(root)
        self.unread: set[str] = set()
        self._keys: dict[str, set[bytes]] = defaultdict(set)

    def __len__(self) -> int:
        return sum(len(keys) for keys in self._keys.values())

    def has(self, kind: str, key: str) -> bool:
        return _bytes(key) in self._keys[kind]

    def add(self, kind: str, key: str) -> None:
        """Mark one, and nothing that it stands on."""
        self._keys[kind].add(_bytes(key))

    def follow(self, refs: Iterable[str]) -> None:
        """Mark artifacts, the shards that they list, and what they were made from; ``unread`` where there is no manifest."""
        waiting = sorted(refs)
        while waiting:
            kind, _, key = waiting.pop().partition("/")
            if not key or self.has(kind, key):
                continue
            path = self.root / kind / key / MANIFEST_NAME
            record = self.records.by_ref(f"{kind}/{key}")
            if not path.exists() or record is None:
                self.unread.add(f"{kind}/{key}")
                continue
            self.add(kind, key)
            for shard_kind, shard_key in _shards(path):
                self.add(shard_kind, shard_key)
            waiting += self._inputs(record)

    def _inputs(self, record: Record) -> Iterator[str]:
        """What an artifact was made from, but for what is not there."""
        for name in record.inputs:
            if given := self.records.input_of(record, name):
                yield given.ref
            else:
                self.unread.add(record.produced_by.get("inputs", {}).get(name, ""))


def _shards(path: Path) -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for entry in orjson.loads(path.read_bytes())["shards"]:
            yield entry["kind"], entry["key"]


def _bytes(key: str) -> bytes:
    """Half the memory of the key's own string; a million of them are held."""
    try:
        return bytes.fromhex(key)
    except ValueError:
        return key.encode()
