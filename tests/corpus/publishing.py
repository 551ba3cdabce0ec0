"""Published bytes to get: what they are, where a server has them, and the archive stage on them."""

import hashlib
from pathlib import Path

from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore
from tests.corpus.http_server import Loopback, Published

DATA = bytes(range(256)) * 4_000  # 1 MB
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()
OTHER = DATA[:-1] + b"x"


def get(store: ArtifactStore, url: object, **fields: str) -> Artifact:
    return build_archive(store, Machine(), ArchiveSpec(url=str(url), **fields))


def bytes_of(artifact: Artifact) -> bytes:
    return artifact.file("archive").read_bytes()


def publish(server: Loopback, published: Published, path: str = "/a") -> str:
    server.files[path] = published
    return server.url(path)


def partial(store: ArtifactStore) -> Path | None:
    return next(iter(store.root.glob(".staging/archive/*/.scratch/partial")), None)
