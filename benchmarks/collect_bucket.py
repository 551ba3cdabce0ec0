"""What a collection of a bucket takes: seconds, shards a second and requests a shard; to look, to condemn and to delete.

    python -m benchmarks.collect_bucket [--shards 10000] [--counted 1000] [--url s3://...] [--endpoint http://...]

Without --url it starts SeaweedFS on loopback. One artifact that is pinned lists half of the shards, each of one small file;
nothing needs the other half. Requests are counted by the tests' proxy in a pass of its own, of fewer shards, that is not timed.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import measure
from benchmarks.remote_store import bucket
from tasks.store import Artifact, FileEntry, Manifest, SharedStore, digest_bytes, digest_json, shard_entry
from tasks.store.artifact import content_of
from tasks.store.collect import collect_bucket
from tasks.store.layout import file_name, manifest_name, placed
from tasks.store.pins import pin
from tasks.store.store import spelled
from tests.store.s3 import Proxy

NUM_WRITERS = 16
LEAST_SECONDS = 2.0


def put(store: SharedStore, number: int) -> Artifact:
    """A shard of one file, as a build leaves it."""
    data = b"%d" % number
    identity = {"kind": "blob-shard", "revision": 1, "spec": {"number": number}, "inputs": {}}
    files = (FileEntry(name="blob", num_bytes=len(data), digest=digest_bytes(data)),)
    manifest = _manifest(identity, files=files)
    store.bucket.put(file_name(manifest, files[0]), data)
    store.bucket.put(manifest_name(manifest.kind, manifest.key), spelled(manifest))
    return Artifact(store.root, manifest, found=False)


def _manifest(identity: dict[str, Any], **told: Any) -> Manifest:
    files, shards = told.get("files", ()), told.get("shards", ())
    return Manifest(
        kind=identity["kind"], key=digest_json(identity), content=content_of(files, shards), identity=identity, files=files,
        shards=shards, created="2026-01-01T00:00:00+00:00", produced_by=placed({}),
    )  # fmt: skip


def fill(store: SharedStore, num_shards: int) -> None:
    """Shards, half of them listed by one pinned artifact."""
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        made = list(pool.map(lambda number: put(store, number), range(num_shards)))
    listed = tuple(shard_entry(f"train/{i:06}", one) for i, one in enumerate(made[::2]))
    manifest = _manifest({"kind": "blob", "revision": 1, "spec": {}, "inputs": {}}, shards=listed)
    store.bucket.put(manifest_name(manifest.kind, manifest.key), spelled(manifest))
    pin(store.notes, Artifact(store.root, manifest, found=False), "measured")
    time.sleep(LEAST_SECONDS + 1)


def passes(store: SharedStore) -> Iterator[tuple[str, Callable[[], int]]]:
    """The collections in turn; each says how many shards it condemned or deleted."""

    def collected(dry_run: bool = False) -> int:
        told = collect_bucket(store, keep_last=1, grace_seconds=0, dry_run=dry_run, least_seconds=LEAST_SECONDS)
        return sum(one.number for one in (*told.taken, *told.deleted))

    yield "looked_at", lambda: collected(dry_run=True)
    yield "condemned", collected
    time.sleep(LEAST_SECONDS + 1)
    yield "deleted", collected


def timed(url: str, endpoint: str | None, folder: Path, num_shards: int) -> dict[str, Any]:
    """Seconds of each collection."""
    store = SharedStore(f"{url}/timed", folder / "timed", endpoint=endpoint)
    fill(store, num_shards)
    told: dict[str, Any] = {"num_shards": num_shards}
    for name, collect in passes(store):
        start = time.perf_counter()
        number = collect()
        seconds = time.perf_counter() - start
        told |= {f"seconds_{name}": round(seconds, 2), f"num_{name}": number, f"a_second_{name}": round(number / seconds)}
    return told


def counted(url: str, endpoint: str, folder: Path, num_shards: int) -> dict[str, Any]:
    """Requests of each collection, for each shard that it looked at, condemned or deleted."""
    with Proxy(endpoint).running() as proxy:
        store = SharedStore(f"{url}/counted", folder / "counted", endpoint=proxy.address)
        fill(SharedStore(f"{url}/counted", folder / "counted", endpoint=endpoint), num_shards)
        told = {}
        for name, collect in passes(store):
            proxy.asked.clear()
            number = collect()
            told[f"requests_a_shard_{name}"] = round(len(proxy.asked) / number, 3)
        return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--counted", type=int, default=1000)
    parser.add_argument("--url")
    parser.add_argument("--endpoint")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name, bucket(arguments.url, arguments.endpoint, Path(name)) as (url, endpoint):
        measure("collect_bucket", lambda: _all(url, endpoint, Path(name), arguments))


def _all(url: str, endpoint: str | None, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    told = timed(url, endpoint, folder, arguments.shards)
    return told | (counted(url, endpoint, folder, arguments.counted) if endpoint and endpoint.startswith("http:") else {})


if __name__ == "__main__":
    main()
