"""A shared store against the plain client of the same bucket: bytes a second up and down, and requests a shard.

    python -m benchmarks.remote_store [--bytes 268435456] [--shards 200] [--rounds 3] [--url s3://...] [--endpoint http://...]

Without --url it starts SeaweedFS on loopback. Every round sends and reads the same bytes by the plain client (obstore's put
and get, one call each) and by the store (files, digests, cache, manifest), one after the other; the ratio is the store's
share of the plain client's speed. Requests are counted by the tests' proxy, in a pass of its own that is not timed.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import obstore
from pydantic import Field

from benchmarks.measure import measure
from tasks.machine import Machine
from tasks.store import Built, SharedStore, Spec, Work, digest_json, shard_entry, stage
from tasks.store.bucket import PART_BYTES, Patience, connect
from tests.store.s3 import BUCKET, CREDENTIALS, Proxy, s3_server


class BlobSpec(Spec):
    number: int = Field(description="what keeps one apart from another")
    num_bytes: int = Field(description="bytes of its one file")


@stage("blob-shard", revision=1)
def build_blob(work: Work, spec: BlobSpec) -> Built:
    (work.folder / "blob").write_bytes(os.urandom(spec.num_bytes))
    return Built()


@stage("blobs", revision=1)
def build_blobs(work: Work, spec: BlobSpec) -> Built:
    """A number of small shards."""
    shards = [build_blob(work.store, Machine(), BlobSpec(number=i, num_bytes=spec.num_bytes)) for i in range(spec.number)]
    return Built(shards=tuple(shard_entry(f"train/{i:05}", one) for i, one in enumerate(shards)))


@contextmanager
def bucket(url: str | None, endpoint: str | None, folder: Path) -> Iterator[tuple[str, str | None]]:
    """The URL and the endpoint that are measured."""
    if url:
        yield url, endpoint
        return
    os.environ.update(CREDENTIALS)
    with s3_server(folder / "server") as address:
        yield f"s3://{BUCKET}/benchmark", address


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain(url: str, endpoint: str | None, blob: Path, target: Path) -> tuple[float, float]:
    """Seconds up and down of the plain client."""
    client = connect(url, endpoint, Patience())

    def read() -> None:
        with target.open("wb") as file:
            for data in obstore.get(client, "plain").stream(min_chunk_size=PART_BYTES):
                file.write(data)

    return seconds(lambda: obstore.put(client, "plain", blob, chunk_size=PART_BYTES, max_concurrency=4)), seconds(read)


def stored(url: str, endpoint: str | None, blob: Path, folder: Path, number: int) -> tuple[float, float]:
    """Seconds up (digest, upload, manifest) and down (manifest, download, digest) of the store."""
    here, there = (SharedStore(f"{url}/{number}", folder / name, endpoint=endpoint) for name in ("here", "there"))
    identity = build_blob.identity(BlobSpec(number=number, num_bytes=blob.stat().st_size), {})
    artifact = None

    def commit() -> None:
        nonlocal artifact
        artifact = here.commit(identity, (), {}, {}, {})

    staging = here.staging("blob-shard", digest_json(identity))
    os.link(blob, staging / "blob")
    up = seconds(commit)
    assert artifact
    return up, seconds(lambda: there.find("blob-shard", artifact.key).file("blob"))  # type: ignore[union-attr]


def requests(url: str, endpoint: str, folder: Path, num_shards: int) -> dict[str, Any]:
    """Requests a shard: to build it, to find it on another machine, and to read its file there."""
    told: dict[str, Any] = {}
    spec = BlobSpec(number=num_shards, num_bytes=1_000)
    with Proxy(endpoint).running() as proxy:
        here, there = (SharedStore(f"{url}/shards", folder / name, endpoint=proxy.address) for name in ("build", "find"))
        whole = build_blobs(here, Machine(), spec)
        told["build"] = _counted(proxy, num_shards)
        found = build_blobs(there, Machine(), spec)
        told["find"] = _counted(proxy, num_shards)
        there.find_all("blob-shard", [entry.key for entry in whole.shards()])
        told["find_each"] = _counted(proxy, num_shards)
        for entry in found.shards():
            found.shard_file(entry, "blob")
        told["read"] = _counted(proxy, num_shards)
    return told


def _counted(proxy: Proxy, num_shards: int) -> dict[str, float]:
    counts = Counter(asked.method for asked in proxy.asked)
    proxy.asked.clear()
    return {"a_shard": round(sum(counts.values()) / num_shards, 2), **counts}


def compare(url: str, endpoint: str | None, folder: Path, num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """Bytes a second of the plain client and of the store, median of the rounds, and the store's share of the client's."""
    blob = folder / "blob"
    blob.write_bytes(os.urandom(num_bytes))
    rounds = [
        (plain(url, endpoint, blob, folder / "plain"), stored(url, endpoint, blob, folder, number))
        for number in range(num_rounds)
    ]
    told: dict[str, Any] = {}
    for k, way in enumerate(("up", "down")):
        for i, who in enumerate(("plain", "store")):
            told[f"{who}_{way}_bytes_per_second"] = round(num_bytes / median(one[i][k] for one in rounds))
        told[f"{way}_ratio"] = round(median(one[0][k] / one[1][k] for one in rounds), 3)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=256 << 20)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url")
    parser.add_argument("--endpoint")
    told = parser.parse_args()

    with TemporaryDirectory() as name, bucket(told.url, told.endpoint, Path(name)) as (url, endpoint):

        def run() -> dict[str, Any]:
            speeds = compare(url, endpoint, Path(name), told.bytes, told.rounds)
            asked = requests(url, endpoint, Path(name), told.shards) if endpoint else None
            return {"bytes": told.bytes, "rounds": told.rounds, **speeds, "requests": asked}

        measure("remote_store", run)


if __name__ == "__main__":
    main()
