"""Are the shards that an artifact lists in the store, by their manifests and sizes? For lists of 100,000 and more.

Reads   <root>/<kind>-shard/<key>/manifest.json, and the sizes of the files that it names
"""

import contextlib
import os
import stat
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from tasks.store.artifact import MANIFEST_NAME, ShardEntry
from tasks.store.digest import digest_bytes, digest_json

# So many shards tell how long one takes; from so many seconds on it is the disk that is waited for, and threads wait together.
PROBED, SLOW_SECONDS, NUM_THREADS, CHUNK = 200, 100e-6, 8, 500


def damaged_shard(root: Path, entries: Sequence[ShardEntry]) -> str | None:
    """What is wrong with the first shard that is not whole, in one line.

    Plain strings and orjson, no models: 15 microseconds a shard where the manifests are in memory
    (benchmarks/simulate_scale.py).
    """
    start, begin = os.fspath(root), time.perf_counter()
    problem = _first_problem(start, entries[:PROBED])
    if problem or len(entries) <= PROBED:
        return problem
    rest = entries[PROBED:]
    if time.perf_counter() - begin < PROBED * SLOW_SECONDS:
        return _first_problem(start, rest)
    chunks = [rest[i : i + CHUNK] for i in range(0, len(rest), CHUNK)]
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        return next((found for found in pool.map(partial(_first_problem, start), chunks) if found), None)
    finally:
        pool.shutdown(cancel_futures=True)


def _first_problem(start: str, entries: Iterable[ShardEntry]) -> str | None:
    for entry in entries:
        if problem := _problem(f"{start}/{entry.kind}/{entry.key}", entry):
            return f"shard {entry.name} ({entry.kind}/{entry.key[:12]}){problem}"
    return None


def _problem(folder: str, entry: ShardEntry) -> str | None:
    manifest = _read(f"{folder}/{MANIFEST_NAME}")
    if manifest is None:
        return " is missing"
    try:
        if manifest["content"] != entry.content:
            return " is another"
        if manifest["key"] != entry.key or not is_key_of(manifest["identity"], entry.key):
            return ": the manifest's key is not the digest of its identity"
        return _wrong_size(folder, manifest["files"])
    except (KeyError, TypeError):
        return " is missing"  # a manifest that cannot be used counts as none


def _read(path: str) -> dict[str, Any] | None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            data = os.read(handle, os.fstat(handle).st_size)
        finally:
            os.close(handle)
        manifest = orjson.loads(data)
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _wrong_size(folder: str, files: list[dict[str, Any]]) -> str | None:
    for entry in files:
        try:
            found = os.stat(f"{folder}/{entry['name']}")
        except OSError:
            return f": {entry['name']} is missing, its manifest says {entry['num_bytes']}"
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry["num_bytes"]:
            return f": {entry['name']} is {found.st_size} bytes, its manifest says {entry['num_bytes']}"
    return None


def is_key_of(identity: Any, key: str) -> bool:
    """Whether ``key`` is the digest of ``identity``: first by orjson, which spells all but some floats as canonical JSON does."""
    with contextlib.suppress(TypeError):  # an integer of more than 64 bits
        if digest_bytes(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)) == key:
            return True
    try:
        return digest_json(identity) == key
    except TypeError:
        return False
