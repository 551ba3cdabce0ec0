"""What is needed: artifacts, the shards that they list, and what they were made from, by their manifests below a root.

Reads   <root>/<kind>/<key>/manifest.json
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson

from tasks.store.artifact import MANIFEST_NAME
from tasks.store.records import Records


class Reach:
    """The artifacts and shards that were reached so far."""

    def __init__(self, root: Path, records: Records | None = None) -> None:
        self.root, self.records = root, records or Records(root)
        self._keys: dict[str, set[bytes]] = defaultdict(set)

    def __len__(self) -> int:
        return sum(len(keys) for keys in self._keys.values())

    def has(self, kind: str, key: str) -> bool:
        return _bytes(key) in self._keys[kind]

    def add(self, kind: str, key: str) -> None:
        """Mark one, and nothing that it stands on."""
        self._keys[kind].add(_bytes(key))

    def follow(self, refs: Iterable[str]) -> None:
        """Mark artifacts, the shards that they list, and what they were made from; one without a manifest is passed over."""
        waiting = sorted(refs)
        while waiting:
            kind, _, key = waiting.pop().partition("/")
            if not key or self.has(kind, key):
                continue
            path = self.root / kind / key / MANIFEST_NAME
            if not path.exists():
                continue
            self.add(kind, key)
            for shard_kind, shard_key in _shards(path):
                self.add(shard_kind, shard_key)
            if record := self.records.by_ref(f"{kind}/{key}"):
                found = (self.records.input_of(record, name) for name in record.inputs)
                waiting += [given.ref for given in found if given]


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
