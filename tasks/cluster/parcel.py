"""What travels between machines: work and its results, in which an artifact is a reference and no file.

An artifact travels as its manifest. Of a shared store travels the URL, and each machine opens it over its own cache; of a
store that is a folder travels the path, which every machine must have mounted. No credential and no file's bytes travel.
"""

import io
import pickle
import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tasks.errors import SettingsError, StoreError
from tasks.store import Artifact, Manifest, SharedStore
from tasks.store.artifact import MANIFEST_NAME
from tasks.store.bucket import Patience
from tasks.store.fetched import SharedArtifact
from tasks.store.origin import environment


class Cache(NamedTuple):
    """Where a machine keeps what it reads of shared stores, and how much; None: any number of bytes."""

    folder: Path
    most_bytes: int | None = None


# Travels by its name, and is asked on the machine that arrives.
CacheHere = Callable[[], Cache]

# What decides the bytes of shards, besides the spec: another release may compress or encode otherwise.
SAME_PACKAGES = ("seqmill", "pyarrow", "tokenizers", "fastokens", "orjson", "rensa")


# Stores of this process by URL, which what comes back is of again.
Stores = dict[str, SharedStore]


def pack(value: Any, cache: CacheHere, *, stores: Stores | None = None, is_result: bool = False) -> bytes:
    """``value`` for another machine.

    stores: the shared ones that are met are entered. is_result: who receives it need not look whether it has the store.
    """
    target = io.BytesIO()
    _Packer(target, cache, {} if stores is None else stores, None if is_result else platform.node()).dump(value)
    return target.getvalue()


def unpack(data: bytes, stores: Stores | None = None) -> Any:
    """What another machine packed, with artifacts of ``stores``; others are opened over this machine's cache."""
    return _Unpacker(io.BytesIO(data), stores or {}).load()


class _Packer(pickle.Pickler):
    def __init__(self, target: io.BytesIO, cache: CacheHere, stores: Stores, sender: str | None) -> None:
        super().__init__(target, protocol=pickle.HIGHEST_PROTOCOL)
        self.cache, self.stores, self.sender = cache, stores, sender

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, SharedStore):
            return None
        bucket = value.bucket
        self.stores[bucket.url] = value
        return bucket.url, bucket.endpoint, value.claim_seconds, bucket.patience, self.cache

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, SharedArtifact):
            return _shared_artifact, (value.store, value.manifest, value.found)
        if type(value) is Artifact:
            return _artifact, (value.root, value.manifest, value.found, self.sender)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, stores: Stores) -> None:
        super().__init__(source)
        self.stores = stores

    def persistent_load(self, told: Any) -> SharedStore:
        url, endpoint, claim_seconds, patience, cache = told
        return self.stores.get(url) or _store_over(url, endpoint, claim_seconds, patience, cache())


@lru_cache(maxsize=8)
def _store_over(url: str, endpoint: str | None, claim_seconds: float, patience: Patience, cache: Cache) -> SharedStore:
    return SharedStore(
        url, cache.folder, endpoint=endpoint, claim_seconds=claim_seconds, patience=patience, cache_bytes=cache.most_bytes
    )


def _shared_artifact(store: SharedStore, manifest: Manifest, found: bool) -> SharedArtifact:
    return SharedArtifact(store.root, manifest, found, store=store)


def _artifact(root: Path, manifest: Manifest, found: bool, sender: str | None) -> Artifact:
    artifact = Artifact(root, manifest, found)
    # Not for results: a network file system may believe for a minute that there is not yet what another machine has made.
    if sender and not (artifact.folder / MANIFEST_NAME).exists():
        raise StoreError(
            f"{platform.node()}: no {artifact.folder}, which {sender} has; the machines of a cluster share the store: "
            "set SEQMILL_STORE to a folder that all of them mount, or to a URL"
        )
    return artifact


def versions() -> dict[str, str]:
    """What must be the same on every machine of a cluster, by name."""
    told = environment()
    return {name: told["packages"].get(name, "absent") for name in SAME_PACKAGES}


def check_versions(theirs: dict[str, str]) -> None:
    """Raises SettingsError where this machine would make other bytes under the same key."""
    for name, here in versions().items():
        if theirs[name] != here:
            raise SettingsError(
                f"{platform.node()}: {name} is {here} here and {theirs[name]} where the run is; "
                "install the same on every machine of the cluster"
            )
