"""An artifact of a shared store: files come to this machine when their paths are asked for."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from tasks.store.artifact import Artifact, FileEntry, ShardEntry
from tasks.store.bucket import Bucket
from tasks.store.cache import Cache, is_whole
from tasks.store.digest import Digest
from tasks.store.layout import file_name


class Source(Protocol):
    """What an artifact asks of its store."""

    bucket: Bucket
    cache: Cache

    def load(self, kind: str, key: Digest) -> Artifact | None: ...

    def ask(self, kind: str, key: Digest) -> Artifact | None: ...

    def rescue(self, kind: str, key: Digest) -> Artifact | None: ...

    def fetch(self, artifact: Artifact, entry: FileEntry) -> Path: ...

    def lose(self, artifact: Artifact, problem: str) -> NoReturn: ...


@dataclass(frozen=True)
class SharedArtifact(Artifact):
    """An artifact of a shared store: to ask for the path of a file fetches the file."""

    store: Source = field(kw_only=True, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        return self.store.cache.folder(self.manifest)

    @property
    def path(self) -> Path:
        for entry in self.manifest.files:
            self.store.fetch(self, entry)
        return self.folder

    def file(self, name: str) -> Path:
        return self.store.fetch(self, self.entry(name))

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        entry = self.entry(name)
        if is_whole(self.folder / entry.name, entry):
            with contextlib.suppress(FileNotFoundError):  # trimmed just now
                return super().read(name, start, num_bytes)
        data = self.store.bucket.read(file_name(self.manifest, entry), start, min(num_bytes, entry.num_bytes - start))
        if data is not None:
            return bytes(data)
        self.store.fetch(self, entry)  # from where it is now, or to say that it is lost
        return super().read(name, start, num_bytes)

    def shard_file(self, entry: ShardEntry, name: str) -> Path:
        shard = self.store.load(entry.kind, entry.key)
        if shard is None or shard.content != entry.content:  # perhaps only as this machine heard of it
            shard = self.store.ask(entry.kind, entry.key) or self.store.rescue(entry.kind, entry.key)
        if shard is None or shard.content != entry.content:
            self.store.lose(self, f"shard {entry.name} ({entry.kind}/{entry.key[:12]}) is {'another' if shard else 'missing'}")
        return shard.file(name)
